"""Linears with LoRA whose weights are read piece by piece, beside the equation with whole weights."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.ops.test_fused import close, draw
from torch import Tensor

from weft.ops import low_rank_rows as module
from weft.ops import products
from weft.ops.four_bit import FourBitRows
from weft.ops.fused import Piece
from weft.ops.kept import Results
from weft.ops.low_rank_rows import low_rank_rows, low_rank_rows_ref, rows_in_pieces
from weft.ops.packed import EightBitRows
from weft.ops.products import PlainRows, Rows

INPUTS, OUTPUTS = 64, (40, 7, 130)


@pytest.fixture(autouse=True)
def _small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_PIECE", 700)
    monkeypatch.setattr(module, "MANY", 1)


def rows_of(kind: str, outputs: int, dtype: torch.dtype) -> Rows:
    weight = draw(outputs, INPUTS, dtype=torch.float32, seed=outputs, grad=False)
    if kind == "plain":
        return PlainRows(weight.to(dtype))
    if kind == "int8":
        codes = torch.randint(-127, 128, weight.shape, dtype=torch.int8, generator=torch.Generator().manual_seed(1))
        return EightBitRows(codes, weight.abs().amax(1), dtype)
    functional = pytest.importorskip("bitsandbytes.functional")
    packed, state = functional.quantize_4bit(weight, quant_type=kind, compress_statistics=True)
    return FourBitRows(packed, state, dtype)


def setting(
    kind: str, dtype: torch.dtype, sizes: list[int], where: list[list[int]], *, bias: bool
) -> tuple[Tensor, list[tuple[Rows, Tensor | None]], list[Piece], list[Tensor]]:
    """``where[p]``: the linears that piece p of ``sizes[p]`` rows updates."""
    linears = [
        (rows_of(kind, o, dtype), draw(o, dtype=dtype, seed=30 + o, grad=False) if bias else None) for o in OUTPUTS
    ]
    pieces, factors, begin = [], list[Tensor](), 0
    for p, (size, here) in enumerate(zip(sizes, where, strict=True)):
        pieces.append(Piece(begin, begin + size, tuple(here), tuple(0.5 + i for i in here)))
        begin += size
        for i in here:
            rank = 3 + p
            factors += [
                draw(rank, INPUTS, dtype=torch.float32, seed=50 + 7 * p + i),
                draw(OUTPUTS[i], rank, dtype=torch.float32, seed=90 + 7 * p + i),
            ]
    return draw(begin, INPUTS, dtype=dtype, seed=10), linears, pieces, factors


@pytest.mark.parametrize("where", [[[0, 1, 2]], [[]], [[0], [1, 2]], [[], [0, 2], []], [[2, 0], [], [0, 1, 2]]])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8", "plain"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_values_and_gradients(dtype: torch.dtype, kind: str, bias: bool, where: list[list[int]]) -> None:
    x, linears, pieces, factors = setting(kind, dtype, [5, 1, 9][: len(where)], where, bias=bias)
    results = []
    for f in (low_rank_rows, low_rank_rows_ref):
        ys = f(x, linears, pieces, factors)
        d_ys = [draw(*y.shape, dtype=dtype, seed=130 + i, grad=False) for i, y in enumerate(ys)]
        results.append([*ys, *torch.autograd.grad(ys, [x, *factors], d_ys, materialize_grads=True)])
    for found, wanted in zip(*results, strict=True):
        close(found, wanted, dtype)


@pytest.mark.parametrize("kind", ["nf4", "plain"])
def test_what_no_gradient_is_asked_of(kind: str) -> None:
    """A base without adapters, rows that no gradient goes back to, and an output that is not used."""
    x, linears, pieces, factors = setting(kind, torch.bfloat16, [6], [[0, 1]], bias=False)
    with torch.no_grad():
        for one, other in zip(
            low_rank_rows(x, linears, [Piece(0, 6)], []), low_rank_rows_ref(x, linears, [Piece(0, 6)], []), strict=True
        ):
            close(one, other, torch.bfloat16)
    grads = []
    for f in (low_rank_rows, low_rank_rows_ref):
        _, second, _ = f(x.detach(), linears, pieces, factors)
        grads.append(torch.autograd.grad(second.float().square().sum(), factors, materialize_grads=True))
    for one, other in zip(*grads, strict=True):
        close(one, other, torch.float32 if other.abs().max() == 0 else torch.bfloat16)


def test_fresh_memory_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are written into memory that held other numbers."""

    def poisoned(numbers: int, use: str = "piece", real: Any = products.scratch) -> Tensor:
        found: Tensor = real(numbers, use)
        return found.fill_(torch.nan) if use == "out" else found

    monkeypatch.setattr(module, "scratch", poisoned)
    test_values_and_gradients(torch.bfloat16, "nf4", True, [[], [0, 2], []])


def test_the_sum_is_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """A recomputation from kept results reads no weight, and gives the same to the bit."""
    monkeypatch.setattr("weft.ops.kept.DEAR", 1)
    x, linears, pieces, factors = setting("nf4", torch.bfloat16, [5, 9], [[0], [1, 2]], bias=True)
    forward, again = Results().contexts()
    with forward:
        first = low_rank_rows(x, linears, pieces, factors)
    monkeypatch.setattr(FourBitRows, "pieces", lambda self: pytest.fail("the weight is read again"))
    monkeypatch.setattr(module, "widened", lambda x: pytest.fail("the input is widened again"))
    with again:
        second = low_rank_rows(x, linears, pieces, factors)
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_a_second_backward_pass_is_right() -> None:
    x, linears, pieces, factors = setting("nf4", torch.float32, [5], [[0, 2]], bias=False)
    y = sum(y.square().sum() for y in low_rank_rows(x, linears, pieces, factors))
    first, second = (torch.autograd.grad(y, [x, *factors], retain_graph=True) for _ in range(2))
    assert all(torch.equal(one, other) for one, other in zip(first, second, strict=True))


def test_when_pieces_are_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not for few rows, and not where a dtype is fast as it is."""
    monkeypatch.setattr(module, "MANY", 10)
    for slow in (True, False):
        for name in ("weft.ops.products", "weft.ops.packed"):
            monkeypatch.setattr(f"{name}.faster_wide_from", lambda *_, slow=slow: 1 if slow else float("inf"))
        packed = rows_of("nf4", 40, torch.bfloat16)
        weight = torch.zeros(4096, INPUTS, dtype=torch.bfloat16)
        x = torch.zeros(20, INPUTS, dtype=torch.bfloat16)
        assert [rows_in_pieces(x, w) is not None for w in (packed, weight)] == [slow, slow]
        assert rows_in_pieces(x[:9], packed) is None
    assert rows_in_pieces(x.float(), weight.float()) is None
    assert rows_in_pieces(x.float(), rows_of("nf4", 40, torch.float32)) is not None
