"""A base's linears in 16 bits, on a CPU that is slow in them: they multiply through ``weft.ops.products``."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from weft.base.mixin import Mixin, mixed
from weft.core.route import Router
from weft.core.site import plain_class, replace_class
from weft.ops.four_bit import FourBitRows
from weft.ops.packed import packed_linear
from weft.ops.products import in_pieces, linear, product
from weft.ops.sixteen_bits import faster_wide_from


class _PiecewiseLinear(Mixin):
    weight: Tensor
    bias: Tensor | None

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class _PiecewiseConv1D(Mixin):
    weight: Tensor
    bias: Tensor

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        return product(x, self.weight) + self.bias if in_pieces(rows, self.weight) else super().forward(x)


class _PiecewiseFourBit(Mixin):
    """bitsandbytes' Linear4bit."""

    weight: Any
    bias: Tensor | None
    compute_dtype: torch.dtype | None

    def forward(self, x: Tensor) -> Tensor:
        rows = self.rows(x)
        if rows is None:
            return super().forward(x)
        bias = None if self.bias is None else self.bias.to(rows.dtype)
        return packed_linear(x.to(rows.dtype), rows, bias).to(x.dtype)

    def rows(self, x: Tensor) -> FourBitRows | None:
        """The rows of the weight, to multiply x [..., in]; None: that is left to bitsandbytes."""
        state = self.weight.quant_state
        fits = x.device.type == "cpu" and state is not None and state.shape[1] == x.shape[-1]
        if not fits or getattr(state, "packing_format_for_cpu", False):
            return None
        return FourBitRows(self.weight.data, state, self.compute_dtype or x.dtype)


_MIXINS: dict[type[nn.Module], type] = {nn.Linear: _PiecewiseLinear, Conv1D: _PiecewiseConv1D}
# Linears that compute what nn.Linear does. Both have its name, by which modules are known.
PLAIN_LINEARS: tuple[type[nn.Module], ...] = (nn.Linear, mixed("", _PiecewiseLinear, nn.Linear))


def frozen_weight(module: nn.Module, kind: type[nn.Module], x: Tensor) -> Tensor | FourBitRows | None:
    """The weight [out, in] of a linear of class ``kind`` that computes x W^T + b of x [..., in] and no more, frozen.

    None: it is none, or it is trained, or it multiplies in another dtype.
    """
    bias = module._parameters.get("bias")
    if bias is not None and bias.requires_grad:
        return None
    if issubclass(kind, _PiecewiseFourBit):
        rows = cast(_PiecewiseFourBit, module).rows(x)
        return rows if rows is not None and rows.dtype == x.dtype else None
    weight = module._parameters["weight"] if kind in PLAIN_LINEARS else None
    return None if weight is None or weight.requires_grad else weight


def install_products(model: nn.Module, router: Router, device: torch.device | None = None) -> Callable[[], None]:
    """Swap the classes of linears in whose dtype a device multiplies slowly, and of those in 4 bits; returns what
    undoes it.

    ``device``: where the weights will be; None: where they are.
    """

    def mixin_of(module: nn.Module) -> type | None:
        mixin = _MIXINS.get(plain_class(module))
        if mixin is None:
            return None
        weight = module.get_parameter("weight")
        return mixin if faster_wide_from(device or weight.device, weight.dtype) < math.inf else None

    undo_plain, undo_four_bits = _swap(model, mixin_of), swap_four_bits(model)

    def undo() -> None:
        undo_four_bits()
        undo_plain()

    return undo


def swap_four_bits(model: nn.Module) -> Callable[[], None]:
    """Swap the classes of the linears that bitsandbytes keeps in 4 bits; returns what undoes it."""

    def mixin_of(module: nn.Module) -> type | None:
        own = plain_class(module)
        theirs = own.__name__ == "Linear4bit" and own.__module__.startswith("bitsandbytes.")
        return _PiecewiseFourBit if theirs else None

    return _swap(model, mixin_of)


def _swap(model: nn.Module, mixin_of: Callable[[nn.Module], type | None]) -> Callable[[], None]:
    swapped = []
    for module in model.modules():
        mixin = None if "forward" in module.__dict__ else mixin_of(module)
        if mixin is not None:
            own = plain_class(module)
            swapped.append((module, own))
            replace_class(module, mixed("", mixin, own))

    def undo() -> None:
        for module, own in swapped:
            replace_class(module, own)

    return undo
