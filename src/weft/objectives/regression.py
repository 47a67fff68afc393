"""A reward model that learns scores which somebody gave: the mean square of what it is wrong by.

    (s(answer) - score)^2

It is what transformers computes for a sequence classification with one label. A head begins near 0; scores far from 0
or far apart are learned sooner where ``mean`` and ``scale`` say how they lie.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from weft.objectives.answers import AnswerObjective, Answers, Judgement, Terms, seen


class Regression(AnswerObjective):
    """The settings of a reward model over scores."""

    judgement: ClassVar[Judgement] = "scores"
    scores: ClassVar[bool] = True
    rate_share: ClassVar[float] = 0.5

    mean: float = Field(0.0, description="what is taken from each score of the data before it is learned")
    scale: float = Field(1.0, gt=0, description="by what it is divided then")

    def denominators(self, counts: int, learned: Sequence[float]) -> dict[str, float]:
        return {"answers": counts}

    def terms(self, answers: Answers) -> Terms:
        scores = answers.scores
        assert scores is not None
        given = torch.tensor(list(answers.given), dtype=scores.dtype, device=scores.device)
        wanted = (given - self.mean) / self.scale
        metrics = {
            "error": seen((scores - wanted).abs() * self.scale),
            "rewards/given": seen(given),
            "rewards/mean": seen(scores * self.scale + self.mean),
        }
        return Terms({"answers": (scores - wanted).square().sum()}, metrics)
