"""Weights in four and eight bits, read piece by piece, beside the whole weight at once."""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from tests import kit

from weft.ops import packed, products
from weft.ops.four_bit import FourBitRows
from weft.ops.packed import EightBitRows, in_pieces, packed_linear, packed_linear_ref
from weft.ops.quantization import NestedScales, dequantize_blocks, levels_of, unpack_four_bits

pytest.importorskip("bitsandbytes")
# (rows, in, out): blocks that are rows, that end within rows, that are longer than rows; an odd number of weights.
SHAPES = [(9, 64, 10), (8, 48, 7), (12, 16, 40), (8, 5, 7), (10, 130, 33)]


def made(outer: int, inner: int, dtype: torch.dtype, **options: Any) -> Any:
    from bitsandbytes.functional import quantize_4bit

    generator = torch.Generator().manual_seed(1)
    if not options:
        codes = torch.randint(-127, 128, (outer, inner), generator=generator, dtype=torch.int8)
        return EightBitRows(codes, torch.rand(outer, generator=generator) * 3, dtype)
    packed, state = quantize_4bit(torch.randn(outer, inner, generator=generator).to(dtype), **options)
    return FourBitRows(packed, state, dtype)


@pytest.mark.parametrize("options", [{"quant_type": "nf4", "compress_statistics": True}, {"quant_type": "fp4"},
                                     {"quant_type": "nf4", "blocksize": 128}, {}], ids=str)  # fmt: skip
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_whole_weight(
    shape: tuple[int, int, int], dtype: torch.dtype, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(products, "_PIECE", 100)
    monkeypatch.setattr(products, "_SLAB", 200)
    count, inner, outer = shape
    try:
        rows = made(outer, inner, dtype, **options)
    except RuntimeError:
        assert inner * outer % 2
        pytest.skip("this bitsandbytes packs no odd number of weights")
    block = rows.state.blocksize if options else 20 * inner
    assert len(list(rows.pieces())) > 1 or outer <= block // math.gcd(block, inner), "pieces begin where blocks do"
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(2, count, inner, generator=generator).to(dtype).requires_grad_()
    bias, dy = torch.randn(outer, generator=generator).to(dtype), torch.randn(2, count, outer, generator=generator)
    found = []
    for function in (packed_linear, packed_linear_ref):
        y = function(x, rows, bias)
        assert y.dtype == dtype
        (dx,) = torch.autograd.grad(y, x, dy.to(dtype))
        found.append((y.detach(), dx))
    for what, ours, wanted, terms in zip(("y", "dx"), *found, (inner, outer), strict=True):
        eps = torch.finfo(dtype).eps
        limit = 2 * (2 * eps + terms * torch.finfo(torch.float32).eps) * max(1.0, float(wanted.abs().max()))
        kit.measured(what, float((ours.double() - wanted.double()).abs().max()), limit, derived=True)


@pytest.mark.parametrize("shape", [(70, 64), (70, 48), (3, 200), (5, 2), (1, 130)], ids=str)
@pytest.mark.parametrize("nested", [True, False])
def test_the_numbers_are_those_of_the_format(
    shape: tuple[int, int], nested: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """And bitsandbytes', where no block goes from one row to the next: there it is wrong on a CPU with AVX-512."""
    from bitsandbytes.functional import dequantize_4bit

    monkeypatch.setattr(products, "_PIECE", 500)
    monkeypatch.setattr(products, "_SLAB", 1000)
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        rows = made(*shape, dtype, quant_type="nf4", compress_statistics=nested)
        state = rows.state
        scales = state.absmax
        if nested:
            scales = NestedScales(state.absmax, state.state2.absmax, state.offset).numbers()
        codes = unpack_four_bits(rows.packed, math.prod(shape))
        wanted = dequantize_blocks(codes, scales, levels_of("nf4"), 64).to(dtype).view(shape)
        slabs = torch.cat([slab for _, slab in rows.slabs()])
        for found in (rows.whole(), slabs, torch.cat([wide.clone() for _, wide in rows.pieces()])):
            assert torch.equal(found.float(), wanted.float())
        if shape[1] % 64 == 0:
            assert torch.equal(dequantize_4bit(rows.packed, state), wanted)


@pytest.mark.parametrize("options", [{"quant_type": "nf4"}, {}], ids=str)
def test_few_rows_of_a_large_weight(options: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """They are multiplied slab by slab, and give to the bit what the whole weight gives: no sum is cut."""
    rows = made(70, 64, torch.bfloat16, **options)
    x = torch.randn(3, 64, generator=torch.Generator().manual_seed(4)).bfloat16()
    whole = packed_linear(x, rows)
    monkeypatch.setattr(products, "_SLAB", 640)
    assert len(list(rows.slabs())) == 7
    assert torch.equal(packed_linear(x, rows), whole)


def test_numbers_that_are_kept_narrower_than_they_multiply() -> None:
    """As bitsandbytes has it, they are rounded to the dtype of the weight first, for few rows and for many."""
    rows = replace(made(6, 64, torch.float16, quant_type="nf4"), dtype=torch.float32)
    whole = rows.whole()
    assert torch.equal(whole, whole.half().float())
    assert torch.equal(whole, torch.cat([wide.clone() for _, wide in rows.pieces()]))


def test_few_rows_and_double_precision_take_the_whole_weight() -> None:
    for count, dtype in ((3, torch.float32), (3, torch.bfloat16), (9, torch.float64)):
        rows = made(7, 48, dtype)
        x = torch.randn(count, 48, generator=torch.Generator().manual_seed(2)).to(dtype).requires_grad_()
        found = []
        for function in (packed_linear, packed_linear_ref):
            y = function(x, rows)
            found.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
        for ours, wanted in zip(*found, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-5)


def test_no_rows_at_all() -> None:
    """An expert to which no token goes."""
    for rows in (made(7, 48, torch.bfloat16), made(7, 48, torch.bfloat16, quant_type="nf4")):
        x = torch.zeros(2, 0, 48, dtype=torch.bfloat16, requires_grad=True)
        y = packed_linear(x, rows)
        assert y.shape == (2, 0, 7)
        y.sum().backward()


def test_packed_as_another_dtype_and_lying_otherwise() -> None:
    rows = made(6, 64, torch.bfloat16, quant_type="nf4")
    wanted = rows.whole()
    turned = rows.packed.view(torch.uint8).view(2, -1).t().contiguous().t()
    for codes in (rows.packed.view(1, -1), rows.packed.view(-1).view(torch.float32)[:, None], turned):
        other = replace(rows, packed=codes)
        assert torch.equal(other.whole(), wanted)
        assert torch.equal(torch.cat([wide.clone() for _, wide in other.pieces()]), wanted.float())


def test_where_it_is_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packed, "faster_wide_from", lambda *_: 32)
    asked = [in_pieces(torch.zeros(rows, 4), torch.bfloat16) for rows in (8, 31, 32)]
    assert asked == [False, False, True], "a few rows are faster with instructions"
    assert in_pieces(torch.zeros(8, 4), torch.float32)
    assert not in_pieces(torch.zeros(7, 4), torch.float32)
    assert not in_pieces(torch.zeros(8, 4, device="meta"), torch.float32)
