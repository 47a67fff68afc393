"""Linears of an int8 base on a CPU: one way to compute them, whoever asks.

With gradients in training mode, bitsandbytes multiplies by the dequantised weight on a CPU. In evaluation mode it does
LLM.int8: it rounds the rows to 127 steps, except in features where any row of the batch has an outlier. So the answer
to a row depends on its neighbours, and a token alone gets another one than within its text. Here the weight is
dequantised, always: inputs are not rounded, and rows do not depend on each other.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from weft.base.mixin import Mixin, mixed
from weft.core.site import replace_class
from weft.ops.packed import EightBitRows, packed_linear


class _WeightOnly(Mixin):
    """bitsandbytes' Linear8bitLt."""

    weight: Any
    bias: Tensor | None
    state: Any

    def forward(self, x: Tensor) -> Tensor:
        # bitsandbytes moves the scales from the weight to the module when it first runs.
        scales = self.weight.SCB if self.weight.SCB is not None else self.state.SCB
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return packed_linear(x, EightBitRows(self.weight.data, scales, x.dtype), bias)


def without_rounded_inputs(model: nn.Module) -> None:
    """Let the int8 linears of a model that lie on a CPU multiply by their dequantised weights."""
    for module in model.modules():
        weight: Any = module._parameters.get("weight")
        if type(module).__name__ == "Linear8bitLt" and weight.dtype == torch.int8 and weight.device.type == "cpu":
            replace_class(module, mixed("WeightOnly", _WeightOnly, type(module)))
