"""Contexts with their continuations, and the passes in which they are read.

A pass is a sequence of rows. What several sequences of one adapter have in common at their beginning is laid out once,
in the first of them, and the others only see it (``Part.shared``).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import zip_longest

from weft.core.adapters import Adapters

# A beginning in common is worth a bucket of its own in every layer's attention from so many rows on that it saves.
_WORTH = 32
# A sequence that sees the rows of another copies their keys and values. So many times the rows of a pass, at most.
_SEEN = 4


@dataclass(frozen=True)
class Continuation:
    """Token ids, not empty, whose log-probability after a context, not empty, is asked for.

    ``slots``: places 0 … len(context) in the context at which an adapter's virtual tokens stand, as in ``Prompt``.
    """

    context: Sequence[int]
    ids: Sequence[int]
    slots: Sequence[int] = ()


@dataclass(eq=False, kw_only=True)
class Question:
    """One context of one adapter, and its continuations.

    Attributes:
        first: the place of the first one among those asked.
        virtual: how many tokens the adapter puts into each sequence.
        sequences: of each sequence the ids that it writes; a continuation may be the beginning of one, but for its
            last token, and then has none of its own.
        wanted: (place among those asked, ids, number of the sequence).
        alike: how many of its context's first tokens are those of the last question before it, in its pass and of its
            adapter, that has none in common with another.
    """

    adapter: str | None
    context: tuple[int, ...]
    slots: tuple[int, ...]
    first: int
    virtual: int = 0
    sequences: list[tuple[int, ...]] = field(default_factory=list)
    wanted: list[tuple[int, tuple[int, ...], int]] = field(default_factory=list)
    alike: int = 0

    @property
    def written(self) -> int:
        """The rows of its sequences behind the context: the last token of each is predicted, and not read."""
        return sum(map(len, self.sequences)) - len(self.sequences)

    @property
    def whole(self) -> int:
        """The rows of a sequence's context."""
        return len(self.context) + self.virtual

    @property
    def shared(self) -> list[int]:
        """Of each of its sequences, how many first tokens are shown to it (``Part.shared``)."""
        rest = len(self.sequences) - 1
        return [self.alike] * (rest + 1) if self.alike else [0] + [len(self.context)] * rest

    def rows(self, alike: int, *, shares: bool) -> int:
        """The rows that it takes of a pass, if so many first tokens of its context are those of another."""
        if alike or not shares:
            return len(self.sequences) * (self.whole - alike) + self.written
        return self.whole + self.written


def questions_of(
    adapters: Adapters, name: str | None, continuations: Sequence[Continuation], max_tokens: int
) -> Iterator[Question]:
    """The continuations of one adapter by their contexts, cut where one context's would be too many for a pass."""
    virtual = 0 if name is None else adapters[name].num_virtual_tokens
    shares = adapters.layout.shares_rows
    by_context: dict[tuple[tuple[int, ...], tuple[int, ...]], list[int]] = {}
    for index, one in enumerate(continuations):
        by_context.setdefault((tuple(one.context), tuple(one.slots)), []).append(index)
    for (context, slots), members in by_context.items():
        question = Question(adapter=name, context=context, slots=slots, first=members[0], virtual=virtual)
        # By what is read of them, backwards: one that is the beginning of another comes right after such a one.
        own = sorted(((tuple(continuations[i].ids), i) for i in members), key=lambda one: one[0][:-1], reverse=True)
        for ids, index in own:
            known = question.sequences
            if not known or known[-1][:-1][: len(ids) - 1] != ids[:-1]:
                if known and question.rows(0, shares=shares) + len(ids) > max_tokens:
                    yield question
                    question = Question(adapter=name, context=context, slots=slots, first=index, virtual=virtual)
                question.sequences.append(ids)
            question.wanted.append((index, ids, len(question.sequences) - 1))
        yield question


def planned(questions: Iterable[Question], max_tokens: int, *, shares: bool) -> Iterator[list[Question]]:
    """The questions in passes of at most ``max_tokens`` rows (or of one question).

    An adapter's that begin alike are in one pass, as far as it holds them, and what room is left takes those of others.
    """
    by_adapter: dict[str | None, list[Question]] = {}
    for one in questions:
        by_adapter.setdefault(one.adapter, []).append(one)
    own = [list(_apart(some, max_tokens, shares=shares)) for some in by_adapter.values()]
    batch: list[Question] = []
    held = 0
    for some, rows in (one for turn in zip_longest(*own) for one in turn if one is not None):
        if batch and held + rows > max_tokens:
            yield batch
            batch, held = [], 0
        batch += some
        held += rows
    if batch:
        yield batch


def _apart(questions: Sequence[Question], max_tokens: int, *, shares: bool) -> Iterator[tuple[list[Question], int]]:
    """The questions of one adapter in passes, with the rows of each; what begins alike comes side by side."""
    if shares:
        ordered = sorted(questions, key=lambda one: (one.context, one.first))
    else:  # padded batches are as long as their longest sequence; so the longest come first
        ordered = sorted(questions, key=lambda one: (-one.whole - one.written, one.first))
    batch: list[Question] = []
    held = seen = 0
    leader: Question | None = None  # the last one with rows of its own, which others have ``seen``
    for one in ordered:
        one.alike = _alike(one, leader, _SEEN * max_tokens - seen) if shares and leader else 0
        if batch and held + one.rows(one.alike, shares=shares) > max_tokens:
            yield batch, held
            batch, held, one.alike = [], 0, 0
        leader, seen = (leader, seen + one.alike * len(one.sequences)) if one.alike else (one, 0)
        batch.append(one)
        held += one.rows(one.alike, shares=shares)
    if batch:
        yield batch, held


def _alike(one: Question, leader: Question, room: int) -> int:
    """How many tokens of the leader's context to take over; 0 where that saves too little, or would copy too much."""
    if one.slots != leader.slots:
        return 0
    most = min(len(leader.context), len(one.context) - 1)  # a row of its own stands before its first new token
    count = next((i for i in range(most) if leader.context[i] != one.context[i]), most)
    saved = one.rows(0, shares=True) - one.rows(count, shares=True)
    return count if saved >= _WORTH and count * len(one.sequences) <= room else 0
