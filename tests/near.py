"""How near each test came to its limits: a plugin of pytest, ``-p tests.near --near FILE``.

Writes one JSON line per comparison: the test, what was compared, found, limit. It sees ``kit.measured``,
``torch.testing.assert_close`` and plain ``assert number <= limit``.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path
from typing import Any

import pytest

_NUMBER = r"-?\d+(?:\.\d*)?(?:e[-+]?\d+)?"
# The explanation that pytest gives of a comparison, in its first line; a tensor's repr holds its number first.
# Not of a difference, a product or a range: there the first number is not what was found.
_COMPARED = re.compile(rf"^\(?(?:tensor\(|abs\()?({_NUMBER})(?:, [^()]*)?\)* <=? \(?({_NUMBER})\)*$")
_TEXT = re.compile(r"^[^<]*<=?\s[^<]*$")
_found: list[dict[str, Any]] = []


def record(what: str, found: float, limit: float) -> None:
    """Keep one comparison."""
    test = os.environ.get("PYTEST_CURRENT_TEST", "").rpartition(" ")[0]
    _found.append({"test": test, "what": what, "found": found, "limit": limit})


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--near", help="file for how near each test came to its limits")


def pytest_configure(config: pytest.Config) -> None:
    if not config.getoption("--near"):
        return
    import torch
    from tests import kit

    measured, close = kit.measured, torch.testing.assert_close

    def watched_measured(name: str, value: float, limit: float, derived: bool = False) -> None:
        if not derived:
            record(name, float(value), float(limit))
        measured(name, value, limit, derived)

    def watched_close(actual: Any, expected: Any, **given: Any) -> None:
        close(actual, expected, **given)
        for a, b in zip(_tensors(actual), _tensors(expected), strict=True):
            # The tolerances of tests/ops count the roundings of sixteen bits one by one.
            derived = given.get("rtol", 0) > 1e-3
            if a.is_floating_point() and not derived and a.numel() and given.get("atol") is not None:
                bound = given["atol"] + given["rtol"] * b.detach().double().abs()
                share = ((a.detach().double() - b.detach().double()).abs() / bound).max()
                record("assert_close, as a share of the limit", float(share), 1.0)

    kit.measured, torch.testing.assert_close = watched_measured, watched_close


def _tensors(values: Any) -> list[Any]:
    return list(values) if isinstance(values, (tuple, list)) else [values]


def pytest_assertion_pass(item: pytest.Item, lineno: int, orig: str, expl: str) -> None:
    """Called where ``enable_assertion_pass_hook`` is set."""
    match = _COMPARED.match(expl.splitlines()[0])
    if match and _TEXT.search(orig) and ("e-" in orig or "e-" in match[2] or "LIMIT" in orig):
        record(orig, abs(float(match[1])), abs(float(match[2])))


def pytest_sessionfinish(session: pytest.Session) -> None:
    path = session.config.getoption("--near")
    if path and _found:
        # Each worker of xdist writes what it saw.
        with Path(path).open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(one) + "\n" for one in _found)
