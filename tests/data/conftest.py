"""Where the real data lies, for the tests that use it."""

from __future__ import annotations

import os
from pathlib import Path

import pytest


@pytest.fixture
def shared() -> Path:
    default = Path(__file__).parents[2].parent / "shared" / "data"
    path = Path(os.environ.get("WEFT_SHARED_DATA", default))
    if not path.is_dir():
        pytest.skip(f"the shared real data is not at {path} (set WEFT_SHARED_DATA)")
    return path
