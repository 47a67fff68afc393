"""The tokens of many samples end to end as arrays: a check of millions of tokens is a few operations."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np

from weft.data.views import Array, Samples


class Tokens:
    """``ids`` and ``weights`` of the tokens [N]; ``starts`` [samples + 1] is where each sample begins.

    A sequence-to-sequence sample has its targets here, all of which are learned.
    """

    def __init__(self, samples: Samples) -> None:
        self.samples = samples
        found = samples.columns()
        self.lengths, self.ids, self.weights = found.lengths, found.ids, found.weights
        self.starts: Array = np.concatenate([[0], np.cumsum(self.lengths)]).astype(np.int64)
        # A sample with a label learns none of its tokens. An answer must end; other text need not.
        self.writes: Array = ~found.labels
        self.answers: Array = found.targets | (found.answers >= 0)
        # Where the last answer begins within its sample; 0 without one.
        self.begins: Array = np.where(found.targets, 0, np.maximum(found.answers, 0))

    @property
    def learned(self) -> Array:
        """Whether each token is learned [N]."""
        return self.weights > 0

    def owner(self, places: Array) -> Array:
        """The sample of each place."""
        return np.searchsorted(self.starts, places, side="right") - 1

    def count(self, marks: Array) -> Array:
        """The number of marked tokens (``marks`` is a bool [N]) in each sample."""
        sums = np.concatenate([[0], np.cumsum(marks)])
        return sums[self.starts[1:]] - sums[self.starts[:-1]]

    def of(self, sample: int) -> list[int]:
        """The ids of one sample."""
        found: list[int] = self.ids[self.starts[sample] : self.starts[sample + 1]].tolist()
        return found

    def stretches(self) -> tuple[Array, Array]:
        """The places of the last token of each learned stretch, and the sample of each."""
        learned = self.learned
        after = np.append(learned[1:], False)
        after[self.starts[1:][self.lengths > 0] - 1] = False
        ends = np.flatnonzero(learned & ~after)
        return ends, self.owner(ends)

    def around(self, place: int, before: int = 12, after: int = 4) -> list[int]:
        """The ids near a place, within its sample."""
        sample = int(self.owner(np.array([place]))[0])
        first, last = max(int(self.starts[sample]), place - before), min(int(self.starts[sample + 1]), place + after)
        found: list[int] = self.ids[first:last].tolist()
        return found


def chunks(sizes: Array, limit: int) -> Iterator[tuple[int, int]]:
    """Stretches [first, last) whose sizes add up to about ``limit``, each of at least one."""
    if not len(sizes):
        return
    marks = np.cumsum(sizes) // limit
    edges = np.flatnonzero(np.diff(marks)) + 1
    yield from zip([0, *edges.tolist()], [*edges.tolist(), len(sizes)], strict=True)
