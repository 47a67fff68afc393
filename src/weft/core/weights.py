"""Site functions that give an adapter base weights of its own, while the base's stay as they are.

``WeightDelta`` holds the change of a module's tensors (full fine-tuning), ``OwnWeights`` whole tensors that take the
place of the base's (``modules_to_save``, layer-norm tuning: PEFT's files hold them whole, and only a whole tensor
survives saving to the bit).
"""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.core.architecture import is_linear, is_norm
from weft.core.config import BuildContext
from weft.core.route import Segment
from weft.core.site import _SITE, plain_class
from weft.errors import UserError


def weight_parts(module: nn.Module, path: str) -> tuple[str, ...]:
    """The names of a module's own trainable tensors: ``weight``, ``bias``.

    Raises:
        UserError: it is no linear, norm or embedding, so what its tensors do is not known.
    """
    parts = tuple(name for name, p in module.named_parameters(recurse=False) if p is not None)
    known = is_linear(module) or is_norm(module) or isinstance(module, nn.Embedding)
    if not known or not set(parts) <= {"weight", "bias"}:
        raise UserError(
            f"module '{path}' ({plain_class(module).__name__}) holds {', '.join(parts) or 'no tensors'}; weights can "
            "be given to linear, norm and embedding modules only."
        )
    if any(not p.dtype.is_floating_point for p in module.parameters(recurse=False)):
        raise UserError(f"module '{path}' is quantised; its weights cannot be trained. Load the base in bf16 or fp32.")
    return parts


class _Shell:
    """Runs a base module's own forward with other tensors in it; the module itself is not touched."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor, tensors: Mapping[str, Tensor]) -> Tensor:
        shell = copy.copy(self.module)
        shell.__dict__.pop(_SITE, None)
        shell.__dict__["_parameters"] = {**self.module._parameters, **tensors}
        shell.__class__ = plain_class(self.module)
        return shell(x)


class WeightDelta(nn.Module):
    """``y = f(x; W + ΔW, b + Δb)`` with the changes in the adapter's own dtype; they begin at zero."""

    def __init__(self, module: nn.Module, parts: Sequence[str], context: BuildContext) -> None:
        super().__init__()
        self.__dict__["base"] = module  # not a submodule: its tensors are not the adapter's
        for part in ("weight", "bias"):
            shape = module.get_parameter(part).shape if part in parts else None
            delta = nn.Parameter(context.zeros(*shape)) if shape is not None else None
            self.register_parameter(f"{part}_delta", delta)

    weight_delta: Tensor | None
    bias_delta: Tensor | None

    @property
    def replaces_output(self) -> bool:
        """Whether what the module gave plays no part: another method's change must come after."""
        return is_norm(self.base)  # type: ignore[arg-type]

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        base: Any = self.base
        if is_norm(base):
            # In the delta's precision: added to a bf16 weight, small changes would be rounded away.
            wide = {
                part.removesuffix("_delta"): base.get_parameter(part.removesuffix("_delta")).to(delta.dtype) + delta
                for part, delta in self._parameters.items()
                if delta is not None
            }
            return _Shell(base)(x.to(next(iter(wide.values())).dtype), wide).to(y.dtype)
        if self.weight_delta is not None:
            weight = self.weight_delta.to(y.dtype)
            if isinstance(base, nn.Embedding):
                scale = getattr(base, "embed_scale", None)
                change = F.embedding(x + getattr(base, "offset", 0), weight)
                y = y + (change if scale is None else change * scale)
            elif isinstance(base, nn.Linear):
                y = y + F.linear(x, weight)
            else:
                y = y + x @ weight
        return y if self.bias_delta is None else y + self.bias_delta.to(y.dtype)


class OwnWeights(nn.Module):
    """``y = f(x; W', b')`` with W' (and b') whole, in the adapter's own dtype; they begin as the base's."""

    def __init__(self, module: nn.Module, parts: Sequence[str], context: BuildContext) -> None:
        super().__init__()
        self.__dict__["base"] = module
        for part in parts:
            base = module.get_parameter(part).detach()
            value = torch.empty(base.shape, dtype=context.dtype, device=context.device) if context.blank else base
            self.register_parameter(part, nn.Parameter(value.to(context.device, context.dtype, copy=True)))

    @property
    def replaces_output(self) -> bool:
        """As in ``WeightDelta``."""
        return set(self._parameters) != {"bias"}

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        base: Any = self.base
        if set(self._parameters) == {"bias"}:
            bias = self.get_parameter("bias")
            return y + (bias - base.bias.to(bias.dtype)).to(y.dtype)
        own = {part: value.to(base.get_parameter(part).dtype) for part, value in self.named_parameters()}
        return _Shell(base)(x, own).to(y.dtype)


def modules_named(model: nn.Module, names: Sequence[str], key: str) -> dict[str, nn.Module]:
    """Modules whose path ends with one of ``names``, as PEFT's ``modules_to_save`` matches; a path for each.

    Raises:
        UserError: a name matches no module.
    """
    paths = {path: module for path, module in model.named_modules() if path}
    found: dict[str, nn.Module] = {}
    for name in names:
        own = {p: m for p, m in paths.items() if p == name or p.endswith(f".{name}")}
        if not own:
            last = sorted(
                {p.rsplit(".", 1)[-1] for p, m in paths.items() if next(m.parameters(False), None) is not None}
            )
            raise UserError(f"{key}: {name!r} matches no module of this model; there are: {', '.join(last)}.")
        found |= own
    return found
