"""Batched generation in which every row has its own adapter, or none."""

from __future__ import annotations

import itertools
import math
import weakref
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal

import torch
from torch import Tensor

from weft.core.adapters import Adapters
from weft.core.embeddings import input_embeddings
from weft.core.route import Route, Segment
from weft.core.seq2seq import Decoder
from weft.core.stream import Part, Stream
from weft.errors import UserError
from weft.generate import cache_proof
from weft.generate.cache import KeyValueCache
from weft.generate.lockstep import Group
from weft.generate.sampling import Sampling, choose


@dataclass(frozen=True)
class Request:
    """One prompt for one adapter (None: the base)."""

    prompt: Sequence[int]
    adapter: str | None = None
    max_new_tokens: int = 64
    sampling: Sampling = field(default_factory=Sampling)
    slots: Sequence[int] = ()


@dataclass
class Completion:
    """What came out: token ids without the stop token, and why it ended (``stop`` or ``length``)."""

    ids: list[int]
    finish_reason: str = "length"


# (index of the request, token id), called as the tokens come.
TokenCallback = Callable[[int, int], None]


@torch.no_grad()
def generate(
    adapters: Adapters,
    requests: Sequence[Request],
    *,
    stop_ids: Collection[int],
    batch_size: int = 64,
    on_token: TokenCallback | None = None,
) -> list[Completion]:
    """Answer every request; the completions are in the requests' order.

    Rows of one batch are sorted by adapter (rows of an adapter are a slice of the stream) and by length. Of a model
    that only runs padded batches they have the same length (``weft.generate.lockstep``).

    Raises:
        UserError: a prompt is empty, or prompt and answer together exceed the model's length limit.
    """
    for request in requests:
        _check(request, adapters)
    done: dict[int, Completion] = {}
    for indices, way in _batches(adapters, requests, batch_size):
        batch = _Batch(adapters, [requests[i] for i in indices], indices, frozenset(stop_ids), on_token, way)
        done.update(zip(indices, batch.run(), strict=True))
    return [done[i] for i in range(len(requests))]


# Adapters -> whether a step from the stream's cache was proved to give what the whole text gives.
_GOES_ON: weakref.WeakKeyDictionary[Adapters, bool] = weakref.WeakKeyDictionary()
_STEPS = 3  # of that proof


def goes_on(adapters: Adapters) -> bool:
    """Whether the base may go on from the cache of the stream: tried once, on two short texts.

    A layer that attends twice in one pass, or that is run several times, would overwrite its own keys.
    """
    if adapters not in _GOES_ON:
        vocabulary = int(input_embeddings(adapters.model).weight.shape[0])
        texts = [[(7 * i + n) % vocabulary for i in range(n)] for n in (4, 9)]
        room = adapters.architecture.max_length
        if room is not None and room < 9 + _STEPS:
            return True  # no text of this base is long enough to be tried
        batch = _Batch(
            adapters, [Request(text, max_new_tokens=_STEPS + 1) for text in texts], [0, 1], frozenset(), None
        )
        cache, logits = batch._prefill()
        worst = 0.0
        for _ in range(_STEPS):
            tokens = batch._take(logits, set())
            logits = batch._decode(cache, tokens)
            stream = adapters.stream([batch._part(None, [0, 1])])
            last = torch.tensor(stream.lengths, device=adapters.device).cumsum(0) - 1
            whole = adapters.logits(adapters.forward(stream)[last], batch._counts()).double()
            worst = max(worst, float(((logits.double() - whole).norm(dim=-1) / whole.norm(dim=-1)).max()))
        eps = max(torch.finfo(adapters.dtype).eps, torch.finfo(torch.float32).eps)
        # Every rounding on the way counts; what is wrong is wrong by the size of the logits.
        _GOES_ON[adapters] = worst <= min(0.2, 64 * eps * math.sqrt(10 * adapters.architecture.num_layers))
    return _GOES_ON[adapters]


# How rows go on: from a cache of their own lengths, from one in which all are equally long, or from the beginning.
Way = Literal["stream", "lock step", "again"]


