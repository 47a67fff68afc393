"""KTO (Ethayarajh et al. 2024, equation 8): single answers, each good or bad, against a reference point.

With r(y) = log pi(y|x) - log ref(y|x), and z = max(0, the mean of r over answers put to another record's prompt), which
estimates how far the policy is from the reference and gets no gradient:

    good:  w (1 - s(b (r - z)))        bad:  w (1 - s(b (z - r)))

z is of the whole optimizer step; other tools take it of a device's batch, so that it changes with accumulation.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field

from weft.objectives.answers import AnswerObjective, Answers, Judgement, Terms, seen


class KTO(AnswerObjective):
    """The settings of KTO, under TRL's names."""

    judgement: ClassVar[Judgement] = "kto"
    uses_reference: ClassVar[bool] = True
    mismatches: ClassVar[bool] = True
    least_records: ClassVar[int] = 2

    beta: float = Field(0.1, gt=0, description="how strongly it is held to the reference")
    desirable_weight: float = Field(1.0, ge=0, description="what good answers count")
    undesirable_weight: float = Field(
        1.0, ge=0, description="what bad answers count; the paper asks for weights that make up for unequal numbers"
    )

    def denominators(self, counts: int, learned: Sequence[float]) -> dict[str, float]:
        return {"answers": counts}

    def terms(self, answers: Answers) -> Terms:
        ratios, point = answers.ratios, max(0.0, answers.point)
        good = torch.tensor(list(answers.labels), device=ratios.device) == 1
        sign = torch.where(good, 1.0, -1.0).to(ratios.dtype)
        weight = torch.where(good, self.desirable_weight, self.undesirable_weight).to(ratios.dtype)
        losses = weight * (1 - torch.sigmoid(self.beta * sign * (ratios - point)))
        rewards = self.beta * ratios.detach()
        metrics = {
            "rewards/chosen": seen(rewards[good]),
            "rewards/rejected": seen(rewards[~good]),
            "accuracy": seen((sign * (ratios.detach() - point) > 0).double()),
            "logps/chosen": seen(answers.sequence_logps[good]),
            "logps/rejected": seen(answers.sequence_logps[~good]),
            "kl": (point, 1.0),
        }
        return Terms({"answers": losses.sum()}, metrics)
