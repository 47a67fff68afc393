"""A reward model (Bradley and Terry 1952; Ouyang et al. 2022, equation 1): the better answer gets the higher score.

    -log s(s(chosen) - s(rejected) - margin)  +  c (s(chosen) + s(rejected))^2

The second term (``center_rewards_coefficient``) holds scores around 0, of which the first fixes differences alone.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch.nn.functional import logsigmoid

from weft.objectives.answers import AnswerObjective, Answers, Terms, pair_metrics, pairs_of


class Reward(AnswerObjective):
    """The settings of a reward model, under TRL's names."""

    uses_reference: ClassVar[bool] = False
    scores: ClassVar[bool] = True
    rate_share: ClassVar[float] = 0.5

    center_rewards_coefficient: float = Field(0.0, ge=0, description="how strongly scores are held around 0")

    def denominators(self, counts: int, learned: Sequence[float]) -> dict[str, float]:
        return {"pairs": pairs_of(counts)}

    def terms(self, answers: Answers) -> Terms:
        scores, pairs = answers.scores, answers.pairs
        assert scores is not None
        good, bad = scores[pairs.better], scores[pairs.worse]
        losses = -logsigmoid(good - bad - pairs.margins.to(scores.dtype))
        if self.center_rewards_coefficient:
            losses = losses + self.center_rewards_coefficient * (good + bad) ** 2
        return Terms({"pairs": losses.sum()}, pair_metrics(answers, scores))
