"""Modules of positions that depend on the whole pass, and so answer for each sequence by itself.

The longest position of the pass decides on rotary tables with dynamic frequencies (LongRoPE, dynamic NTK), and some
modules keep their choice for the next pass. In a batch, a neighbour's length would change a sequence's angles. A trial
finds such modules under any name (``neighbour_dependent``).
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.base.embeddings import config_of
from weft.base.mixin import Mixin, mixed
from weft.core.route import Route, Router

_ROUTER = "_weft_table_router"
_FIRST = "_weft_table_first"


class _FirstState:
    """A module's buffers and attributes before it has seen any text.

    transformers' dynamic tables keep their first frequencies beside those of the last text.
    """

    def __init__(self, module: nn.Module) -> None:
        self.buffers = dict(module._buffers)
        self.attributes = {name: value for name, value in vars(module).items() if not name.startswith("_")}
        self.values: dict[str, Tensor] = {}
        for name, buffer in self.buffers.items():
            if buffer is not None:
                began = getattr(module, name.replace("inv_freq", "original_inv_freq"), None)
                value = began if isinstance(began, Tensor) and began.shape == buffer.shape else buffer
                self.values[name] = value.detach().to(buffer.device, copy=True)
        if "original_max_seq_len" in self.attributes:
            # There is one for all kinds of layer, and one for each kind that has seen a longer text.
            for name in [n for n in self.attributes if n.endswith("max_seq_len_cached")]:
                self.attributes[name] = self.attributes["original_max_seq_len"]

    def put_back(self, module: nn.Module) -> None:
        """Give the module its first values again."""
        module._buffers.clear()
        module._buffers.update(self.buffers)
        for name, value in self.values.items():
            buffer = self.buffers[name]
            assert buffer is not None
            buffer.copy_(value)
        for name in [n for n in vars(module) if not n.startswith("_") and n not in self.attributes]:
            del module.__dict__[name]
        module.__dict__.update(self.attributes)


@contextlib.contextmanager
def as_before(model: nn.Module) -> Iterator[None]:
    """Inside, modules of positions may change; afterwards they are as before."""
    kept = [(module, _FirstState(module)) for module in model.modules() if _takes_positions(module)]
    try:
        yield
    finally:
        for module, first in kept:
            first.put_back(module)


class _PerSequence(Mixin):
    """A module that answers for one sequence after the other, each as if it were the first."""

    def forward(self, x: Tensor, position_ids: Tensor, *args: object, **kwargs: object) -> object:
        route: Route | None = self.__dict__[_ROUTER].current
        first: _FirstState = self.__dict__[_FIRST]

        def alone(positions: Tensor) -> object:
            first.put_back(self)
            found = super(_PerSequence, self).forward(x, positions, *args, **kwargs)
            first.put_back(self)
            return found

        if route is None:
            return super().forward(x, position_ids, *args, **kwargs)
        if route.padded:
            return _joined([alone(row[None]) for row in position_ids], 0)
        lengths = [1] * position_ids.shape[1] if route.layout is None else route.layout.lengths
        return _joined([alone(piece) for piece in position_ids.split(lengths, 1)], -2)


def _joined(pieces: Sequence[Any], dim: int) -> object:
    if torch.is_tensor(pieces[0]):
        return torch.cat(list(pieces), dim)
    return tuple(_joined(parts, dim) for parts in zip(*pieces, strict=True))


def install_tables(model: nn.Module, router: Router, paths: Sequence[str]) -> Callable[[], None]:
    """Let the modules at ``paths`` answer sequence by sequence; returns the function that undoes it."""
    modules = [model.get_submodule(path) for path in paths]
    for module in modules:
        module.__dict__[_ROUTER], module.__dict__[_FIRST] = router, _FirstState(module)
        module.__class__ = mixed("PerSequence", _PerSequence, type(module))

    def undo() -> None:
        for module in modules:
            module.__dict__[_FIRST].put_back(module)
            del module.__dict__[_ROUTER], module.__dict__[_FIRST]
            module.__class__ = type(module).__mro__[2]

    return undo


@torch.no_grad()
def neighbour_dependent(model: nn.Module) -> list[str]:
    """Paths of the modules that map positions to tables and change a short sequence's table beside a long one.

    Modules of positions have no parameters and take ``x`` and ``position_ids``. The trial exceeds every limit that a
    module or the model's configuration names.
    """
    return [
        path
        for path, module in model.named_modules()
        if next(module.parameters(), None) is None and _takes_positions(module)
        if not _alike(module, _FirstState(module), (0, 1), (0, 1, _limits(module, model)))
    ]


def _takes_positions(module: nn.Module) -> bool:
    return list(inspect.signature(type(module).forward).parameters)[1:3] == ["x", "position_ids"]


@torch.no_grad()
def tables_move(model: nn.Module, length: int, longer: int, paths: Sequence[str]) -> bool:
    """Whether a module at one of ``paths`` gives other tables for ``longer`` tokens than for ``length``."""
    for path in paths:
        module = model.get_submodule(path)
        first = module.__dict__.get(_FIRST) or _FirstState(module)
        if not _alike(module, first, (0, 1, length - 1), (0, 1, longer - 1)):
            return True
    return False


def _limits(module: nn.Module, model: nn.Module) -> int:
    config = config_of(model)
    rope = getattr(config, "rope_parameters", None) or {}
    nested = [rope, *(value for value in rope.values() if isinstance(value, dict))]
    numbers = [v for values in (vars(module), *nested) for v in values.values() if type(v) is int]
    return 2 * max([64, *(v for v in numbers if v < 2**24), getattr(config, "max_position_embeddings", None) or 0])


def _alike(module: nn.Module, first: _FirstState, some: tuple[int, ...], others: tuple[int, ...]) -> bool:
    """Whether positions 0 and 1 have the same tables among ``some`` and ``others``; the module is as before."""
    buffer = next((b for b in module.buffers() if b is not None), torch.zeros(()))
    x = torch.zeros(1, 2, 4, device=buffer.device)

    def ask(*positions: int) -> list[Tensor]:
        first.put_back(module)
        ids = torch.tensor([positions], device=buffer.device)
        types = sorted(set(getattr(module, "layer_types", None) or ())) or [None]
        answers = [module(x, ids) if kind is None else module(x, ids, kind) for kind in types]
        tables = [table for answer in answers for table in (answer if isinstance(answer, tuple) else (answer,))]
        two = [table[..., :2, :] for table in tables]
        return [torch.view_as_real(table) if table.is_complex() else table.float() for table in two]

    try:
        return all(torch.equal(a, b) for a, b in zip(ask(*some), ask(*others), strict=True))
    except (TypeError, ValueError, RuntimeError, IndexError, KeyError):
        return True  # the proof of the whole pass tries it with the model's own positions
    finally:
        first.put_back(module)
