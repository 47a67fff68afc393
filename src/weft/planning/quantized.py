"""The shapes of a base whose linears are kept in 4 or 8 bits, before there is a weight to quantise."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from weft.models.int8 import without_rounded_inputs
from weft.models.quantize import Quantization
from weft.models.quantizers import empty_linears

Make = Callable[[Tensor], Tensor]
# Scales of this many blocks share one scale of their own, if there is double quantisation (Dettmers et al. 2023).
_SCALES_OF_A_BLOCK = 256


def swap_linears(model: nn.Module, kind: Quantization, dtype: torch.dtype) -> None:
    """Give a model on the meta device the linears that it will have, without weights.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    empty_linears(model, kind.config(dtype))


def empty_weights(model: nn.Module, make: Make) -> int:
    """Give the swapped linears tensors as ``make`` makes them, [...] like the meta tensors that it gets.

    Returns:
        The bytes of the scales.
    """
    scales = 0
    for module in model.modules():
        kind = type(module.__dict__.get("_parameters", {}).get("weight")).__name__
        if kind == "Params4bit":
            scales += _four_bits(module, make)
        elif kind == "Int8Params":
            scales += _eight_bits(module, make)
    without_rounded_inputs(model)
    return scales


def _meta(*shape: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.empty(shape, dtype=dtype, device="meta")


def _four_bits(module: Any, make: Make) -> int:
    from bitsandbytes.functional import QuantState

    weight, shape = module.weight, torch.Size((module.out_features, module.in_features))
    blocks = math.ceil(shape.numel() / weight.blocksize)
    tables = (make(_meta(16)), make(_meta(256)))
    if weight.compress_statistics:
        second = math.ceil(blocks / _SCALES_OF_A_BLOCK)
        state2 = QuantState(
            absmax=make(_meta(second)), blocksize=_SCALES_OF_A_BLOCK, code=tables[1], dtype=torch.float32
        )
        absmax, size = make(_meta(blocks, dtype=torch.uint8)), blocks + 4 * second
        nested: dict[str, Any] = {"offset": make(_meta()), "state2": state2}
    else:
        absmax, size, nested = make(_meta(blocks)), 4 * blocks, {}
    state = QuantState(
        absmax=absmax, shape=shape, code=tables[0], blocksize=weight.blocksize, quant_type=weight.quant_type,
        dtype=module.compute_dtype, **nested,
    )  # fmt: skip
    packed = math.ceil(shape.numel() / 2)
    own: Any = nn.Parameter(make(_meta(packed, 1, dtype=torch.uint8)), requires_grad=False)
    own.quant_state, own.quant_type, own.blocksize, own.bnb_quantized = state, weight.quant_type, weight.blocksize, True
    module._parameters["weight"], module.quant_state = own, state
    return size


def _eight_bits(module: Any, make: Make) -> int:
    shape = (module.out_features, module.in_features)
    own: Any = nn.Parameter(make(_meta(*shape, dtype=torch.int8)), requires_grad=False)
    own.CB, own.SCB, own.has_fp16_weights = None, None, False
    module.state.CB, module.state.SCB = own.data, make(_meta(shape[0]))
    module._parameters["weight"] = own
    return 4 * shape[0]
