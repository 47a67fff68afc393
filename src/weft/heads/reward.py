"""A head with one output: the score of an answer, as a reward model gives it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from torch import Tensor

from weft.core.adapter import BuildContext
from weft.core.head import Batch, Sample, Supervised, supervised
from weft.heads.classification import ClassificationHead, ClassificationTask

SCORE = ("reward",)  # what the one output is called, where classes have names


@dataclass(frozen=True)
class RewardTask:
    """One score for each text."""

    labels: tuple[str, ...] = SCORE

    def build(self, context: BuildContext) -> RewardHead:
        """The head on the base of ``context``."""
        return RewardHead(self, context)


OwnHead = ClassificationTask | RewardTask


def task_of(labels: Sequence[str]) -> OwnHead:
    """What a head with these labels is to answer: one of them is a score, several are classes."""
    return RewardTask() if len(labels) == 1 else ClassificationTask(tuple(labels))


class RewardHead(ClassificationHead):
    """``score(h)`` of the last token of an answer: transformers' ``...ForSequenceClassification`` with one label.

    Where the last token stands is known by lengths and never by a token's id, so pads, their side and an end token that
    is the pad token too change nothing.
    """

    def learned(self, batch: Batch, samples: Sequence[Sample], sequences: Sequence[int]) -> Supervised:
        rows, count = self.rows(batch, sequences), len(samples)
        zeros, device = [0] * count, batch.input_ids.device
        return supervised(rows, zeros, [1.0] * count, owner=range(count), count=count, device=device)

    def losses(self, hidden: Tensor, targets: Tensor, base: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """The scores [n] themselves: there is no likelihood of a score."""
        return self(hidden)[:, 0]
