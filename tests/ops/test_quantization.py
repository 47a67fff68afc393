"""The plain quantisations beside bitsandbytes': tables, codes, packed bytes, scales, and products in eight bits."""

from __future__ import annotations

import threading
from typing import Any

import pytest
import torch
from tests import kit
from torch import Tensor

from weft.ops import four_bit
from weft.ops.four_bit import quantize_weight
from weft.ops.parallel import one_thread_each
from weft.ops.quantization import (
    NestedScales,
    bits_of_scales,
    dequantize_blocks,
    dequantize_rows,
    dynamic_levels,
    float_levels,
    levels_of,
    llm_int8_ref,
    normal_float_levels,
    outlier_columns,
    pack_four_bits,
    quantize_blocks,
    quantize_rows,
    unpack_four_bits,
)

pytest.importorskip("bitsandbytes")


def drawn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def zeros_inside() -> Tensor:
    x = drawn(7, 64)
    x[2:4] = 0
    x[6] = 0
    return x


WEIGHTS = {
    "whole blocks": drawn(48, 64),
    "many blocks": drawn(300, 320),
    "blocks of zeros": zeros_inside(),
    "all zeros": torch.zeros(3, 50),
    "an odd number": drawn(5, 7),
    "a short last block": drawn(3, 50),
    "one element": torch.tensor([[-2.5]]),
    "tiny and large": drawn(8, 64) * torch.logspace(-30, 30, 8)[:, None],
}


def test_the_tables_are_those_of_bitsandbytes() -> None:
    from bitsandbytes.functional import create_dynamic_map, get_4bit_type

    assert torch.equal(normal_float_levels(), get_4bit_type("nf4", device="cpu"))
    assert torch.equal(float_levels(), get_4bit_type("fp4", device="cpu"))
    assert torch.equal(dynamic_levels(), create_dynamic_map())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
@pytest.mark.parametrize("what", WEIGHTS)
def test_four_bits(what: str, kind: Any, dtype: torch.dtype) -> None:
    from bitsandbytes.backends.default import ops
    from bitsandbytes.functional import dequantize_4bit, quantize_4bit

    if not hasattr(ops, "_get_4bit_quantize_bounds"):
        pytest.skip("a bitsandbytes of before 0.50 decides between two near levels otherwise")
    if what == "tiny and large" and dtype == torch.float16:
        pytest.skip("fp16 does not have these numbers")
    weight = WEIGHTS[what].to(dtype)
    for block in (64, 128):
        codes, scales = quantize_blocks(weight, levels_of(kind), block)
        packed, state = quantize_4bit(weight, blocksize=block, quant_type=kind)
        assert torch.equal(pack_four_bits(codes, levels_of(kind)), packed.view(-1))
        assert torch.equal(unpack_four_bits(packed, weight.numel()), codes)
        torch.testing.assert_close(scales, state.absmax, rtol=0, atol=1e-37)
        # Read with an even number in a row: for an odd one it would compile its function first.
        state.dtype, state.shape = torch.float32, torch.Size((1, 2 * packed.numel()))
        wanted = dequantize_4bit(packed, state).view(-1)[: weight.numel()]
        found = dequantize_blocks(codes, scales, levels_of(kind), block)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)

        nested = NestedScales.of(scales)
        _, state = quantize_4bit(weight, blocksize=block, quant_type=kind, compress_statistics=True)
        assert torch.equal(nested.codes, state.absmax)
        torch.testing.assert_close(nested.scales, state.state2.absmax, rtol=1e-6, atol=1e-37)
        torch.testing.assert_close(nested.mean, state.offset, rtol=1e-6, atol=1e-37)
        state.dtype, state.shape = torch.float32, torch.Size((1, 2 * packed.numel()))
        wanted = dequantize_4bit(packed, state).view(-1)[: weight.numel()]
        found = dequantize_blocks(codes, nested.numbers(), levels_of(kind), block)
        torch.testing.assert_close(found, wanted, rtol=1e-6, atol=1e-6)


def near_the_bounds(kind: Any) -> Tensor:
    """Blocks with a largest number of one, so that the others are shares: the bounds between levels, their neighbours
    in fp32, and the two ends of every step of 2^-15."""
    levels = levels_of(kind).sort().values
    bounds = (levels[:-1] + levels[1:]) / 2
    beside = [bounds, *(torch.nextafter(bounds, torch.tensor(end)) for end in (-1.0, 1.0))]
    steps = (torch.arange(-(1 << 15), 1 << 15) + 0.5) / (1 << 15)
    shares = torch.cat([*beside, steps, torch.nextafter(steps, torch.tensor(1.0)), torch.zeros(1), -torch.zeros(1)])
    padded = torch.cat([shares, torch.zeros(-len(shares) % 63)]).view(-1, 63)
    return torch.cat([torch.ones(len(padded), 1), padded], 1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["nf4", "fp4"])