def _batches(adapters: Adapters, requests: Sequence[Request], size: int) -> Iterator[tuple[list[int], Way]]:
    """Which requests go together, and how: models that only run padded batches go in lock step."""
    move = adapters.architecture.tables_move
    if move is not None and not adapters.padded:
        # Keys in a cache keep the angles that they were given; a text that outgrows its tables begins anew.
        ends = [(n := len(r.prompt) + sum(cache_proof.learned_tokens(adapters, r.adapter)), n + r.max_new_tokens)
                for r in requests]  # fmt: skip
        moved = [move(adapters.model, *pair) for pair in ends]
        for again in (False, True):
            order = sorted((i for i in range(len(requests)) if moved[i] is again),
                           key=lambda i: (requests[i].adapter or "", len(requests[i].prompt)))  # fmt: skip
            for start in range(0, len(order), size):
                yield order[start : start + size], "again" if again else "stream"
        return
    kinds = [cache_proof.Kind()] * len(requests)
    if adapters.padded and adapters.architecture.task != "seq2seq":
        some = {request.adapter: request for request in requests}
        tried = {name: cache_proof.verdict(adapters, name, r.prompt, r.slots) for name, r in some.items()}
        kinds = [cache_proof.kind(adapters, r.adapter, len(r.prompt), tried[r.adapter]) for r in requests]
    order = sorted(range(len(requests)), key=lambda i: (kinds[i], requests[i].adapter or "", len(requests[i].prompt)))
    for kind, found in itertools.groupby(order, key=lambda i: kinds[i]):
        same = list(found)
        most = min(size, kind.rows or size)
        for start in range(0, len(same), most):
            again = adapters.padded or not goes_on(adapters)
            yield same[start : start + most], "lock step" if kind.rows else "again" if again else "stream"


def check_writes(adapters: Adapters, name: str | None) -> None:
    """Whether the base writes text, under adapter ``name``.

    Raises:
        UserError: the base is an encoder, or the adapter was trained to classify.
    """
    what = "A classification adapter answers with a label: weft generate, or weft.evaluate.predict."
    if adapters.architecture.bidirectional:
        raise UserError(f"a {adapters.architecture.model_type} model is an encoder: it writes no text. {what}")
    if name is not None and adapters[name].head is not None:
        raise UserError(f"adapter '{name}' was trained to classify; it writes no text. {what}")


def _check(request: Request, adapters: Adapters) -> None:
    check_writes(adapters, request.adapter)
    if not request.prompt:
        raise UserError("a prompt without a single token cannot be continued.")
    if request.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {request.max_new_tokens}; at least 1 is needed.")
    learned = 0
    if request.adapter is not None:
        adapter = adapters[request.adapter]
        learned = adapter.num_virtual_tokens + adapter.num_prefix_tokens
    limit, length = adapters.architecture.max_length, len(request.prompt) + learned
    if limit is not None and length + request.max_new_tokens > limit:
        raise UserError(
            f"a prompt of {length} tokens and max_new_tokens {request.max_new_tokens} exceed the model's limit of "
            f"{limit}."
        )


