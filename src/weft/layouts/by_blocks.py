"""Several passes at once, block by block: all of them go through a block before one goes through the next.

For a base whose blocks are read from the disk (``weft.base.streaming``): a step with many micro-batches then reads each
block once forward and once back. Blocks keep nothing but their inputs (gradient checkpointing), so that is what the
passes take in memory.

The model's own code makes the arguments of each block: it runs once with blocks that only note how they are called,
and once more, after them, with blocks that give the results. That needs a model in which what a block gives is what the
next is given; ``proved`` looks.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from weft.base.checkpointing import keeps_input_alone
from weft.base.streaming import Streaming, streaming_of
from weft.core.adapters import Adapters
from weft.core.stream import Part, Stream

logger = logging.getLogger(__name__)
# Token ids of the two texts of the proof; every vocabulary has them.
_TEXTS = ([1, 2, 3, 0, 1, 2, 2], [3, 1])


@dataclass(frozen=True)
class _Call:
    """One block's call: what came in beside the rows."""

    block: nn.Module
    args: tuple[Any, ...]
    kwargs: dict[str, Any]


class _ChainError(Exception):
    """The blocks are no chain: something else happens between two of them."""


def goes_by_blocks(adapters: Adapters) -> bool:
    """Whether several passes should go through the base together: it is streamed, checkpointed, and ``proved``."""
    streaming = streaming_of(adapters.model)
    if streaming is None or adapters.architecture.memory_linears:
        return False
    blocks = [adapters.model.get_submodule(path) for path in adapters.architecture.blocks]
    return all(keeps_input_alone(block) for block in blocks) and _is_proved(adapters, streaming)


def _is_proved(adapters: Adapters, streaming: Streaming) -> bool:
    if streaming.chain is None:
        streaming.chain = proved(adapters)
        if not streaming.chain:
            logger.warning(
                "the blocks of this %s model are no chain; each micro-batch goes through it by itself, and reads its "
                "weights again",
                adapters.architecture.model_type,
            )
    return streaming.chain


@torch.no_grad()
def proved(adapters: Adapters) -> bool:
    """Whether two texts give the same bits block by block as one after the other."""
    streams = [adapters.stream([Part(None, [text])]) for text in _TEXTS]
    plain = [adapters.forward(stream) for stream in streams]
    try:
        found = forward_by_blocks(adapters, streams)
    except _ChainError:
        return False
    return all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))


def forward_by_blocks(adapters: Adapters, streams: Sequence[Stream]) -> list[Tensor]:
    """The last hidden states [N, d] of each batch that ``Adapters.stream`` laid out.

    Where gradients add up, the batches' own come in their order: autograd goes through what was computed last first.
    """
    order = range(len(streams))[::-1]
    begun = {number: _begin(adapters, streams[number]) for number in order}
    states = {number: hidden for number, (hidden, _) in begun.items()}
    calls = {number: made for number, (_, made) in begun.items()}
    if any([c.block for c in made] != [c.block for c in calls[0]] for made in calls.values()):
        raise _ChainError
    for place in range(len(calls[0])):
        for number in order:
            call = calls[number][place]
            with adapters.router.use(streams[number].route):
                states[number] = _first(call.block(states[number], *call.args, **call.kwargs))
    ended = {number: _end(adapters, streams[number], states.pop(number)) for number in order}
    return [ended[number] for number in range(len(streams))]


def _begin(adapters: Adapters, stream: Stream) -> tuple[Tensor, list[_Call]]:
    """What the first block is given, and the calls of all."""
    calls: list[_Call] = []
    given: list[Tensor] = []

    def note(block: nn.Module, hidden: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        if given and hidden is not given[0]:
            raise _ChainError
        given[:] = [hidden]
        calls.append(_Call(block, args, kwargs))
        return hidden

    with _answering(adapters, note):
        adapters.forward(stream)
    return given[0], calls


def _end(adapters: Adapters, stream: Stream, hidden: Tensor) -> Tensor:
    """The last hidden states [N, d], if the last block gives ``hidden`` [B, T, d]."""
    with _answering(adapters, lambda block, *args, **kwargs: hidden):
        return adapters.forward(stream)


@contextlib.contextmanager
def _answering(adapters: Adapters, answer: Callable[..., Tensor]) -> Iterator[None]:
    """Inside, every block gives what ``answer`` says in place of its rows, and does not run."""
    blocks = [adapters.model.get_submodule(path) for path in adapters.architecture.blocks]
    streaming = streaming_of(adapters.model)
    assert streaming is not None

    def forward(block: nn.Module) -> Callable[..., object]:
        def run(*args: Any, **kwargs: Any) -> object:
            if not args or not torch.is_tensor(args[0]):
                raise _ChainError
            return streaming.like(answer(block, *args, **kwargs))

        return run

    for block in blocks:
        block.__dict__["forward"] = forward(block)
    try:
        yield
    finally:
        for block in blocks:
            del block.__dict__["forward"]


def _first(out: Any) -> Tensor:
    found: Tensor = out[0] if isinstance(out, (tuple, list)) else out
    return found
