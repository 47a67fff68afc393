"""``weft doctor``."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest


def test_everything_here_works(weft: Callable[..., Any]) -> None:
    from weft.methods import METHODS

    result = weft("doctor", "--json")
    report = json.loads(result.out)
    found = {(check["section"], check["name"]): check for check in report["checks"]}
    failed = [check for check in report["checks"] if check["status"] == "failed" and check["section"] != "embedded"]
    assert failed == []
    for method in METHODS:
        assert found["methods", method]["status"] == "ok"
    for name in ("float32", "bfloat16", "float16"):
        assert ("dtypes", f"{name} on cpu") in found
    assert found["versions", "torch"]["status"] == "ok"


def test_what_fails_is_told(weft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.cli import doctor

    def broken(method: str) -> str:
        raise RuntimeError(f"no {method}\nmore lines")

    monkeypatch.setattr(doctor, "train_one_step", broken)
    monkeypatch.setattr(doctor, "_embedded", lambda: iter(()))
    result = weft("doctor")
    assert result.code == 2
    assert "RuntimeError: no lora" in result.out
    assert "failed: adalora, bitfit" in result.out
    assert "Traceback" not in result.err
