"""Blocks whose weights stay in their files, and are in memory only while a pass goes through them.

The weights lie in mapped files (``weft.base.mapped``). When a pass enters a block, forward or back, a thread has the
next one read, and the one before is given back. A weight can be read at any other time too; so nothing that
runs over the model has to know of it, and no number changes.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from weft.base.embeddings import output_head
from weft.base.mapped import bring_in, give_back, joined, read_ahead, spans_of
from weft.base.mixin import Mixin, mixed

_STREAMING, _INDEX, _CLASS = "_weft_streaming", "_weft_streaming_index", "_weft_streaming_class"


def held_tensors(module: nn.Module) -> list[Tensor]:
    """All that a module keeps of its weights [...]: parameters, buffers, and the scales of quantised parameters."""
    found: list[Tensor] = []
    for parameter in module.parameters():
        found.append(parameter.data)
        state = getattr(parameter, "quant_state", None)
        for one in (state, getattr(state, "state2", None)):
            found += [value for value in vars(one).values() if torch.is_tensor(value)] if one is not None else []
    return [*found, *module.buffers()]


class Streaming:
    """The spans of a model's blocks, and which of them are in memory.

    Args:
        blocks: In the order in which a pass goes through them.

    Attributes:
        chain: Whether each block is given what the one before gave, and that alone; None: nobody looked.
        waited: Seconds in which a pass waited for the disk.
        bytes_read: Bytes that were asked for; the system may have had them in memory.
    """

    def __init__(self, model: nn.Module, blocks: Sequence[nn.Module]) -> None:
        tensors = [held_tensors(block) for block in blocks]
        inside = {id(module) for block in blocks for module in block.modules()}
        rest = [p.data for m in model.modules() if id(m) not in inside for p in m.parameters(recurse=False)]
        output = output_head(model)
        # The spans hold as long as the memory does.
        self._tensors = [*tensors, rest]
        logits = [] if output is None else [p.data for p in output.parameters()]
        # Behind the blocks the output layer, which a pass needs between the last block forward and back.
        self._spans = [joined(spans_of(own)) for own in (*tensors, logits)]
        self._rest = joined(spans_of(rest))
        self._now: tuple[int, int] | None = None
        self._coming: dict[int, Future[None]] = {}
        self._reader = ThreadPoolExecutor(1, thread_name_prefix="weft-read-ahead")
        self.waited, self.bytes_read = 0.0, 0
        self.chain: bool | None = None
        self._kind: tuple[type, int] | None = None

    @property
    def last(self) -> int:
        """The number of the last block."""
        return len(self._spans) - 2

    def enter(self, index: int, after: int) -> None:
        """A pass enters block ``index``; ``after`` is the one that comes next. Other blocks are given back."""
        if self._now == (index, after):
            return
        self._now = (index, after)
        for gone in [other for other in self._coming if other not in (index, after)]:
            self._coming.pop(gone).result()
            give_back(self._spans[gone])
        # Rows of the embeddings, and the output layer, were needed between two blocks.
        give_back(self._rest)
        begun = time.perf_counter()
        self._ask(index).result()
        bring_in(self._spans[index])
        self.waited += time.perf_counter() - begun
        if index == self.last:
            self._ask(self.last + 1)
        self._ask(after)

    def _ask(self, index: int) -> Future[None]:
        if index not in self._coming:
            self.bytes_read += sum(span.size for span in self._spans[index])
            self._coming[index] = self._reader.submit(read_ahead, self._spans[index])
        return self._coming[index]

    def gave(self, out: object) -> None:
        """Note how blocks give their rows: alone, or first in a tuple."""
        self._kind = (type(out), len(out)) if isinstance(out, (tuple, list)) else None

    def like(self, hidden: Tensor) -> object:
        """The rows [B, T, d] as a block gives them, with nothing beside them."""
        if self._kind is None:
            return hidden
        kind, count = self._kind
        return kind([hidden, *[None] * (count - 1)])

    def close(self) -> None:
        """Give everything back."""
        self._reader.shutdown()
        for spans in (*self._spans, self._rest):
            give_back(spans)
        self._coming.clear()


class _TurnContext(Protocol):
    streaming: Streaming
    place: tuple[int, int]


class _Turn(torch.autograd.Function):
    """The identity on a block's output. Its backward pass is where the gradient enters the block."""

    @staticmethod
    def forward(ctx: _TurnContext, hidden: Tensor, streaming: Streaming, place: tuple[int, int]) -> Tensor:
        ctx.streaming, ctx.place = streaming, place
        return hidden.view_as(hidden)

    @staticmethod
    def backward(ctx: _TurnContext, grad: Tensor) -> tuple[Tensor, None, None]:
        ctx.streaming.enter(*ctx.place)
        return grad, None, None


class _StreamedForward(Mixin):
    def forward(self, *args: Any, **kwargs: Any) -> object:
        streaming: Streaming = self.__dict__[_STREAMING]
        index: int = self.__dict__[_INDEX]
        given = next((value for value in (*args, *kwargs.values()) if torch.is_tensor(value)), None)
        learns = torch.is_grad_enabled()
        # From the last block the gradient comes back through it; without one, the next pass begins at the first.
        streaming.enter(index, index + 1 if index < streaming.last else max(index - 1, 0) if learns else 0)
        out = super().forward(*args, **kwargs)
        streaming.gave(out)
        first = out[0] if isinstance(out, (tuple, list)) else out
        if not (learns and torch.is_tensor(first) and first.requires_grad):
            return out
        goes_on = given is not None and given.requires_grad
        # Below the lowest adapter no gradient goes: then the next pass comes, from the first block to the second.
        below = index - 1 if goes_on and index else 0 if index else min(1, streaming.last)
        turned = _Turn.apply(first, streaming, (index, below))
        return type(out)([turned, *out[1:]]) if isinstance(out, (tuple, list)) else turned


def stop_streaming(block: nn.Module) -> None:
    """Give the block its own class back; one that is not streamed stays as it is."""
    if _STREAMING in block.__dict__:
        block.__class__ = block.__dict__.pop(_CLASS)
        del block.__dict__[_STREAMING], block.__dict__[_INDEX]


def streaming_of(model: nn.Module) -> Streaming | None:
    """What streams the blocks of the model; None if nothing does."""
    return next((m.__dict__[_STREAMING] for m in model.modules() if _STREAMING in m.__dict__), None)


def streamed(blocks: Sequence[str]) -> Callable[[nn.Module, object], Callable[[], None]]:
    """What streams the blocks at these paths of a model, and gives back what undoes that."""

    def install(model: nn.Module, router: object) -> Callable[[], None]:
        found = [model.get_submodule(path) for path in blocks]
        streaming = Streaming(model, found)
        for index, block in enumerate(found):
            block.__dict__.update({_STREAMING: streaming, _INDEX: index, _CLASS: type(block)})
            block.__class__ = mixed("Streamed", _StreamedForward, type(block))

        def undo() -> None:
            for block in found:
                stop_streaming(block)
            streaming.close()

        return undo

    return install
