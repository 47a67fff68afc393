"""Samples, which are token ids with a loss weight each, and the drafts from which they are made."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass, field

from weft.errors import UserError


class TooLongError(UserError):
    """A record is longer than ``max_length``. The class lets a caller leave such records out."""


@dataclass(frozen=True, slots=True)
class Sample:
    """Token ids and, for each, the loss weight of PREDICTING it: ``weights[i]`` scales the loss of ``input_ids[i]``
    given ``input_ids[:i]``. Equal lengths; ``weights[0]`` is 0.0, for nothing predicts the first token.

    ``slots``: places in ``input_ids`` before which a slot for virtual tokens stands, ascending, several may be equal
    (in a sample without learned tokens also ``len(input_ids)``: after the last).
    ``answer``: the place where the last learned answer begins, None for plain text and where no turn is learned.
    ``label``: the class, and ``token_types`` the segment of each token (empty: all 0), of classification data.
    ``target_ids``: what a sequence-to-sequence model is to write. With either of these, ``weights`` are all 0.0.
    ``cut``: how many tokens of the record were left out to keep ``max_length``.
    ``branches``: of a record whose answers were judged, the places where each answer begins, in order; what stands
    before the first is the prompt of all, and each answer follows the prompt (``each``). ``given``: a number that
    the record gives: by how much the first is better, or the score of its one answer. ``facts``: of a prompt that is to
    be answered, the record as JSON.
    """

    input_ids: list[int]
    weights: list[float]
    source: str
    _: KW_ONLY
    slots: tuple[int, ...] = ()
    answer: int | None = None
    label: int | None = None
    target_ids: tuple[int, ...] = ()
    token_types: tuple[int, ...] = ()
    cut: int = 0
    branches: tuple[int, ...] = ()
    given: float = 0.0
    facts: str = ""

    @property
    def each(self) -> tuple[Sample, ...]:
        """A sample for each judged answer: the prompt, and the answer. Without branches it is the only one."""
        if not self.branches:
            return (self,)
        prompt, ends = self.branches[0], (*self.branches[1:], len(self.input_ids))
        found = []
        for begin, end in zip(self.branches, ends, strict=True):
            weights = self.weights[:prompt] + self.weights[begin:end]
            answer = next((place for place, weight in enumerate(weights) if weight), None)
            ids = self.input_ids[:prompt] + self.input_ids[begin:end]
            found.append(Sample(ids, weights, self.source, slots=self.slots, answer=answer))
        return tuple(found)

    @property
    def shared(self) -> tuple[int, ...]:
        """For each of ``each``, how many of its first tokens are those of the first one, which shares none (0)."""
        return (0, *(self.branches[0] for _ in self.branches[1:])) if self.branches else (0,)

    @property
    def size(self) -> int:
        """The number of tokens that a model reads."""
        return len(self.input_ids) + len(self.target_ids)

    @property
    def written(self) -> tuple[Sequence[int], Sequence[float]]:
        """The tokens that a model writes, and their weights: the targets if there are any, which are all learned."""
        if self.target_ids:
            return self.target_ids, [1.0] * len(self.target_ids)
        return self.input_ids, self.weights

    @property
    def learned(self) -> int:
        """The number of learned tokens."""
        return sum(map(bool, self.written[1]))


@dataclass(frozen=True, slots=True)
class Prompt:
    """The input of generation: token ids, and the places of slots, each 0 … len(ids), as in ``Sample.slots``."""

    ids: list[int]
    slots: tuple[int, ...] = ()


@dataclass(frozen=True, slots=True)
class Origin:
    """Where tokens of a draft come from: ``ids[skip : skip + count]`` of the characters [start, end) of the rendering.

    Tokens that are in no rendering (an automatic BOS, an EOS that the template lacks) have ``start == end``.
    """

    start: int
    end: int
    skip: int
    count: int


@dataclass(slots=True)
class Draft:
    """A sample that is not finished. ``answers`` are the places [start, end) of learned answers, in order.

    ``cut``: how many tokens of the record it has lost.
    """

    ids: list[int] = field(default_factory=list)
    weights: list[float] = field(default_factory=list)
    slots: list[int] = field(default_factory=list)
    _: KW_ONLY
    answers: list[tuple[int, int]] = field(default_factory=list)
    origins: list[Origin] = field(default_factory=list)
    cut: int = 0

    def add(
        self, ids: list[int], weight: float, slots: Iterable[int] = (), origin: tuple[int, int, int] = (0, 0, 0)
    ) -> None:
        """Append ids. ``slots`` count from the beginning of ``ids``; ``origin`` is an ``Origin`` without the count."""
        self.slots += [len(self.ids) + slot for slot in slots]
        self.ids += ids
        self.weights += [weight] * len(ids)
        self.origins.append(Origin(*origin, len(ids)))

    def open(self, ids: list[int]) -> None:
        """Put ids of weight 0 in front. Nothing predicts the first token, so it loses its weight."""
        n = len(ids)
        self.ids, self.weights = ids + self.ids, [0.0] * n + self.weights
        if self.weights:
            self.weights[0] = 0.0
        self.slots = [slot + n for slot in self.slots]
        self.answers = [(start + n, end + n) for start, end in self.answers]
        if ids:
            self.origins.insert(0, Origin(0, 0, 0, n))

    def remove(self, start: int, stop: int) -> None:
        """Remove the tokens [start, stop). Slots strictly between, or at the end of everything, go with them.

        A token after the gap would be predicted from text that is not there. So the first one loses its weight, and so
        does the rest of an answer that lost its beginning.
        """
        length, gap = len(self.ids), stop - start
        if gap <= 0:
            return
        if stop < length:
            torn = max((end for first, end in self.answers if first < stop < end), default=stop + 1)
            self.weights[stop:torn] = [0.0] * (torn - stop)
            self.slots = [slot if slot <= start else slot - gap for slot in self.slots if not start < slot < stop]
        else:  # a slot stands before a token, so one whose token is gone goes too
            self.slots = [slot for slot in self.slots if slot < start]
        self.answers = [
            (first if first < stop else first - gap, min(end, start) if end <= stop else end - gap)
            for first, end in self.answers
            if first < start or first >= stop
        ]
        del self.ids[start:stop], self.weights[start:stop]
        self.origins = list(_without(self.origins, start, stop))
        self.cut += gap

    def sample(self, source: str) -> Sample:
        """The finished sample."""
        answer = max((start for start, _ in self.answers if start < len(self.ids)), default=None)
        slots = tuple(slot for slot in self.slots if slot < len(self.ids))
        return Sample(self.ids, self.weights, source, slots=slots, answer=answer, cut=self.cut)


def _without(origins: Sequence[Origin], start: int, stop: int) -> Iterable[Origin]:
    at = 0
    for origin in origins:
        low, high = at, at + origin.count
        at = high
        if low < start:
            yield Origin(origin.start, origin.end, origin.skip, min(high, start) - low)
        if high > stop:
            gone = max(stop - low, 0)
            yield Origin(origin.start, origin.end, origin.skip + gone, origin.count - gone)
