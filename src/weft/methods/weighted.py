"""The weighted sum of several adapters' changes, to be merged in one go: ``f(x) = W x + sum_i w_i (f_i(x) - W x)``.

Each adapter changes the base's own weights, and none sees what the others do: unlike a stack, where one acts on the
result of the other, and unlike a combination, which averages the factors of a low rank. What acts at a module is the
same with the modules' functions (for the proof) and with their weights (for the merge).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar, cast

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter, InputFunction, SiteFunction
from weft.core.route import Segment
from weft.errors import UserError
from weft.methods.combined import CombinedConfig
from weft.methods.mergeable import Mergeable, MergedModule

T = TypeVar("T")


class WeightedSum(Adapter):
    """Adapters with a weight each. It is run and merged, and neither trained nor saved.

    Raises:
        UserError: An adapter does what no weighted sum of weights can be.
    """

    def __init__(self, name: str, parts: Sequence[Adapter], weights: Sequence[float]) -> None:
        super().__init__(CombinedConfig(parts=tuple(part.config for part in parts)), name)
        self.part_modules = nn.ModuleList(parts)
        self.weights = tuple(weights)
        for part in parts:
            if reason := _obstacle(part):
                raise UserError(f"adapter '{part.name}' ({part.config.method}) has no weight in a sum: {reason}.")
        both = {path for part in parts for path in part.input_sites()} & {p for part in parts for p in part.sites()}
        if both:
            raise UserError(
                f"at '{min(both)}' one adapter changes what goes in and another what comes out, and the sum of both is "
                "no weight of one module. Merge one of them, and train the other on the result."
            )

    @property
    def parts(self) -> Sequence[Adapter]:
        return tuple(cast(Sequence[Adapter], self.part_modules))

    def sites(self) -> Mapping[str, SiteFunction]:
        return {path: _output_sum(found) for path, found in self._at(lambda part: part.sites()).items()}

    def input_sites(self) -> Mapping[str, InputFunction]:
        return {path: _input_sum(found) for path, found in self._at(lambda part: part.input_sites()).items()}

    def merges(self) -> Mapping[str, Sequence[nn.Module]]:
        return {path: [WeightedChanges(found)] for path, found in self._at(lambda part: part.merges()).items()}

    def _at(self, sites: Callable[[Adapter], Mapping[str, T]]) -> dict[str, list[tuple[float, T]]]:
        """Path -> what the parts have there, with their weights."""
        found: dict[str, list[tuple[float, T]]] = {}
        for weight, part in zip(self.weights, self.parts, strict=True):
            for path, value in sites(part).items():
                found.setdefault(path, []).append((weight, value))
        return found


def _obstacle(part: Adapter) -> str:
    """Why an adapter cannot be one of a sum; empty if it can. Whether it can be merged at all is the merge's affair."""
    if part.head.labels:
        return "it has a classification head, and heads trained apart cannot be added"
    if part.inserted_blocks():
        return "it inserts blocks, which are no change of the base's weights"
    return "it changes parameters of experts" if part.parameter_sites() else ""


def _output_sum(found: Sequence[tuple[float, SiteFunction]]) -> SiteFunction:
    def run(x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        return y + torch.stack([weight * (function(x, y, segment) - y) for weight, function in found]).sum(0)

    return run


def _input_sum(found: Sequence[tuple[float, InputFunction]]) -> InputFunction:
    def run(x: Tensor, segment: Segment) -> Tensor:
        return x + torch.stack([weight * (function(x, segment) - x) for weight, function in found]).sum(0)

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
