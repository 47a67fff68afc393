"""Gradient checkpointing of blocks, under the route of their own forward.

transformers' own checkpointing recomputes under the route that is current in the backward pass. With a second forward
in between (a reference model, say) every gradient would silently be wrong.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from weft.base.mixin import Mixin, mixed
from weft.base.offload import Place, Store, offloading, store_at
from weft.errors import UserError
from weft.ops.kept import Results
from weft.ops.memory import apart

# Whether blocks are computed again in the backward pass: none, all, or every k-th; or their cheap operations alone,
# from the results of their matrix products.
Checkpointing = bool | int | Literal["cheap"]


class Recomputing(Protocol):
    """What knows the route of a forward pass: the router."""

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of the forward pass and of its recomputation."""


@contextlib.contextmanager
def _both(first: AbstractContextManager[None], second: AbstractContextManager[None]) -> Iterator[None]:
    with first, second:
        yield


@dataclass(frozen=True)
class How:
    """How a block is checkpointed. ``store`` is where what it keeps goes; None: it stays."""

    router: Recomputing
    cheap: bool = False
    store: Store | None = None

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of a block's forward pass and of its recomputation."""
        forward, again = self.router.contexts()
        if not self.cheap:
            return forward, again
        keeping, giving = Results(None if self.store is None else self.store.put).contexts()
        return _both(forward, keeping), _both(again, giving)

    def keeping(self, hidden: torch.Tensor) -> AbstractContextManager[object]:
        """The context in which the block's input ``hidden`` [..., d] is put where it is kept."""
        return contextlib.nullcontext() if self.store is None else offloading(self.store, hidden)


_HOW = "_weft_checkpoint_how"
_CLASS = "_weft_checkpoint_class"


class _CheckpointedForward(Mixin):
    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: Any) -> object:
        run = functools.partial(self.__dict__[_CLASS].forward, self)
        if not torch.is_grad_enabled():
            return run(hidden, *args, **kwargs)
        how: How = self.__dict__[_HOW]
        # Of a block below the lowest adapter autograd keeps nothing, so nothing is computed again there; and nothing
        # shall go to a disk for it. In the block of the lowest adapter the input needs no gradient either.
        if not hidden.requires_grad:
            how = replace(how, store=None)
        elif how.store is None:
            hidden = apart(hidden)
        with how.keeping(hidden):
            return checkpoint(run, hidden, *args, use_reentrant=False, context_fn=how.contexts, **kwargs)


def enable_checkpointing(block: nn.Module, how: How) -> None:
    """Keep the block's input (and, ``cheap``, its products' results); the backward pass computes the rest again."""
    if _HOW not in block.__dict__:
        block.__dict__[_HOW], block.__dict__[_CLASS] = how, type(block)
        block.__class__ = mixed("Checkpointed", _CheckpointedForward, type(block))


def checkpoint_alike(block: nn.Module, other: nn.Module) -> None:
    """Checkpoint a block as another one is, if that is."""
    if _HOW in other.__dict__:
        enable_checkpointing(block, other.__dict__[_HOW])


def keeps_input_alone(block: nn.Module) -> bool:
    """Whether all of the block is computed again in the backward pass."""
    return _HOW in block.__dict__ and not block.__dict__[_HOW].cheap


def disable_checkpointing(block: nn.Module) -> None:
    """Undo ``enable_checkpointing``."""
    if _HOW in block.__dict__:
        del block.__dict__[_HOW]
        block.__class__ = block.__dict__.pop(_CLASS)


def check_offload(offload: Place | None, folder: str | None, device: torch.device) -> None:
    """Refuse a place for activations of a base on ``device``.

    Raises:
        UserError: They are there already, or the folder is none.
    """
    if offload == "cpu" and device.type == "cpu":
        raise UserError(
            "offload_activations: cpu is for a base on a GPU; here activations are in CPU memory already. Take disk."
        )
    if folder is not None and (offload != "disk" or not Path(folder).is_dir()):
        why = f"{folder} is no folder" if offload == "disk" else "only offload_activations: disk has one"
        raise UserError(f"offload_folder: {why}.")


def checkpointing(
    blocks: Sequence[str], which: Checkpointing, offload: Place | None = None, folder: str | None = None
) -> Callable[[nn.Module, Recomputing], Callable[[], None]]:
    """What enables it for the blocks at these paths of a model, and gives back what undoes that.

    ``offload`` is where what is kept goes (None: it stays), and ``folder`` where its files are.

    Raises:
        UserError: Nothing is checkpointed that could be put elsewhere; when it is enabled, as ``check_offload``.
    """
    if offload is not None and not which:
        raise UserError("offload_activations needs gradient_checkpointing: it is what that keeps that goes.")
    store = None if offload is None else store_at(offload, folder)

    def install(model: nn.Module, router: Recomputing) -> Callable[[], None]:
        check_offload(offload, folder, next(model.parameters()).device)
        every = which if isinstance(which, int) else 1
        found = [model.get_submodule(path) for path in blocks[::every]] if which else []
        for block in found:
            enable_checkpointing(block, How(router, which == "cheap", store))

        def undo() -> None:
            for block in found:
                disable_checkpointing(block)

        return undo

    return install
