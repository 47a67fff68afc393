"""The ways in which rows go on: from a cache, if that was proved to give what the whole text gives, or from the start.

What a cache looks like follows from the layout. One of the stream has rows of any length; one of padded batches has
rows of one length (``weft.generation.lockstep``); an encoder-decoder keeps what its encoder gave.
"""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from typing import cast, final

import torch
from torch import Tensor

from weft.base.embeddings import input_embeddings
from weft.core.adapters import Adapters
from weft.core.layout import Counts, Decoding, Layout
from weft.core.stream import Part
from weft.generation import cache_proof
from weft.generation.cache import KeyValueCache
from weft.generation.cache_proof import MANY, Kind
from weft.generation.lockstep import Group
from weft.generation.sampling import Sampling
from weft.layouts.encoder_decoder import Decoder, EncoderDecoder
from weft.layouts.packed import Packed
from weft.layouts.padded_batch import Padded


@dataclass(frozen=True)
class Request:
    """One prompt for one adapter (None: the base)."""

    prompt: Sequence[int]
    adapter: str | None = None
    max_new_tokens: int = 64
    _: KW_ONLY
    sampling: Sampling = field(default_factory=Sampling)
    slots: Sequence[int] = ()


# (adapters, prompts, how many tokens may follow) -> the rows that go on.
Begin = Callable[[Adapters, Sequence[Part], int], Decoding]


@dataclass(frozen=True)
class Plan:
    """The plan of a layout: what requests must have in common to advance together, and how they begin from a cache."""

    kinds: Callable[[Adapters, Sequence[Request]], list[Kind]]
    from_cache: Begin


def batches(adapters: Adapters, requests: Sequence[Request], size: int) -> Iterator[tuple[list[int], Begin]]:
    """Which requests go together, sorted by adapter (its rows are one segment) and length, and how they begin."""
    plan = PLANS[type(adapters.layout)]
    kinds = plan.kinds(adapters, requests)
    order = sorted(range(len(requests)), key=lambda i: (kinds[i], requests[i].adapter or "", len(requests[i].prompt)))
    for kind, found in itertools.groupby(order, key=lambda i: kinds[i]):
        same, most = list(found), min(size, kind.rows or size)
        for start in range(0, len(same), most):
            yield same[start : start + most], plan.from_cache if kind.rows else RepeatedRows


@final
class CachedRows(Decoding):
    """Rows of any length in the stream, each new token beside the keys and values of those before it."""

    def __init__(self, adapters: Adapters, parts: Sequence[Part], room: int) -> None:
        """Run the prompts; ``room``: tokens that may follow."""
        self.adapters, stream = adapters, adapters.stream(parts)
        lengths, prefixes = (
            torch.tensor(numbers, device=adapters.device) for numbers in (stream.lengths, stream.prefix_length)
        )
        self.cache = KeyValueCache(lengths, prefixes, room)
        hidden = adapters.forward(replace(stream, route=replace(stream.route, cache=self.cache)))
        self.cache.end_prefill()
        self.hidden = hidden[torch.tensor(stream.standing, device=hidden.device)]

    def step(self, tokens: Tensor, counts: Counts) -> None:
        shape, lengths = self.adapters.architecture, self.cache.lengths
        # Rows that have ended keep their place until the batch is thinned; their positions must stay legal.
        positions = lengths if shape.max_length is None else lengths.clamp(max=shape.max_length - 1)
        positions = positions + shape.first_position
        self.hidden = self.adapters.forward(
            self.adapters.layout.next_tokens(tokens, positions, counts, cache=self.cache)
        )
        self.cache.advance()

    def keep(self, rows: Tensor) -> None:
        self.cache.keep(rows)


