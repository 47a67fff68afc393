"""The plain quantisations beside bitsandbytes': tables, codes, packed bytes, scales, and products in eight bits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import kit
from torch import Tensor

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
