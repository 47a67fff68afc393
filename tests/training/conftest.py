"""What the tests of whole runs share."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.kit.processes import forkserver

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def context() -> Iterator[Any]:
    """Processes that begin with everything imported."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PYTHONPATH", os.pathsep.join([str(ROOT), str(ROOT / "src")]))
        patch.syspath_prepend(str(ROOT))
        yield forkserver()
