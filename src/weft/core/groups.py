"""The cut of a module's arguments into one part per group of segments, and the join of its results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from weft.errors import UserError


@dataclass(frozen=True)
class Groups:
    """Where groups of segments lie in a module's first input (``Route.groups``): along ``dim``, ``sizes`` rows each."""

    dim: int
    sizes: tuple[int, ...]

    @property
    def total(self) -> int:
        """The number of rows."""
        return sum(self.sizes)

    def split(self, value: object) -> list[object]:
        """Each group's rows of a tensor that has these rows; of any other value the whole for each group."""
        if isinstance(value, tuple):
            return list(zip(*map(self.split, value), strict=True)) if value else [value] * len(self.sizes)
        # A vector may be one entry per expert, and parameters are the model's own.
        if not torch.is_tensor(value) or isinstance(value, nn.Parameter) or value.dim() < 2:
            return [value] * len(self.sizes)
        fits = [i for i in (self.dim, *range(value.dim())) if i < value.dim() and value.shape[i] == self.total]
        return list(value.split(self.sizes, fits[0])) if fits else [value] * len(self.sizes)

    def join(self, parts: Sequence[Any], path: str) -> object:
        """Join the groups' results into one.

        Raises:
            UserError: They hold something that is neither rows nor the same for all.
        """
        first = parts[0]
        if isinstance(first, tuple):
            return tuple(self.join(values, path) for values in zip(*parts, strict=True))
        if torch.is_tensor(first):
            fits = [
                i
                for i in (min(self.dim, max(first.dim() - 1, 0)), *range(first.dim()))
                if all(i < p.dim() and p.shape[i] == size for p, size in zip(parts, self.sizes, strict=True))
            ]
            if fits:
                return torch.cat(list(parts), fits[0])
        elif all(part is first or part == first for part in parts):
            return first
        raise UserError(
            f"module '{path}' gives more than one result per token, so its parameters cannot be adapted for some "
            "tokens only. Leave them out of target_parameters."
        )
