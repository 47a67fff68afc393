"""The fused nodes against their written-out references: values and gradients."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from weft.ops import fused
from weft.ops.fused import (
    Piece,
    low_rank_linears,
    low_rank_linears_ref,
    rms_norm,
    rms_norm_ref,
    rotary,
    rotary_ref,
    swiglu,
    swiglu_ref,
)

# Relative to the largest entry. In 16 bits, four eps (bfloat16: 7.8e-3, float16: 9.8e-4): at most four numbers are
# rounded on the way to a result (x A, its product with B, the frozen product, their sum), by half an eps on each side.
# Wider dtypes sum in another order: ten times what was seen.
TOLERANCE = {torch.float64: 1e-12, torch.float32: 2e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def draw(*shape: int, dtype: torch.dtype, seed: int, grad: bool = True) -> Tensor:
    """Gaussian numbers."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_(grad)


def close(a: Tensor, b: Tensor, dtype: torch.dtype) -> None:
    """Equal up to the rounding of ``dtype``, relative to the largest entry."""
    assert a.dtype == b.dtype
    assert a.shape == b.shape
    bound = TOLERANCE[dtype] * max(1.0, b.abs().max().item() if b.numel() else 0.0)
    torch.testing.assert_close(a, b, rtol=TOLERANCE[dtype], atol=bound)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "d"), [(1, 1), (7, 33), (64, 16)])
