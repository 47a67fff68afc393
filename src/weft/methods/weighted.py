"""The weighted sum of several adapters' changes, to be merged in one go: ``f(x) = W x + sum_i w_i (f_i(x) - W x)``.

Each adapter changes the base's own weights, and none sees what the others do: unlike a stack, where one acts on the
result of the other, and unlike a combination, which averages the factors of a low rank. What acts at a module is the
same with the modules' functions (for the proof) and with their weights (for the merge).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import cast

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter, InputFunction, SiteFunction
from weft.core.route import Segment
from weft.core.site import plain_class
from weft.errors import UserError
from weft.methods.combined import CombinedConfig
from weft.methods.mergeable import Mergeable, MergedModule


class WeightedSum(Adapter):
    """Adapters with a weight each, over ``model``. It is run and merged, and neither trained nor saved.

    Raises:
        UserError: An adapter does what no weighted sum of weights can be.
    """

    def __init__(self, name: str, parts: Sequence[Adapter], weights: Sequence[float], model: nn.Module) -> None:
        super().__init__(CombinedConfig(parts=tuple(part.config for part in parts)), name)
        self.part_modules = nn.ModuleList(parts)
        self.weights = tuple(weights)
        for part in parts:
            if reason := _obstacle(part):
                raise UserError(f"adapter '{part.name}' ({part.config.method}) has no weight in a sum: {reason}.")
        self._module = model.get_submodule

    @property
    def parts(self) -> Sequence[Adapter]:
        return tuple(cast(Sequence[Adapter], self.part_modules))

    def sites(self) -> Mapping[str, SiteFunction]:
        found: dict[str, list[tuple[float, SiteFunction]]] = {}
        for weight, part in zip(self.weights, self.parts, strict=True):
            inputs, outputs = part.input_sites(), part.sites()
            for path in dict.fromkeys((*inputs, *outputs)):
                function = _alone(self._module(path), inputs.get(path), outputs.get(path))
                found.setdefault(path, []).append((weight, function))
        return {path: _sum(functions) for path, functions in found.items()}

    def merges(self) -> Mapping[str, Sequence[nn.Module]]:
        found: dict[str, list[tuple[float, Sequence[nn.Module]]]] = {}
        for weight, part in zip(self.weights, self.parts, strict=True):
            for path, layers in part.merges().items():
                found.setdefault(path, []).append((weight, layers))
        return {path: [WeightedChanges(changes)] for path, changes in found.items()}


def _obstacle(part: Adapter) -> str:
    """Why an adapter cannot be one of a sum; empty if it can. Whether it can be merged at all is the merge's affair."""
    if part.head.labels:
        return "it has a classification head, and heads trained apart cannot be added"
    if part.inserted_blocks():
        return "it inserts blocks, which are no change of the base's weights"
    return "it changes parameters of experts" if part.parameter_sites() else ""


def _alone(module: nn.Module, prepare: InputFunction | None, change: SiteFunction | None) -> SiteFunction:
    """What one adapter alone makes of the module's output."""

    def run(x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        if prepare is not None:
            # The others must not see the input that this one changes, so the module itself runs once more.
            x = prepare(x, segment)
            y = plain_class(module).forward(module, x)
        return y if change is None else change(x, y, segment)

    return run


def _sum(found: Sequence[tuple[float, SiteFunction]]) -> SiteFunction:
    def run(x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        return y + torch.stack([weight * (function(x, y, segment) - y) for weight, function in found]).sum(0)

    return run


class WeightedChanges(nn.Module):
    """What adapters do to one module's weights, each to the base's own, with a weight each."""

    def __init__(self, changes: Sequence[tuple[float, Sequence[nn.Module]]]) -> None:
        super().__init__()
        self.weights = [weight for weight, _ in changes]
        self.layers = nn.ModuleList(nn.ModuleList(layers) for _, layers in changes)

    def merge_into(self, merged: MergedModule) -> None:
        """Add the weighted changes to the module's tensors."""
        weight, bias = merged.weight, merged.bias
        for share, layers in zip(self.weights, self.layers, strict=True):
            alone = MergedModule(merged.module, merged.weight.dtype)
            for layer in cast(Sequence[Mergeable], layers):
                layer.merge_into(alone)
            weight = weight + share * (alone.folded_weight - alone.base_weight)
            if alone.bias is not None:
                before = torch.zeros_like(alone.bias) if alone.base_bias is None else alone.base_bias
                bias = (before if bias is None else bias) + share * (alone.bias - before)
        merged.put(weight, bias)