def test_the_fast_four_bits(kind: Any, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Beside the plain reference and bitsandbytes, whole and cut into parts for two threads."""
    from bitsandbytes.backends.default import ops
    from bitsandbytes.functional import quantize_4bit

    same = hasattr(ops, "_get_4bit_quantize_bounds")  # since 0.50
    for what, weight in {**WEIGHTS, "near the bounds": near_the_bounds(kind)}.items():
        if what == "tiny and large" and dtype == torch.float16:
            continue
        for block in (32, 64, 256):
            for at_once in (1 << 20, 3 * 64):
                monkeypatch.setattr(four_bit, "_AT_ONCE", at_once if weight.numel() < 50_000 else 1 << 15)
                found = four_bit.quantize_four_bits(weight.to(dtype), kind, block)
                assert found is not None
                plain = four_bit.quantize_four_bits_ref(weight.to(dtype), kind, block)
                assert all(map(torch.equal, found, plain)), (what, block, at_once)
        packed, state = quantize_weight(weight.to(dtype), kind)
        wanted, known = quantize_4bit(weight.to(dtype), quant_type=kind, compress_statistics=True, blocksize=64)
        assert (packed.dtype, packed.shape, state.dtype, state.shape) == (
            wanted.dtype, wanted.shape, known.dtype, known.shape,
        )  # fmt: skip
        parts, own = state.as_dict(packed=True), known.as_dict(packed=True)
        assert parts.keys() == own.keys()
        if same:
            assert torch.equal(packed, wanted), what
            assert all(torch.equal(parts[key], own[key]) for key in parts), what


def test_four_bits_of_wider_numbers() -> None:
    weight = drawn(2, 64).double()
    found = four_bit.quantize_four_bits(weight, "nf4", 64)
    assert found is not None
    assert all(map(torch.equal, found, four_bit.quantize_four_bits_ref(weight.float(), "nf4", 64)))
    assert not four_bit._ROOMS, "nothing was read from a file"


def test_four_bits_of_numbers_that_are_not_finite() -> None:
    from bitsandbytes.functional import quantize_4bit

    for number in (float("nan"), float("inf")):
        weight = drawn(4, 64)
        weight[2, 3] = number
        assert four_bit.quantize_four_bits(weight, "nf4", 64) is None
        packed, _ = quantize_weight(weight, "nf4")
        assert torch.equal(packed, quantize_4bit(weight, quant_type="nf4", compress_statistics=True, blocksize=64)[0])


def test_threads_of_torch_are_as_they_were() -> None:
    before, seen = torch.get_num_threads(), []
    torch.set_num_threads(2)
    try:
        one_thread_each(lambda parts: seen.append((parts, torch.get_num_threads())), list(range(5)))
        assert sorted(seen) == [([0, 2, 4], 1), ([1, 3], 1)]
        with pytest.raises(ZeroDivisionError):
            one_thread_each(lambda parts: 1 / parts[0], [0, 1, 2])
        assert torch.get_num_threads() == 2
        later: list[int] = []
        thread = threading.Thread(target=lambda: later.append((drawn(3) + 1, torch.get_num_threads())[1]))
        thread.start()
        thread.join()
        assert later == [2]
    finally:
        torch.set_num_threads(before)


def test_the_bits_of_scales() -> None:
    assert bits_of_scales(64, nested=False) == 0.5
    assert round(bits_of_scales(64, nested=True), 3) == 0.127
    scales = quantize_blocks(drawn(64, 256), normal_float_levels(), 64)[1]
    nested = NestedScales.of(scales)
    bits = 8 * (nested.codes.nbytes + nested.scales.nbytes) / (64 * 256)
    assert bits == bits_of_scales(64, nested=True)
    # The error of a level is half of the distance to the next: the 8-bit map's largest is 0.9 / 64 of the scale.
    assert float((nested.numbers() - scales).abs().max() / (scales - scales.mean()).abs().max()) <= 0.9 / 64


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("what", [what for what in WEIGHTS if what != "tiny and large"])
def test_eight_bits(what: str, dtype: torch.dtype) -> None:
    from bitsandbytes.functional import int8_vectorwise_dequant, int8_vectorwise_quant

    weight = WEIGHTS[what].to(dtype)
    codes, scales = quantize_rows(weight.half())
    wanted = int8_vectorwise_quant(weight.half())
    assert torch.equal(codes, wanted[0])
    assert torch.equal(scales, wanted[1])
    found = int8_vectorwise_dequant(codes, scales)
    torch.testing.assert_close(dequantize_rows(codes, scales), found, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("outliers", [(), (3,), (0, 17, 63)], ids=str)
def test_products_with_outlier_columns(outliers: tuple[int, ...], dtype: torch.dtype) -> None:
    """bitsandbytes' own product without gradients."""
    import bitsandbytes

    linear = bitsandbytes.nn.Linear8bitLt(64, 10, has_fp16_weights=False, threshold=6.0)
    linear = linear.to("cpu").eval()
    x, bias = drawn(9, 64, seed=1).clamp(-5, 5), linear.bias.detach().to(dtype)
    x[2, list(outliers)] = 20.0
    x[5] = 0
    x = x.to(dtype)
    assert outlier_columns(x).tolist() == list(outliers)
    with torch.no_grad():
        wanted = linear(x)
    found = llm_int8_ref(x, linear.weight.data, linear.state.SCB, bias)
    assert found.dtype == dtype
    # Each part is rounded once; its 1 / 127^2 has a digit too few, and is larger by 1.8e-5 of it.
    limit = (4 * torch.finfo(dtype).eps + 2e-5) * max(1.0, float(wanted.abs().max()))
    kit.measured("product", float((found.double() - wanted.double()).abs().max()), limit, derived=True)
    plain = x.float() @ dequantize_rows(linear.weight.data, linear.state.SCB).t() + bias.float()
    assert float((found.float() - plain).abs().max()) < 0.05 * float(plain.abs().max())
