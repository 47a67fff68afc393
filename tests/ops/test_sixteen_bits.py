"""Which products in 16 bits are slow here: asked, measured where that says nothing, and kept."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from weft import measured
from weft.ops import sixteen_bits
from weft.ops.sixteen_bits import faster_wide_from, first_of_gain

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def _nothing_known(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("WEFT_CACHE_DIR", str(tmp_path))
    sixteen_bits._faster_wide_from.cache_clear()
    yield
    sixteen_bits._faster_wide_from.cache_clear()


def test_what_is_not_asked() -> None:
    assert faster_wide_from(CPU, torch.float32) == math.inf
    assert faster_wide_from(torch.device("cuda"), torch.bfloat16) == math.inf


def test_without_instructions_always(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sixteen_bits, "multiplies_sixteen_bits", lambda *_: False)
    monkeypatch.setattr(sixteen_bits, "_gain", lambda *_: pytest.fail("there is nothing to measure"))
    assert faster_wide_from(CPU, torch.bfloat16) == 1


@pytest.mark.parametrize(
    ("gains", "wanted"),
    [
        ({128: 0.3, 32: 2}, 0),
        ({128: 1.5, 32: 0.7}, 128),
        ({128: 1.5, 32: 0.9}, 32),
    ],
)
def test_the_first_of_all_that_gain(gains: dict[int, float], wanted: int) -> None:
    assert first_of_gain(gains.__getitem__) == wanted


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_measured_once_and_kept(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sixteen_bits, "multiplies_sixteen_bits", lambda *_: True)
    first = faster_wide_from(CPU, dtype)
    assert first in (32, 128, math.inf)
    assert measured.recall("products")[sixteen_bits._KINDS[dtype]] in (first, 0)
    monkeypatch.setattr(sixteen_bits, "_gain", lambda *_: pytest.fail("it is known"))
    sixteen_bits._faster_wide_from.cache_clear()
    assert faster_wide_from(CPU, dtype) == first


def test_a_pass_that_is_recorded_does_not_see_it(monkeypatch: pytest.MonkeyPatch) -> None:
    class Recorded(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            pytest.fail(f"{func} was recorded")

    monkeypatch.setattr(sixteen_bits, "multiplies_sixteen_bits", lambda *_: True)
    with Recorded():
        faster_wide_from(CPU, torch.bfloat16)
