"""What a layer of a method needs to be merged: the tensors of the module it sits on, and what it does to them."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor, nn

from weft.base.kinds import is_linear
from weft.methods.dense import dense_weight
from weft.ops.lowrank import low_rank_merged

# Matrices with more entries than this are worked out in single precision (a table of 150,000 tokens in double
# precision would take 5 GB a copy).
LARGE = 2**27


class MergedModule:
    """The tensors of one module of the base while a merge changes them.

    Attributes:
        weight: [out, in] of a linear, whatever its layout; [rows, d] of an embedding; [d] of a norm.
        bias: [out]; None where the module has none; ``add_bias`` makes one.
        base_weight: The weight in the base.
        base_bias: The bias in the base.
    """

    def __init__(self, module: nn.Module, dtype: torch.dtype) -> None:
        self.module, self.linear = module, is_linear(module)
        weight = dense_weight(module, dtype) if self.linear else module.get_parameter("weight").to(dtype)
        self.base_weight = weight.detach()
        bias = module._parameters.get("bias")
        self.base_bias = None if bias is None else bias.detach().to(dtype)
        self.weight, self.bias = self.base_weight, self.base_bias
        self._input_scale: Tensor | None = None

    def cast(self, tensor: Tensor) -> Tensor:
        """A tensor of the adapter, of any shape, in the precision of the merge."""
        return tensor.detach().to(self.weight)

    def put(self, weight: Tensor, bias: Tensor | None) -> None:
        """Take these for the module's weight and bias, in the shapes of ``weight`` and ``bias``."""
        self.weight, self.bias = weight, bias

    def add_low_rank(self, a: Tensor, b: Tensor, scaling: float) -> None:
        """Make the weight ``W + scaling b a``, of a [r, in] and b [out, r]."""
        self.weight = low_rank_merged(self.weight, self.cast(a), self.cast(b), scaling)

    def add_bias(self, change: Tensor) -> None:
        """Make the output ``y + change``, of change [out]."""
        change = self.cast(change)
        self.bias = change if self.bias is None else self.bias + change

    def scale_input(self, scale: Tensor) -> None:
        """Make the module ``f(scale * x)``, of scale [in]; all other changes see the scaled input."""
        scale = self.cast(scale)
        self._input_scale = scale if self._input_scale is None else self._input_scale * scale

    @property
    def folded_weight(self) -> Tensor:
        """The weight, in the shape of ``weight``, with the scale of the input in it."""
        return self.weight if self._input_scale is None else self.weight * self._input_scale

    def laid_out(self, tensor: Tensor) -> Tensor:
        """A matrix of the module's layout in that of ``weight``, or the other way round: Conv1D keeps [in, out]."""
        return tensor.t() if self.linear and not isinstance(self.module, nn.Linear) else tensor

    def _in_files(self, weight: Tensor) -> Tensor:
        """The weight in the layout of the base's own files: a quantised Conv1D runs as a linear, and is none there."""
        source = getattr(self.module, "source_cls", None)
        turned = isinstance(source, type) and not issubclass(source, nn.Linear)
        return weight.t() if turned else self.laid_out(weight)

    def tensors(self, weight_dtype: torch.dtype, bias_dtype: torch.dtype) -> dict[str, Tensor]:
        """The module's tensors in its own layout and shapes, rounded; on the CPU, because the base fills the GPU."""
        found = {"weight": self._in_files(self.folded_weight).to(weight_dtype).cpu().contiguous()}
        return found if self.bias is None else {**found, "bias": self.bias.to(bias_dtype).cpu().contiguous()}


@runtime_checkable
class Mergeable(Protocol):
    """A layer of an adapter whose effect can be written into the weights of the module it sits on."""

    def merge_into(self, merged: MergedModule) -> None:
        """Change ``merged`` so that the module with it gives the result of the module and this layer together."""


@runtime_checkable
class MergeableParameter(Protocol):
    """A layer of an adapter that changes one parameter of a module which is no linear, norm or embedding."""

    parameter: str

    def merged(self, weight: Tensor) -> Tensor:
        """The parameter with which the module computes, in weight's shape and dtype."""


@runtime_checkable
class MergedBlock(Protocol):
    """A block of an adapter's own that can become one of the model's."""

    def merged_tensors(self) -> Mapping[str, Tensor]:
        """Its state dict, in its own shapes and the base's dtypes."""
