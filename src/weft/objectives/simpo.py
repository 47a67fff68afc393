"""SimPO (Meng et al. 2024, equation 6): mean log-probabilities, a target margin, and no reference.

    -log s(b (l(chosen) - l(rejected)) - gamma),   l the mean log-probability of an answer's tokens
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

from pydantic import Field
from torch import Tensor
from torch.nn.functional import logsigmoid

from weft.objectives.answers import AnswerObjective, Answers, Terms, pair_metrics, pairs_of
from weft.objectives.dpo import first_of


class SimPO(AnswerObjective):
    """The settings of SimPO, under TRL's names."""

    uses_reference: ClassVar[bool] = False
    watches_chosen: ClassVar[bool] = True

    beta: float = Field(2.0, gt=0, description="the scale of the reward")
    simpo_gamma: float = Field(1.0, ge=0, description="the margin by which the better answer is to lead")
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="the share of pairs that may be swapped")
    sft_weight: float = Field(0.0, ge=0, description="how much the likelihood of the chosen answers counts beside")

    def weights(self) -> dict[str, float]:
        return {"sft": self.sft_weight}

    def denominators(self, counts: int, learned: Sequence[float]) -> dict[str, float]:
        return {"pairs": pairs_of(counts), **({"sft": learned[0]} if self.sft_weight else {})}

    def terms(self, answers: Answers) -> Terms:
        means, pairs = answers.sequence_logps / answers.sizes, answers.pairs
        losses = {"pairs": self.losses(means[pairs.better], means[pairs.worse]).sum()}
        if self.sft_weight:
            losses["sft"] = -answers.sequence_logps[first_of(answers)].sum()
        return Terms(losses, pair_metrics(answers, self.beta * means))

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The losses [P] of the mean log-probabilities [P] of the better answers and of the worse."""
        d, e = self.beta * (chosen - rejected) - self.simpo_gamma, self.label_smoothing
        return -(1 - e) * logsigmoid(d) - e * logsigmoid(-d) if e else -logsigmoid(d)
