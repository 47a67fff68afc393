"""Multiple choice: the choice of the highest log-probability, as it is or divided by its length.

Lengths are those of the choice's text without what stands between it and the question, as in lm_eval.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from weft.evaluate.metrics.base import Metric, Reply
from weft.evaluate.results import TaskKind


class Accuracy(Metric):
    """1 where the right choice has the highest log-probability; of equal ones the first counts."""

    kinds: ClassVar[frozenset[TaskKind]] = frozenset({"multiple_choice"})

    def lengths(self, choices: Sequence[str]) -> list[int]:
        """What each choice's log-probability is divided by."""
        return [1 for _ in choices]

    def score(self, reply: Reply) -> float:
        values = [logprob / n for logprob, n in zip(reply.logprobs, self.lengths(reply.choices), strict=True)]
        return float(values.index(max(values)) == reply.right)


class AccuracyPerCharacter(Accuracy):
    """The same with log-probabilities divided by the characters of the choice."""

    def lengths(self, choices: Sequence[str]) -> list[int]:
        return [max(1, len(choice)) for choice in choices]


class AccuracyPerByte(Accuracy):
    """The same with log-probabilities divided by the UTF-8 bytes of the choice."""

    def lengths(self, choices: Sequence[str]) -> list[int]:
        return [max(1, len(choice.encode())) for choice in choices]
