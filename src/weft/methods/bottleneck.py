"""Bottleneck adapters (Houlsby et al. 2019; Pfeiffer et al. 2020): after a sub-layer, ``h + s · U f(D h + b) + c`` with
D [m, d], U [d, m] and m = d / reduction_factor. U and c begin at zero, so the adapter begins as the identity."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core.adapter import Adapter, SiteAdapter
from weft.core.config import BuildContext, MethodConfig
from weft.core.route import Segment, seeded_dropout
from weft.errors import UserError

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "swish": F.silu,
    "silu": F.silu,
    "tanh": torch.tanh,
}


class BottleneckConfig(MethodConfig):
    """AdapterHub's names. ``mh_adapter``: after attention; ``output_adapter``: after the MLP (both: Houlsby; the MLP
    alone: Pfeiffer)."""

    method: ClassVar[str] = "bottleneck"
    peft_type: ClassVar[str] = "BOTTLENECK"
    default_learning_rate: ClassVar[float] = 2e-4

    mh_adapter: bool = True
    output_adapter: bool = True
    reduction_factor: float = Field(default=16, gt=0)
    non_linearity: Literal["relu", "gelu", "swish", "silu", "tanh"] = "swish"
    scaling: float = 1.0
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    leave_out: list[int] = []

    def build(self, name: str, context: BuildContext) -> Adapter:
        return Bottleneck(self, name, context)


class BottleneckLayer(nn.Module):
    """Down, non-linearity, up, added to what the sub-layer gave."""

    def __init__(self, config: BottleneckConfig, path: str, context: BuildContext) -> None:
        super().__init__()
        d = context.architecture.hidden_size
        m = max(1, int(d / config.reduction_factor))
        self.path, self.config = path, config
        self.down_weight = nn.Parameter(context.normal(m, d, std=1 / math.sqrt(d)))
        self.down_bias = nn.Parameter(context.zeros(m))
        self.up_weight = nn.Parameter(context.zeros(d, m))
        self.up_bias = nn.Parameter(context.zeros(d))

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        dtype = y.dtype
        h = F.linear(y, self.down_weight.to(dtype), self.down_bias.to(dtype))
        h = _ACTIVATIONS[self.config.non_linearity](h)
        h = seeded_dropout(h, self.config.dropout, segment, self.path)
        h = F.linear(h, self.up_weight.to(dtype), self.up_bias.to(dtype))
        return y + (h if self.config.scaling == 1.0 else h * self.config.scaling)


class Bottleneck(SiteAdapter):
    """A bottleneck after the attention and MLP sub-layers."""

    def __init__(self, config: BottleneckConfig, name: str, context: BuildContext) -> None:
        shape = context.architecture
        wrong = [i for i in config.leave_out if not 0 <= i < shape.num_layers]
        if wrong:
            raise UserError(f"bottleneck: leave_out {wrong}: this model's layers are 0 to {shape.num_layers - 1}.")
        skipped = tuple(f"{shape.blocks[i]}." for i in config.leave_out)
        places = [*shape.attention_output * config.mh_adapter, *shape.mlp_output * config.output_adapter]
        places = [path for path in places if not (skipped and path.startswith(skipped))]
        if not places:
            raise UserError(
                "bottleneck finds nothing to tune: mh_adapter and output_adapter are both off, every layer is in "
                f"leave_out, or the sub-layers of this {shape.model_type} model were not recognised."
            )
        super().__init__(config, name, {path: BottleneckLayer(config, path, context) for path in places})

    def stored_name(self, part: str) -> str:
        return "adapter_" + part.replace("_", ".")