@pytest.mark.parametrize("block", [1, 100, 2**18])
def test_rms_norm(dtype: torch.dtype, n: int, d: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BLOCK", block)
    x, weight = draw(1, n, d, dtype=dtype, seed=1), draw(d, dtype=dtype, seed=2, grad=False)
    y, ref = rms_norm(x, weight, 1e-5), rms_norm_ref(x, weight, 1e-5)
    close(y, ref, dtype)
    d_y = draw(1, n, d, dtype=dtype, seed=3, grad=False)
    close(*(torch.autograd.grad(out, x, d_y)[0] for out in (y, ref)), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_same_without_gradients(dtype: torch.dtype) -> None:
    """Text is written without nodes; its numbers are those of training."""
    x, weight = draw(5, 3, 8, dtype=dtype, seed=1, grad=False), draw(8, dtype=dtype, seed=2, grad=False)
    cos, sin = (draw(5, 8, dtype=dtype, seed=seed, grad=False) for seed in (3, 4))
    linears = [(draw(6, 8, dtype=dtype, seed=5, grad=False), draw(6, dtype=dtype, seed=6, grad=False)), (x[:, 0], None)]

    def run() -> list[Tensor]:
        return [
            rms_norm(x, weight, 1e-5),
            rotary(x, cos, sin),
            swiglu(x, x.flip(0)),
            *low_rank_linears(x[:, 0], linears, [Piece(0, 5)], []),
        ]

    with_nodes = run()
    with torch.no_grad():
        for found, wanted in zip(run(), with_nodes, strict=True):
            torch.testing.assert_close(found, wanted, rtol=torch.finfo(dtype).eps, atol=torch.finfo(dtype).eps)


def test_rms_norm_computes_in_fp32() -> None:
    """Squares of large bf16 and fp16 numbers must not overflow."""
    for dtype in (torch.bfloat16, torch.float16):
        x = torch.full((2, 64), 60_000.0, dtype=dtype)
        close(rms_norm(x, torch.ones(64, dtype=dtype), 1e-6), torch.ones(2, 64, dtype=dtype), dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("shape", [(1, 1), (1, 7, 33), (64, 16)])
def test_swiglu(dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    gate, up = draw(*shape, dtype=dtype, seed=1), draw(*shape, dtype=dtype, seed=2)
    y, ref = swiglu(gate, up), swiglu_ref(gate, up)
    close(y, ref, dtype)
    d_y = draw(*shape, dtype=dtype, seed=3, grad=False)
    for a, b in zip(*(torch.autograd.grad(out, [gate, up], d_y) for out in (y, ref)), strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize(("n", "heads", "dim"), [(1, 1, 2), (5, 3, 8), (40, 2, 6)])
@pytest.mark.parametrize("block", [1, 2**18])
def test_rotary(dtype: torch.dtype, n: int, heads: int, dim: int, block: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused, "BLOCK", block)
    x = draw(n, heads, dim, dtype=dtype, seed=4)
    # Unequal halves: the gradient must not rely on cos and sin repeating themselves.
    cos, sin = (draw(n, dim, dtype=dtype, seed=s, grad=False) for s in (5, 6))
    y, ref = rotary(x, cos, sin), rotary_ref(x, cos, sin)
    close(y, ref, dtype)
    d_y = draw(n, heads, dim, dtype=dtype, seed=7, grad=False)
    close(*(torch.autograd.grad(out, x, d_y)[0] for out in (y, ref)), dtype)


def check_linears(
    dtype: torch.dtype, sizes: list[int], where: list[list[int]], outs: list[int], *, bias: bool, r: int = 3
) -> None:
    """``where[p]``: the linears that piece p of ``sizes[p]`` rows updates."""
    n, d = sum(sizes), 10
    x = draw(n, d, dtype=dtype, seed=10)
    linears = [
        (
            draw(o, d, dtype=dtype, seed=11 + i, grad=False),
            draw(o, dtype=dtype, seed=30 + i, grad=False) if bias else None,
        )
        for i, o in enumerate(outs)
    ]
    # The adapters' own dtype is wider than the base's.
    own = torch.promote_types(dtype, torch.float32)
    pieces, factors, begin = [], [], 0
    for p, (size, here) in enumerate(zip(sizes, where, strict=True)):
        pieces.append(Piece(begin, begin + size, tuple(here), tuple(0.5 + i for i in here)))
        begin += size
        for i in here:
            rank = r + p
            factors += [
                draw(rank, d, dtype=own, seed=50 + 7 * p + i),
                draw(outs[i], rank, dtype=own, seed=90 + 7 * p + i),
            ]
    results = []
    for f in (low_rank_linears, low_rank_linears_ref):
        ys = f(x, linears, pieces, factors)
        d_ys = [draw(*y.shape, dtype=dtype, seed=130 + i, grad=False) for i, y in enumerate(ys)]
        results.append([*ys, *torch.autograd.grad(ys, [x, *factors], d_ys, materialize_grads=True)])
    for a, b in zip(*results, strict=True):
        close(a, b, dtype)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("where", [[[0, 1, 2]], [[]], [[0], [1, 2]], [[], [0, 2], []], [[2], [], [0, 1, 2]]])
def test_low_rank_linears(dtype: torch.dtype, bias: bool, where: list[list[int]]) -> None:
    check_linears(dtype, [5, 1, 9][: len(where)], where, [4, 7, 12], bias=bias)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.tuples(st.integers(1, 9), st.lists(st.integers(0, 1), unique=True)), min_size=1, max_size=4),
    st.booleans(),
)
def test_low_rank_linears_any_route(route: list[tuple[int, list[int]]], bias: bool) -> None:
    check_linears(torch.float64, [n for n, _ in route], [here for _, here in route], [6, 3], bias=bias)


def test_output_that_is_not_used() -> None:
    x, w = draw(4, 5, dtype=torch.float64, seed=1), draw(3, 5, dtype=torch.float64, seed=2, grad=False)
    a, b = draw(2, 5, dtype=torch.float64, seed=3), draw(3, 2, dtype=torch.float64, seed=4)
    pieces = [Piece(0, 4, (1,), (2.0,))]
    grads = []
    for f in (low_rank_linears, low_rank_linears_ref):
        first, _ = f(x, [(w, None), (w * 2, None)], pieces, [a, b])
        grads.append(torch.autograd.grad(first.sum(), [x, a, b], materialize_grads=True))
    for mine, ref in zip(*grads, strict=True):
        close(mine, ref, torch.float64)


def test_uninitialised_memory_does_not_show(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products are added into fresh memory, which may hold NaN."""
    empty, empty_like = Tensor.new_empty, torch.empty_like
    monkeypatch.setattr(Tensor, "new_empty", lambda self, *a, **k: empty(self, *a, **k).fill_(torch.nan))
    monkeypatch.setattr(torch, "empty_like", lambda x, **k: empty_like(x, **k).fill_(torch.nan))
    for dtype in TOLERANCE:
        check_linears(dtype, [3, 4], [[0], []], [4, 5], bias=False)


def test_second_backward_is_right() -> None:
    """Nothing that was saved is overwritten."""
    x, w = draw(6, 8, dtype=torch.float32, seed=1), draw(8, dtype=torch.float32, seed=2, grad=False)
    cos, sin = (draw(6, 4, dtype=torch.float32, seed=s, grad=False) for s in (3, 4))
    y = rotary(rms_norm(x, w, 1e-6).view(6, 2, 4), cos, sin).square().sum()
    first = torch.autograd.grad(y, x, retain_graph=True)
    torch.testing.assert_close(first, torch.autograd.grad(y, x), rtol=0, atol=0)
