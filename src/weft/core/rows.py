"""How a module of the base was called, and how its rows are cut into the segments of a route."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class Call:
    """What a module was called with beside its rows, so that the call can be made again with other rows.

    ``name``: the rows came by this name, not by place.
    """

    name: str | None = None
    args: tuple[Any, ...] = ()
    kwargs: dict[str, Any] = field(default_factory=dict)

    def __bool__(self) -> bool:
        return bool(self.args or self.kwargs)

    def run(self, forward: Callable[..., Any], module: nn.Module, x: Any) -> Any:
        """``forward`` of the module with the rows ``x`` and everything else as it came."""
        if self.name is not None:
            return forward(module, *self.args, **{self.name: x}, **self.kwargs)
        return forward(module, x, *self.args, **self.kwargs)

    def part(self, rows: Rows, x: Tensor, index: int) -> Call:
        """The call for the rows of segment ``index``: of tensors that lie as ``x`` does (a gate) its rows, else all."""

        def own(value: Any) -> Any:
            alike = torch.is_tensor(value) and value.dim() == x.dim() and value.shape[:-1] == x.shape[:-1]
            return rows.cut(value)[index] if alike else value

        return Call(self.name, tuple(map(own, self.args)), {key: own(value) for key, value in self.kwargs.items()})


def split_call(args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Call]:
    """A module's rows, the first of its arguments (or the first tensor by name), and the rest of the call."""
    if args:
        return args[0], Call(None, args[1:], kwargs)
    name = next((name for name, value in kwargs.items() if torch.is_tensor(value)), None)
    if name is None:
        return None, Call(None, args, kwargs)
    return kwargs[name], Call(name, args, {key: value for key, value in kwargs.items() if key != name})


@dataclass(frozen=True)
class Rows:
    """Where the segments of a route lie in a tensor (``Route.rows``): along ``dim``, ``sizes`` rows each.

    ``per_row`` is not 0 where a module sees a flattened batch, so many rows for each of the route's. ``repeated``: one
    row stands for the whole padded batch.
    """

    dim: int
    sizes: Sequence[int]
    per_row: int = 0
    repeated: bool = False

    def cut(self, x: Tensor) -> Sequence[Tensor]:
        """The segments' parts of ``x``, a tensor that lies as the one this was made of; never flattened."""
        if self.per_row:
            x = x.unflatten(0, (-1, self.per_row))
        elif self.repeated and x.shape[0] == 1:
            x = x.expand(sum(self.sizes), *x.shape[1:])
        return x.split(list(self.sizes), self.dim) if len(self.sizes) > 1 else [x]

    def join(self, pieces: Sequence[Tensor]) -> Tensor:
        """The parts as one tensor again, flattened if it was."""
        x = pieces[0] if len(pieces) == 1 else torch.cat(list(pieces), self.dim)
        return x.flatten(0, 1) if self.per_row else x
