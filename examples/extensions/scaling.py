"""A method: the output of every linear layer is scaled, element by element, by a learned vector.

``y' = y * (1 + s)`` with s = 0 at the beginning: a cousin of (IA)3 (Liu et al. 2022).

    weft train --extension scaling.py --model tiny-llama --data train.jsonl --method scaling
"""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

import weft
from weft.base.kinds import linear_shape
from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.route import Segment
from weft.methods.mergeable import MergedModule
from weft.methods.site_adapter import SiteAdapter


class Scale(nn.Module):
    """The vector s [out] of one linear layer."""

    def __init__(self, linear: nn.Module, context: BuildContext) -> None:
        super().__init__()
        _, outputs = linear_shape(linear)
        self.scale = nn.Parameter(context.zeros(outputs))

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """The new output [rows, out]; x [rows, in] goes into the layer, y [rows, out] comes out of it."""
        return (y * (1 + self.scale)).to(y.dtype)

    def merge_into(self, merged: MergedModule) -> None:
        """Write the effect into the layer's own weights; a method without this cannot be merged."""
        factor = 1 + merged.cast(self.scale)
        merged.weight = factor[:, None] * merged.weight
        merged.bias = None if merged.bias is None else factor * merged.bias


@weft.register_method("scaling")
class ScalingConfig(MethodConfig):
    """The settings of the method; each is a key of a job."""

    default_learning_rate: ClassVar[float] = 3e-2

    target_modules: str | list[str] = "all-linear"

    def build(self, name: str, context: BuildContext) -> Adapter:
        """Make a new adapter."""
        paths = context.architecture.match(self.target_modules)
        return SiteAdapter(self, name, {path: Scale(context.model.get_submodule(path), context) for path in paths})
