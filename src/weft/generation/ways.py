"""The ways of a base: which of them a row takes, by the layout and by what was proved.

What a cache looks like follows from the layout. One of the stream has rows of any length; one of padded batches has
rows of one length (``weft.generation.lockstep``); an encoder-decoder keeps what its encoder gave.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Sequence
from typing import cast

import torch

from weft.base.embeddings import input_embeddings
from weft.core.adapters import Adapters
from weft.core.layout import Decoding
from weft.core.stream import Part
from weft.generation import cache_proof
from weft.generation.cache_proof import MANY, Kind
from weft.generation.cohorts import Begin, Cohorts, Kinds, RepeatedRows
from weft.generation.lockstep import Group
from weft.generation.paged import Paged
from weft.generation.request import Request
from weft.generation.row import Row
from weft.generation.way import Way
from weft.layouts.encoder_decoder import Decoder, EncoderDecoder
from weft.layouts.packed import Packed
from weft.layouts.padded_batch import Padded


class Ways:
    """The ways that the rows of one engine take."""

    def __init__(self, adapters: Adapters, *, blocks: int, block_tokens: int, prefill_tokens: int) -> None:
        kinds, begin = _COHORTS[type(adapters.layout)]
        self.adapters = adapters
        self.cohorts = Cohorts(adapters, kinds, begin)
        self.paged: Paged | None = None
        if isinstance(adapters.layout, Packed) and adapters.architecture.writes and goes_on(adapters):
            self.paged = Paged(
                adapters, self.shares, blocks=blocks, block_tokens=block_tokens, prefill_tokens=prefill_tokens
            )
        self.all: tuple[Way, ...] = (self.cohorts,) if self.paged is None else (self.paged, self.cohorts)

    def forget(self) -> None:
        """Give the memory of the cache back; no row is there any more."""
        if self.paged is not None:
            self.paged.blocks.forget()
            self.paged.pool.clear()

    def of(self, request: Request) -> Way:
        """The way of a request."""
        return self.cohorts if self.paged is None or self._moves(request, first=False) else self.paged

    def shares(self, request: Request) -> bool:
        """Whether others may use the keys and values of the request's text, and it may use theirs.

        Tables of positions that depend on how long the text is do not give the same ones to every beginning.
        """
        return not self._moves(request, first=True)

    def _moves(self, request: Request, *, first: bool) -> bool:
        """Whether tables of positions change between the prompt (its ``first`` tokens) and the answer's end."""
        move = self.adapters.architecture.tables_move
        if move is None:
            return False
        length = len(request.prompt) + sum(cache_proof.learned_tokens(self.adapters, request.adapter))
        return move(self.adapters.model, 1 if first else length, length + request.max_new_tokens)


# Adapters -> whether a step from the stream's cache was proved to give what the whole text gives.
_GOES_ON: weakref.WeakKeyDictionary[Adapters, bool] = weakref.WeakKeyDictionary()
_STEPS = 3  # in that proof


@torch.no_grad()
def goes_on(adapters: Adapters) -> bool:
    """Whether the base may go on from the cache of the stream. It is tried once, on two short texts.

    A layer that attends twice in one pass, or that is run several times, would overwrite its own keys.
    """
    if adapters not in _GOES_ON:
        _GOES_ON[adapters] = _prove(adapters)
    return _GOES_ON[adapters]


def _prove(adapters: Adapters) -> bool:
    vocabulary = int(input_embeddings(adapters.model).weight.shape[0])
    texts = [[(7 * i + n) % vocabulary for i in range(n)] for n in (4, 9)]
    room = adapters.architecture.max_length
    if room is not None and room < 9 + _STEPS:
        return True  # no text of this base is long enough to be tried
    # Small blocks and pieces: the longer text comes in three pieces, beside the other, which is being written.
    paged = Paged(adapters, lambda request: True, blocks=16, block_tokens=4, prefill_tokens=4)
    rows = [Row(Request(text), adapters) for text in texts]
    for row in rows:
        paged.add(row)
    worst = 0.0
    while min(len(row.ids) for row in rows) <= _STEPS:
        for found, hidden in paged.step():
            parts = [Part(None, [row.symbols for row in found])]
            _, whole = adapters.run(parts)
            ends = torch.tensor([len(row.symbols) for row in found], device=whole.device).cumsum(0) - 1
            ours, wanted = (adapters.logits(h, [(None, len(found))]).double() for h in (hidden, whole[ends]))
            worst = max(worst, cache_proof.distance(ours, wanted))
            for row, token in zip(found, wanted.argmax(-1).tolist(), strict=True):
                row.take(token)
    eps = max(torch.finfo(adapters.dtype).eps, torch.finfo(torch.float32).eps)
    # Every rounding on the way counts. A wrong cache differs by the size of the logits.
    return worst <= min(0.2, 64 * eps * math.sqrt(10 * adapters.architecture.num_layers))


def _alone(adapters: Adapters, requests: Sequence[Request]) -> list[Kind]:
    return [Kind()] * len(requests)


def _in_padded_batches(adapters: Adapters, requests: Sequence[Request]) -> list[Kind]:
    """Put those of one length together, where the cache was proved for the base and the adapter."""
    some = {request.adapter: request for request in requests}
    tried = {name: cache_proof.verdict(adapters, name, r.prompt, r.slots) for name, r in some.items()}
    return [cache_proof.kind(adapters, r.adapter, len(r.prompt), tried[r.adapter]) for r in requests]


def _group(adapters: Adapters, parts: Sequence[Part]) -> Decoding:
    return Group(adapters, parts, cache_name=cache_proof.verdict(adapters, None).cache_name)


def _decoder(adapters: Adapters, parts: Sequence[Part]) -> Decoding:
    return Decoder(cast(EncoderDecoder, adapters.layout), parts)


_COHORTS: dict[type[object], tuple[Kinds, Begin]] = {
    Packed: (_alone, RepeatedRows),
    Padded: (_in_padded_batches, _group),
    EncoderDecoder: (lambda adapters, requests: [Kind(MANY)] * len(requests), _decoder),
}
