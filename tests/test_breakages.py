"""``make breakages`` breaks something: a text that it replaces stands once in the source, and its tests exist."""

from __future__ import annotations

from pathlib import Path

import pytest
from tools.breakages import BREAKAGES, Breakage

ROOT = Path(__file__).parent.parent


@pytest.mark.parametrize("breakage", BREAKAGES, ids=lambda breakage: breakage.what)
def test_there_is_what_it_breaks(breakage: Breakage) -> None:
    assert sum(path.read_text().count(breakage.old) for path in (ROOT / "src" / "weft").rglob("*.py")) == 1
    assert breakage.new != breakage.old
    for test in breakage.tests:
        path, _, name = test.partition("::")
        assert f"def {name.partition('[')[0]}(" in (ROOT / path).read_text()
