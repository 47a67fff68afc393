"""Rows that began together and go on together, for bases whose rows cannot join others on their way."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Sequence
from typing import final

import torch
from torch import Tensor

from weft.core.adapters import Adapters
from weft.core.layout import Counts, Decoding
from weft.core.stream import Part
from weft.generation.cache_proof import Kind
from weft.generation.request import Request
from weft.generation.row import Row
from weft.generation.way import Way, counts_of

# (adapters, prompts) -> the rows that go on.
Begin = Callable[[Adapters, Sequence[Part]], Decoding]
# What requests must have in common to go on together; of kind 0 none may share a cache.
Kinds = Callable[[Adapters, Sequence[Request]], list[Kind]]


@final
class Cohorts(Way):
    """Each step takes every cohort one token further; new rows form cohorts of their own."""

    def __init__(self, adapters: Adapters, kinds: Kinds, begin: Begin) -> None:
        self.adapters, self._kinds, self._begin = adapters, kinds, begin
        self._new: list[Row] = []
        self._cohorts: list[_Cohort] = []

    def add(self, row: Row) -> bool:
        self._new.append(row)
        return True

    def drop(self, row: Row) -> None:
        if row in self._new:
            self._new.remove(row)
        for cohort in [cohort for cohort in self._cohorts if row in cohort.rows]:
            cohort.left.add(row)
            if len(cohort.left) == len(cohort.rows):
                self._cohorts.remove(cohort)

    def step(self) -> list[tuple[list[Row], Tensor]]:
        for cohort in self._cohorts:
            cohort.step()
        new = self._new
        kinds = self._kinds(self.adapters, [row.request for row in new])
        kind = dict(zip(new, kinds, strict=True))
        new.sort(key=lambda row: (kind[row], row.adapter or "", len(row.request.prompt)))
        for shared, found in itertools.groupby(new, key=lambda row: kind[row]):
            same = list(found)
            for start in range(0, len(same), most := shared.rows or len(same)):
                begin = self._begin if shared.rows else RepeatedRows
                self._cohorts.append(_Cohort(self.adapters, same[start : start + most], begin))
        self._new = []
        return [(list(cohort.rows), cohort.decoding.hidden) for cohort in self._cohorts]


class _Cohort:
    """Rows and the decoding that holds them; rows in ``left`` go before the next step."""

    def __init__(self, adapters: Adapters, rows: list[Row], begin: Begin) -> None:
        self.rows, self.left = rows, set[Row]()
        parts = []
        for name, found in itertools.groupby(rows, key=lambda row: row.adapter):
            asked = [row.request for row in found]
            prompts = [request.prompt for request in asked]
            answers = [len(prompt) for prompt in prompts]
            parts.append(Part(name, prompts, None, answers=answers, slots=[request.slots for request in asked]))
        self.decoding = begin(adapters, parts)

    def step(self) -> None:
        device = self.decoding.hidden.device
        if self.left:
            keep = [i for i, row in enumerate(self.rows) if row not in self.left]
            self.decoding.keep(torch.tensor(keep, device=device))
            self.rows, self.left = [self.rows[i] for i in keep], set()
        tokens = torch.tensor([row.ids[-1] for row in self.rows], device=device)
        self.decoding.step(tokens, counts_of(self.rows))


@final
class RepeatedRows(Decoding):
    """Rows whose whole text runs again in every step, for want of a proved cache: this is slow, and right."""

    def __init__(self, adapters: Adapters, parts: Sequence[Part]) -> None:
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
