"""The weights of linear modules as plain matrices, whatever quantisation keeps them."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from weft.base.kinds import is_linear
from weft.base.packed import PackedLinear
from weft.core.site import replace_class
from weft.ops.four_bit import dequantize_weight


def dense_weight(module: nn.Module, dtype: torch.dtype) -> Tensor:
    """The weight of a linear module as [out, in] in ``dtype``, dequantised if it is kept so."""
    weight: Any = module.weight
    kind = kind_of(weight)
    if kind == "int8":
        state: Any = module.state
        # bitsandbytes moves the scales from the weight to the module when it first runs.
        scale = weight.SCB if weight.SCB is not None else state.SCB
        return weight.data.to(dtype) * (scale.to(dtype) / 127)[:, None]
    if kind:
        return _dequantized(weight).to(dtype)
    dense: Tensor = weight.detach().to(dtype)
    return dense if isinstance(module, nn.Linear) else dense.t()


@torch.no_grad()
def dequantize_linears(model: nn.Module, dtype: torch.dtype) -> None:
    """Make every quantised linear of a model that is not needed any more a plain one, of its dequantised weight."""
    for module in model.modules():
        if isinstance(module, PackedLinear):
            module.make_plain(dtype)
            replace_class(module, nn.Linear)
        elif is_linear(module) and kind_of(module.weight):
            module._parameters["weight"] = nn.Parameter(dense_weight(module, dtype), requires_grad=False)
            replace_class(module, nn.Linear)


def kind_of(weight: object) -> str | None:
    """How bitsandbytes keeps a weight: ``nf4``, ``fp4`` or ``int8``; None: it is plain."""
    if hasattr(weight, "quant_type"):
        return str(weight.quant_type)
    return "int8" if hasattr(weight, "SCB") else None


# The entries of ``how_kept``. Those of four bits are left out where they are as usual.
KEPT = ("dtype", "quantization", "double_quantization", "quantization_block_size", "quantization_dtype")


def how_kept(model: nn.Module, dtype: torch.dtype) -> dict[str, object]:
    """What a merge has to know of the base of a training: ``dtype`` and ``quantization`` (nf4, fp4, int8, gptq,
    awq, or None).

    Of four bits also ``double_quantization``, ``quantization_block_size`` and ``quantization_dtype``, as a run's
    configuration has them, unless they are as usual.
    """
    name = str(dtype).removeprefix("torch.")
    kinds = {kind for parameter in model.parameters() if (kind := kind_of(parameter))}
    kinds |= {module.kind for module in model.modules() if isinstance(module, PackedLinear)}
    found: dict[str, object] = {"dtype": name, "quantization": min(kinds, default=None)}
    for module in model.modules():
        state = getattr(module._parameters.get("weight"), "quant_state", None)
        if state is not None:
            computes = str(getattr(module, "compute_dtype", None) or dtype).removeprefix("torch.")
            found |= {} if state.nested else {"double_quantization": False}
            found |= {} if state.blocksize == 64 else {"quantization_block_size": state.blocksize}
            found |= {} if computes == name else {"quantization_dtype": computes}
    return found


def _dequantized(weight: Any) -> Tensor:
    from bitsandbytes import functional

    data, state = weight.data, copy.copy(weight.quant_state)
    if getattr(state, "packing_format_for_cpu", False):
        # On CPUs with AVX512-BF16, bitsandbytes repacks a weight when it first runs without gradients.
        state.original_nested = False
        data, state = functional._convert_weight_packed_for_cpu_inverse(data, state)
        state.absmax = state.absmax.t().reshape(-1).float()
    return dequantize_weight(data, state)