class _Batch:
    """The rows that decode together; a row that has ended leaves when enough others have too."""

    def __init__(
        self,
        adapters: Adapters,
        requests: list[Request],
        indices: list[int],
        stop_ids: frozenset[int],
        on_token: TokenCallback | None,
        way: Way = "stream",
    ) -> None:
        self.way = way
        self.adapters, self.requests, self.indices = adapters, requests, indices
        self.stop_ids, self.on_token = stop_ids, on_token
        self.completions = [Completion([]) for _ in requests]
        self.generators = [r.sampling.generator() for r in requests]
        self.alive = list(range(len(requests)))

    def run(self) -> list[Completion]:
        if self.adapters.architecture.task == "seq2seq":
            return self._run_seq2seq()
        if self.way == "lock step":
            return self._run_in_lock_step()
        if self.way == "again":
            return self._run_without_cache()
        cache, logits = self._prefill()
        ended: set[int] = set()
        while True:
            tokens = self._take(logits, ended)
            if len(ended) == len(self.alive):
                return self.completions
            if 2 * len(ended) >= len(self.alive):
                keep = [i for i, row in enumerate(self.alive) if row not in ended]
                cache.keep(torch.tensor(keep, device=tokens.device))
                tokens, self.alive, ended = tokens[keep], [self.alive[i] for i in keep], set()
            logits = self._decode(cache, tokens)

    def _parts(self, rows: Sequence[int]) -> list[tuple[str | None, list[int]]]:
        return [(name, list(group)) for name, group in itertools.groupby(rows, key=lambda r: self.requests[r].adapter)]

    def _part(self, name: str | None, rows: Sequence[int]) -> Part:
        """The rows' prompts and what they have answered so far."""
        asked = [self.requests[r] for r in rows]
        texts = [[*request.prompt, *self.completions[r].ids] for r, request in zip(rows, asked, strict=True)]
        return Part(name, texts, None, [len(r.prompt) for r in asked], [r.slots for r in asked])

    def _prefill(self) -> tuple[KeyValueCache, Tensor]:
        parts = [self._part(name, rows) for name, rows in self._parts(self.alive)]
        plain = self.adapters.stream(parts)
        device = self.adapters.device
        cache = KeyValueCache(
            torch.tensor(plain.lengths, device=device),
            torch.tensor(plain.prefix_length, device=device),
            max(r.max_new_tokens for r in self.requests),
        )
        stream = self.adapters.stream(parts, cache=cache)
        hidden = self.adapters.forward(stream)
        cache.prefilled = True
        last = torch.tensor(plain.lengths, device=device).cumsum(0) - 1
        return cache, self.adapters.logits(hidden[last], self._counts())

    def _decode(self, cache: KeyValueCache, tokens: Tensor) -> Tensor:
        count = len(self.alive)
        segments = tuple(Segment(name, n, n, lengths=(1,) * n) for name, n in self._counts())
        route = Route(segments, cache=cache, exact=self.adapters.exact)
        limit = self.adapters.architecture.max_length
        # Rows that have ended keep their place until the batch is thinned; their positions must stay legal.
        positions = cache.lengths if limit is None else cache.lengths.clamp(max=limit - 1)
        positions = positions + self.adapters.architecture.first_position
        own = tuple(range(i, i + 1) for i in range(count))
        stream = Stream(tokens, positions, (1,) * count, own, {}, (0,) * count, route)
        hidden = self.adapters.forward(stream)
        cache.advance()
        return self.adapters.logits(hidden, self._counts())

    def _counts(self) -> list[tuple[str | None, int]]:
        return [(name, len(rows)) for name, rows in self._parts(self.alive)]

    def _run_without_cache(self) -> list[Completion]:
        """Where no cache was proved to give the same: every step runs the whole text again. Slow, and right."""
        ended: set[int] = set()
        while len(ended) < len(self.alive):
            parts = [self._part(name, rows) for name, rows in self._parts(self.alive)]
            stream = self.adapters.stream(parts)
            hidden = self.adapters.forward(stream)
            last = torch.tensor(stream.lengths, device=hidden.device).cumsum(0) - 1
            self._take(self.adapters.logits(hidden[last], self._counts()), ended)
            self.alive = [row for row in self.alive if row not in ended]
            ended.clear()
        return self.completions

    def _run_in_lock_step(self) -> list[Completion]:
        """For the same models, where a cache was proved to give the same: all prompts are equally long."""
        parts = [self._part(name, rows) for name, rows in self._parts(self.alive)]
        group = Group(self.adapters, parts, cache_name=cache_proof.verdict(self.adapters, None).cache_name)
        return self._advance(group, group.hidden)

    def _run_seq2seq(self) -> list[Completion]:
        """The prompts go through the encoder, once; every row of the decoder begins with the same token."""
        parts = [replace(self._part(name, rows), answers=()) for name, rows in self._parts(self.alive)]
        decoder = Decoder(self.adapters, parts)
        return self._advance(decoder, decoder.step(decoder.first_tokens, self._counts()))

    def _advance(self, rows: Decoder | Group, hidden: Tensor) -> list[Completion]:
        """Token by token, from the states [B, d] after what is there; all rows stand at the same place."""
        ended = set[int]()
        while True:
            tokens = self._take(self.adapters.logits(hidden, self._counts()), ended)
            if len(ended) == len(self.alive):
                return self.completions
            if 2 * len(ended) >= len(self.alive):
                keep = [i for i, row in enumerate(self.alive) if row not in ended]
                rows.keep(torch.tensor(keep, device=tokens.device))
                tokens, self.alive, ended = tokens[keep], [self.alive[i] for i in keep], set()
            hidden = rows.step(tokens, self._counts())

    def _take(self, logits: Tensor, ended: set[int]) -> Tensor:
        """Choose each row's next token, one per row of the cache; rows that end now join ``ended``."""
        samplings = [self.requests[r].sampling for r in self.alive]
        chosen = choose(logits, samplings, [self.generators[r] for r in self.alive])
        for row, token in zip(self.alive, chosen.tolist(), strict=True):
            if row in ended:
                continue
            completion = self.completions[row]
            if token in self.stop_ids:
                completion.finish_reason = "stop"
                ended.add(row)
                continue
            completion.ids.append(token)
            if self.on_token is not None:
                self.on_token(self.indices[row], token)
            if len(completion.ids) >= self.requests[row].max_new_tokens:
                ended.add(row)
        return chosen
