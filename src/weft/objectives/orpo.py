"""ORPO (Hong et al. 2024): the likelihood of the chosen answer, and the odds of it against the rejected one's.

With l(y) the mean log-probability of an answer's tokens, log odds(y) = l(y) - log(1 - exp l(y)):

    -log p(chosen), per token  -  b log s(log odds(chosen) - log odds(rejected))
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from weft.objectives.answers import AnswerObjective, Answers, Terms, pair_metrics, pairs_of, seen
from weft.objectives.dpo import first_of


class ORPO(AnswerObjective):
    """The settings of ORPO, which needs no reference."""

    uses_reference: ClassVar[bool] = False

    beta: float = Field(0.1, gt=0, description="how much the odds count (the paper's lambda)")

    def denominators(self, counts: int, learned: Sequence[float]) -> dict[str, float]:
        return {"pairs": pairs_of(counts), "sft": learned[0]}

    def terms(self, answers: Answers) -> Terms:
        means, pairs = answers.sequence_logps / answers.sizes, answers.pairs
        odds = log_odds(means)
        ratio = odds[pairs.better] - odds[pairs.worse]
        losses = {
            "pairs": -self.beta * logsigmoid(ratio).sum(),
            "sft": -answers.sequence_logps[first_of(answers)].sum(),
        }
        return Terms(losses, pair_metrics(answers, self.beta * means) | {"log_odds_ratio": seen(ratio)})


def log_odds(logp: Tensor) -> Tensor:
    """``log p - log(1 - p)`` of log-probabilities [n], each below 0.

    Near 0 the difference 1 - p is made from expm1, near -inf from log1p, so that neither loses its digits (Maechler
    2012). A probability of 1 has no odds; it is taken as the nearest number below.
    """
    logp = logp.clamp(max=-torch.finfo(logp.dtype).eps)
    near = logp > -math.log(2)
    rest = torch.where(
        near, (-torch.expm1(torch.where(near, logp, -1.0))).log(), torch.log1p(-torch.where(near, -1.0, logp).exp())
    )
    return logp - rest
