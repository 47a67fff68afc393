"""Gradient checkpointing of whole blocks, under the route of their own forward.

transformers' own checkpointing recomputes under the route that is current in the backward pass. With a second forward
in between (a reference model, say) every gradient would silently be wrong.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

from weft.base.mixin import Mixin, mixed


class Recomputing(Protocol):
    """What knows the route of a forward pass: the router."""

    def contexts(self) -> tuple[AbstractContextManager[None], AbstractContextManager[None]]:
        """The contexts of the forward pass and of its recomputation."""


_ROUTER = "_weft_checkpoint_router"
_CLASS = "_weft_checkpoint_class"


class _CheckpointedForward(Mixin):
    def forward(self, hidden: torch.Tensor, *args: object, **kwargs: Any) -> object:
        run = functools.partial(self.__dict__[_CLASS].forward, self)
        # Below the lowest adapter nothing needs a gradient: saving and recomputing there would be pure loss.
        if not (torch.is_grad_enabled() and hidden.requires_grad):
            return run(hidden, *args, **kwargs)
        router: Recomputing = self.__dict__[_ROUTER]
        return checkpoint(run, hidden, *args, use_reentrant=False, context_fn=router.contexts, **kwargs)


def enable_checkpointing(block: nn.Module, router: Recomputing) -> None:
    """Keep only the block's input; the backward pass computes the rest again."""
    if _ROUTER not in block.__dict__:
        block.__dict__[_ROUTER], block.__dict__[_CLASS] = router, type(block)
        block.__class__ = mixed("Checkpointed", _CheckpointedForward, type(block))


def is_checkpointed(block: nn.Module) -> bool:
    """Whether ``enable_checkpointing`` was called on the block."""
    return _ROUTER in block.__dict__


def disable_checkpointing(block: nn.Module) -> None:
    """Undo ``enable_checkpointing``."""
    if _ROUTER in block.__dict__:
        del block.__dict__[_ROUTER]
        block.__class__ = block.__dict__.pop(_CLASS)


def checkpointing(blocks: Sequence[str]) -> Callable[[nn.Module, Recomputing], Callable[[], None]]:
    """What enables it for the blocks at these paths of a model, and gives back what undoes that."""

    def install(model: nn.Module, router: Recomputing) -> Callable[[], None]:
        found = [model.get_submodule(path) for path in blocks]
        for block in found:
            enable_checkpointing(block, router)

        def undo() -> None:
            for block in found:
                disable_checkpointing(block)

        return undo

    return install