@final
class RepeatedRows(Decoding):
    """Rows whose whole text runs again in every step, for want of a proved cache: this is slow, and right."""

    patient = False

    def __init__(self, adapters: Adapters, parts: Sequence[Part], room: int = 0) -> None:
        self.adapters = adapters
        self._rows = [
            (part.adapter, list(text), answer, slots)
            for part in parts
            for text, answer, slots in zip(part.sequences, part.answers, part.slots, strict=True)
        ]
        self._run()

    def step(self, tokens: Tensor, counts: Counts) -> None:
        for (_, text, _, _), token in zip(self._rows, tokens.tolist(), strict=True):
            text.append(token)
        self._run()

    def keep(self, rows: Tensor) -> None:
        self._rows = [self._rows[i] for i in rows.tolist()]

    def _run(self) -> None:
        parts = []
        for name, rows in itertools.groupby(self._rows, key=lambda row: row[0]):
            _, texts, answers, slots = zip(*rows, strict=True)
            parts.append(Part(name, texts, None, answers=answers, slots=slots))
        stream, hidden = self.adapters.run(parts)
        self.hidden = hidden[torch.tensor(stream.standing, device=hidden.device)]


# Adapters -> whether a step from the stream's cache was proved to give what the whole text gives.
_GOES_ON: weakref.WeakKeyDictionary[Adapters, bool] = weakref.WeakKeyDictionary()
_STEPS = 3  # in that proof


def goes_on(adapters: Adapters) -> bool:
    """Whether the base may go on from the cache of the stream. It is tried once, on two short texts.

    A layer that attends twice in one pass, or that is run several times, would overwrite its own keys.
    """
    if adapters not in _GOES_ON:
        vocabulary = int(input_embeddings(adapters.model).weight.shape[0])
        texts = [[(7 * i + n) % vocabulary for i in range(n)] for n in (4, 9)]
        room = adapters.architecture.max_length
        if room is not None and room < 9 + _STEPS:
            return True  # no text of this base is long enough to be tried
        parts = [Part(None, texts, None, answers=[4, 9], slots=[(), ()])]
        rows, whole = CachedRows(adapters, parts, _STEPS + 1), RepeatedRows(adapters, parts)
        worst = 0.0
        for _ in range(_STEPS):
            tokens = adapters.logits(rows.hidden, [(None, 2)]).argmax(-1)
            rows.step(tokens, [(None, 2)])
            whole.step(tokens, [(None, 2)])
            found, wanted = (adapters.logits(one.hidden, [(None, 2)]).double() for one in (rows, whole))
            worst = max(worst, cache_proof.distance(found, wanted))
        eps = max(torch.finfo(adapters.dtype).eps, torch.finfo(torch.float32).eps)
        # Every rounding on the way counts. A wrong cache differs by the size of the logits.
        _GOES_ON[adapters] = worst <= min(0.2, 64 * eps * math.sqrt(10 * adapters.architecture.num_layers))
    return _GOES_ON[adapters]


def _in_the_stream(adapters: Adapters, requests: Sequence[Request]) -> list[Kind]:
    """Put all together, but for texts that outgrow their tables of positions: keys in a cache keep their angles."""
    move = adapters.architecture.tables_move
    if move is None:
        return [Kind(MANY if not requests or goes_on(adapters) else 0)] * len(requests)
    ends = [
        (n := len(r.prompt) + sum(cache_proof.learned_tokens(adapters, r.adapter)), n + r.max_new_tokens)
        for r in requests
    ]
    return [Kind(0 if move(adapters.model, *pair) else MANY) for pair in ends]


def _in_padded_batches(adapters: Adapters, requests: Sequence[Request]) -> list[Kind]:
    """Put those of one length together, where the cache was proved for the base and the adapter."""
    some = {request.adapter: request for request in requests}
    tried = {name: cache_proof.verdict(adapters, name, r.prompt, r.slots) for name, r in some.items()}
    return [cache_proof.kind(adapters, r.adapter, len(r.prompt), tried[r.adapter]) for r in requests]


def _group(adapters: Adapters, parts: Sequence[Part], room: int) -> Decoding:
    return Group(adapters, parts, cache_name=cache_proof.verdict(adapters, None).cache_name)


def _decoder(adapters: Adapters, parts: Sequence[Part], room: int) -> Decoding:
    return Decoder(cast(EncoderDecoder, adapters.layout), parts)


PLANS: dict[type[Layout], Plan] = {
    Packed: Plan(_in_the_stream, CachedRows),
    Padded: Plan(_in_padded_batches, _group),
    EncoderDecoder: Plan(lambda adapters, requests: [Kind(MANY)] * len(requests), _decoder),
}
