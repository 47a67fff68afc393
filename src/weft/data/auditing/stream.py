"""The tokens of many samples end to end as arrays, so that a check of millions of tokens is a few operations."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import numpy as np

from weft.data.rendering.render import Sample

Array = np.ndarray[Any, np.dtype[Any]]


class Tokens:
    """``ids`` and ``weights`` of the tokens [N]; ``starts`` [samples + 1] is where each sample begins.

    Of a sequence-to-sequence sample these are the targets, all of which are learned.
    """

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples
        rows = [sample.target_ids or sample.input_ids for sample in samples]
        self.lengths: Array = np.fromiter((len(row) for row in rows), np.int64, len(rows))
        self.starts: Array = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        total = int(self.starts[-1])
        self.ids: Array = np.fromiter(chain.from_iterable(rows), np.int64, total)
        weights = ([1.0] * len(sample.target_ids) if sample.target_ids else sample.weights for sample in samples)
        self.weights: Array = np.fromiter(chain.from_iterable(weights), np.float32, total)
        # Samples with a label learn from none of their tokens; an answer is what the others are to end.
        self.writes: Array = np.array([sample.label is None for sample in samples], bool)
        answers = [bool(sample.target_ids) or sample.answer is not None for sample in samples]
        self.answers: Array = np.array(answers, bool)

    @property
    def learned(self) -> Array:
        """Whether each token is learned [N]."""
        return self.weights > 0

    def owner(self, places: Array) -> Array:
        """The sample that each place belongs to."""
        return np.searchsorted(self.starts, places, side="right") - 1

    def count(self, marks: Array) -> Array:
        """How many marked tokens (of a bool [N]) each sample has."""
        sums = np.concatenate([[0], np.cumsum(marks)])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]

    def stretches(self) -> tuple[Array, Array]:
        """Where stretches of learned tokens end (the last token of each), and the sample of each."""
        learned = self.learned
        after = np.append(learned[1:], False)
        after[self.starts[1:][self.lengths > 0] - 1] = False
        ends = np.flatnonzero(learned & ~after)
        return ends, self.owner(ends)

    def around(self, place: int, before: int = 12, after: int = 4) -> list[int]:
        """The ids near a place, within its sample."""
        sample = int(self.owner(np.array([place]))[0])
        first, last = max(int(self.starts[sample]), place - before), min(int(self.starts[sample + 1]), place + after)
        return [int(number) for number in self.ids[first:last]]
