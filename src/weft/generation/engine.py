"""Batched generation in which every row has its own adapter, or none."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.base.embeddings import input_embeddings
from weft.core.adapters import Adapters
from weft.core.layout import Counts
from weft.core.stream import Part
from weft.errors import UserError
from weft.generation.sampling import Drawing, choose
from weft.generation.ways import Begin, Request, batches
from weft.layouts.building import check_ids


@dataclass
class Completion:
    """The token ids of an answer, without the stop token, and why it ended (``stop`` or ``length``)."""

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

    Raises:
        UserError: a prompt is empty, or prompt and answer together exceed the model's length limit.
    """
    for index, request in enumerate(requests):
        check_ids(request.prompt, len(input_embeddings(adapters.model).weight), f"requests[{index}]: its prompt")
        _check(request, adapters)
    done: dict[int, Completion] = {}
    for indices, begin in batches(adapters, requests, batch_size):
        batch = _Batch(adapters, [requests[i] for i in indices], indices, frozenset(stop_ids), on_token)
        done.update(zip(indices, batch.run(begin), strict=True))
    return [done[i] for i in range(len(requests))]


def check_writes(adapters: Adapters, name: str | None) -> None:
    """Refuse a base that writes no text under adapter ``name``.

    Raises:
        UserError: the base is an encoder, or the adapter was trained to classify.
    """
    what = "A classification adapter answers with a label: weft generate, or weft.evaluate.predict."
    if not adapters.architecture.writes:
        raise UserError(f"a {adapters.architecture.model_type} model is an encoder: it writes no text. {what}")
    if not adapters.head(name).writes:
        raise UserError(f"adapter '{name}' was trained to classify; it writes no text. {what}")


def _check(request: Request, adapters: Adapters) -> None:
    check_writes(adapters, request.adapter)
    if request.max_new_tokens < 1:
        raise UserError(f"max_new_tokens is {request.max_new_tokens}; at least 1 is needed.")
    learned = 0 if request.adapter is None else adapters[request.adapter].num_learned_tokens
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
    ) -> None:
        self.adapters, self.requests, self.indices = adapters, requests, indices
        self.stop_ids, self.on_token = stop_ids, on_token
        self.completions = [Completion([]) for _ in requests]
        self.drawings = [Drawing(r.sampling, r.prompt) for r in requests]
        self.alive = list(range(len(requests)))

    def run(self, begin: Begin) -> list[Completion]:
        """Decode token by token, until every row has ended."""
        parts = [self._part(name, rows) for name, rows in self._groups()]
        rows = begin(self.adapters, parts, max(r.max_new_tokens for r in self.requests))
        ended = set[int]()
        while True:
            tokens = self._take(self.adapters.logits(rows.hidden, self._counts()), ended)
            if len(ended) == len(self.alive):
                return self.completions
            if 2 * len(ended) >= len(self.alive) or (ended and not rows.patient):
                keep = [i for i, row in enumerate(self.alive) if row not in ended]
                rows.keep(torch.tensor(keep, device=tokens.device))
                tokens, self.alive, ended = tokens[keep], [self.alive[i] for i in keep], set()
            rows.step(tokens, self._counts())

    def _groups(self) -> list[tuple[str | None, list[int]]]:
        groups = itertools.groupby(self.alive, key=lambda row: self.requests[row].adapter)
        return [(name, list(group)) for name, group in groups]

    def _counts(self) -> Counts:
        return [(name, len(rows)) for name, rows in self._groups()]

    def _part(self, name: str | None, rows: Sequence[int]) -> Part:
        asked = [self.requests[r] for r in rows]
        prompts = [r.prompt for r in asked]
        return Part(name, prompts, None, answers=[len(prompt) for prompt in prompts], slots=[r.slots for r in asked])

    def _take(self, logits: Tensor, ended: set[int]) -> Tensor:
        """Choose each row's next token, one per row of the cache; rows that end now join ``ended``."""
        choice = choose(logits, [self.drawings[r] for r in self.alive])
        for failure in choice.failures.values():
            raise UserError(failure)
        for row, token in zip(self.alive, choice.tokens, strict=True):
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
        return torch.tensor(choice.tokens, device=logits.device)
