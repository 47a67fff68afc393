"""The call of a module of the base, and the cut of its rows into the segments of a route, or into groups of them."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from weft.errors import UserError

Result = TypeVar("Result")


@dataclass(frozen=True)
class Call:
    """The arguments of a module beside its rows, so that the call can be made again with other rows.

    ``name`` is the name by which the rows came; None: they came by place.
    """

    name: str | None = None
    args: tuple[object, ...] = ()
    kwargs: dict[str, object] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.args or self.kwargs)

    def run(self, forward: Callable[..., Result], module: nn.Module, x: object) -> Result:
        """Run ``forward`` of the module with the rows ``x`` and all other arguments as they came."""
        if self.name is not None:
            return forward(module, *self.args, **{self.name: x}, **self.kwargs)
        return forward(module, x, *self.args, **self.kwargs)

    def part(self, rows: Rows, x: Tensor, index: int) -> Call:
        """The call for segment ``index``: its rows of tensors of x's shape but for the last side (a gate), else all."""

        def own(value: object) -> object:
            if isinstance(value, Tensor) and value.dim() == x.dim() and value.shape[:-1] == x.shape[:-1]:
                return rows.cut(value)[index]
            return value

        return Call(self.name, tuple(map(own, self.args)), {key: own(value) for key, value in self.kwargs.items()})


def split_call(args: tuple[object, ...], kwargs: dict[str, object]) -> tuple[object, Call]:
    """Split a call into the rows, its first argument (or the first tensor by name), and the rest."""
    if args:
        return args[0], Call(None, args[1:], kwargs)
    name = next((name for name, value in kwargs.items() if torch.is_tensor(value)), None)
    if name is None:
        return None, Call(None, args, kwargs)
    return kwargs[name], Call(name, args, {key: value for key, value in kwargs.items() if key != name})


@dataclass(frozen=True)
class Rows:
    """Where the segments of a route lie in a tensor (``Route.rows``): along ``dim``, ``sizes`` rows each.

    ``per_row`` is not 0 where a module sees a flattened batch, with so many rows for each of the route's. ``repeated``
    says that one row stands for the whole padded batch.
    """

    dim: int
    sizes: Sequence[int]
    per_row: int = 0
    repeated: bool = False

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        """The segments' parts of ``x``, whose rows have the shape these were made of; the parts are never flattened."""
        if self.per_row:
            x = x.unflatten(0, (-1, self.per_row))
        elif self.repeated and x.shape[0] == 1:
            x = x.expand(sum(self.sizes), *x.shape[1:])
        return x.split(list(self.sizes), self.dim) if len(self.sizes) > 1 else [x]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The parts as one tensor of the original shape, flattened if it was."""
        x = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), self.dim)
        return x.flatten(0, 1) if self.per_row else x


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
