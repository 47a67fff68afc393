"""Experts that are held as parameters, which methods on linear modules do not reach."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from torch import nn

from weft.base.kinds import holds_experts
from weft.core.adapter import Adapter
from weft.core.architecture import Architecture
from weft.methods.dense import kind_of


@dataclass(frozen=True)
class Omission:
    """Parameters of the base that an adapter on linears leaves as they are.

    Attributes:
        methods: The adapter's methods that work on linears.
        names: The parameters, as their blocks name them.
        share: Their share of all the base's parameters.
        to_include: The ``target_parameters`` of lora that would include them; empty: no setting can.
    """

    methods: tuple[str, ...]
    names: tuple[str, ...]
    share: float
    to_include: tuple[str, ...]

    def __str__(self) -> str:
        what = "+".join(self.methods)
        told = (
            f"method {what} leaves {' and '.join(self.names)} as they are, {self.share:.1%} of the base's parameters: "
            "experts that are held as parameters are no linear modules. "
        )
        if not self.to_include:
            return f"{told}They cannot be adapted one by one."
        key = f"target_parameters: [{', '.join(self.to_include)}]"
        return f"{told}To adapt them too, set {key}" + ("." if "lora" in self.methods else " of method lora.")

    def json(self) -> dict[str, object]:
        """The names, the share and the remedy as JSON."""
        return {"names": list(self.names), "share": self.share, "target_parameters": list(self.to_include)}


def left_out(adapter: Adapter, model: nn.Module, architecture: Architecture) -> Omission | None:
    """What an adapter on linears does not reach of the experts; None: nothing, or it is none of these methods."""
    methods = tuple(part.config.method for part in adapter.parts if hasattr(part.config, "target_modules"))
    reached = {(path, name) for path, found in adapter.parameter_sites().items() for name in found}
    names: dict[str, bool] = {}
    missed = 0
    for block in architecture.blocks if methods else ():
        for path, module in model.get_submodule(block).named_modules(prefix=block):
            if not holds_experts(path, module):
                continue
            for name, parameter in module.named_parameters(recurse=False):
                if (path, name) not in reached and parameter.dim() > 1 and not name.endswith("bias"):
                    names[f"{path.removeprefix(block + '.')}.{name}"] = path in architecture.experts
                    missed += _size(parameter)
    if not names:
        return None
    share = missed / sum(map(_size, model.parameters()))
    return Omission(methods, tuple(names), share, tuple(name for name, can in names.items() if can))


def unquantized(model: nn.Module, architecture: Architecture) -> str | None:
    """A message about a quantised base whose experts are not quantised; None for any other base."""
    quantized = any(kind_of(p) for p in model.parameters())
    own = [p for path in architecture.experts for p in model.get_submodule(path).parameters(recurse=False)]
    if not (quantized and own):
        return None
    share = sum(map(_size, own)) / sum(map(_size, model.parameters()))
    kind = str(own[0].dtype).removeprefix("torch.")
    return (
        f"quantization leaves the experts in {kind}, {share:.1%} of the base's parameters: they are no linear modules."
    )


def _size(parameter: Any) -> int:
    """The number of entries; 4-bit ones lie two in a byte."""
    state = getattr(parameter, "quant_state", None)
    return parameter.numel() if state is None else math.prod(state.shape)
