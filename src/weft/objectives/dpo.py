"""Direct preference optimisation and its relatives: a pair's better answer, beside the worse, against a reference.

With r(y) = log pi(y|x) - log ref(y|x), the sum over the answer's tokens, and d = r(chosen) - r(rejected):

    sigmoid       -log s(b d)                                    DPO, Rafailov et al. 2023, equation 7
    hinge         max(0, 1 - b d)                                SLiC, Zhao et al. 2023
    ipo           (d' - 1 / 2b)^2, d' of means over tokens       IPO, Azar et al. 2023, equation 17, as TRL has it
    ipo_sum       (d - 1 / 2b)^2                                 the same with sums, as the paper and OpenRLHF have it
    robust        (-(1 - e) log s(b d) + e log s(-b d)) / (1 - 2 e)     Chowdhury et al. 2024
    sigmoid_norm  -log s(b d')                                   length-normalised DPO

and with r+ = r(chosen), r- = r(rejected):

    apo_zero      1 - s(b r+) + s(b r-)                          APO, D'Oosterlinck et al. 2024, equation 7
    apo_down      s(b r+) + 1 - s(b d)                           the same, equation 8
    sppo_hard     (r+ - 1 / 2b)^2 + (r- + 1 / 2b)^2              SPPO, Wu et al. 2024, with hard verdicts
    nca_pair      -log s(b r+) - log s(-b r+) / 2 - log s(-b r-) / 2     NCA, Chen et al. 2024
    exo_pair      KL((s(b d), s(-b d)) || (1 - e, e))            EXO, Ji et al. 2024, equation 16

``label_smoothing`` e turns ``sigmoid`` into -(1 - e) log s(b d) - e log s(-b d) (conservative DPO).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import ClassVar, Literal, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor
from torch.nn.functional import logsigmoid, relu

from weft.objectives.answers import AnswerObjective, Answers, Terms, pair_metrics, pairs_of

_MEANS = ("ipo", "sigmoid_norm")
_SMOOTHED = ("sigmoid", "sigmoid_norm", "robust", "exo_pair")
LossType = Literal[
    "sigmoid", "hinge", "ipo", "ipo_sum", "robust", "sigmoid_norm", "apo_zero", "apo_down", "sppo_hard", "nca_pair",
    "exo_pair",
]  # fmt: skip


class DPO(AnswerObjective):
    """The settings of DPO, under TRL's names."""

    uses_reference: ClassVar[bool] = True
    watches_chosen: ClassVar[bool] = True

    beta: float = Field(0.1, gt=0, description="how strongly it is held to the reference")
    loss_type: LossType = Field(
        "sigmoid", description="the loss of a pair; `ipo` has means over tokens, as TRL, `ipo_sum` sums"
    )
    label_smoothing: float = Field(0.0, ge=0, lt=0.5, description="the share of pairs that may be swapped")
    sft_weight: float = Field(
        0.0, ge=0, description="how much the likelihood of the chosen answers counts beside (TRL's `rpo_alpha`)"
    )

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.label_smoothing and self.loss_type not in _SMOOTHED:
            raise ValueError(f"label_smoothing is for {', '.join(_SMOOTHED)}; {self.loss_type} has none")
        if self.loss_type == "exo_pair" and not self.label_smoothing:
            raise ValueError("exo_pair needs a label_smoothing above 0 (1e-3 is usual): it compares with 1 - e and e")
        return self

    def weights(self) -> dict[str, float]:
        return {"sft": self.sft_weight}

    def denominators(self, counts: int, learned: Sequence[float]) -> dict[str, float]:
        return {"pairs": pairs_of(counts), **({"sft": learned[0]} if self.sft_weight else {})}

    def terms(self, answers: Answers) -> Terms:
        ratios, pairs = answers.ratios, answers.pairs
        means = ratios / answers.sizes if self.loss_type in _MEANS else ratios
        losses = {"pairs": self.losses(means[pairs.better], means[pairs.worse]).sum()}
        if self.sft_weight:
            losses["sft"] = -answers.sequence_logps[first_of(answers)].sum()
        return Terms(losses, pair_metrics(answers, self.beta * ratios))

    def losses(self, chosen: Tensor, rejected: Tensor) -> Tensor:
        """The losses [P] of the log-ratios [P] of the better answers and of the worse."""
        difference, b, e = chosen - rejected, self.beta, self.label_smoothing
        d = b * difference
        match self.loss_type:
            case "hinge":
                return relu(1 - d)
            case "ipo" | "ipo_sum":
                return (difference - 1 / (2 * self.beta)) ** 2
            case "robust":
                return (-(1 - e) * logsigmoid(d) + e * logsigmoid(-d)) / (1 - 2 * e)
            case "apo_zero":
                return 1 - torch.sigmoid(b * chosen) + torch.sigmoid(b * rejected)
            case "apo_down":
                return torch.sigmoid(b * chosen) + 1 - torch.sigmoid(d)
            case "sppo_hard":
                return (chosen - 1 / (2 * b)) ** 2 + (rejected + 1 / (2 * b)) ** 2
            case "nca_pair":
                return -logsigmoid(b * chosen) - logsigmoid(-b * chosen) / 2 - logsigmoid(-b * rejected) / 2
            case "exo_pair":
                to_first, to_second = logsigmoid(d), logsigmoid(-d)
                return to_first.exp() * (to_first - math.log1p(-e)) + to_second.exp() * (to_second - math.log(e))
            case _:
                return -(1 - e) * logsigmoid(d) - e * logsigmoid(-d) if e else -logsigmoid(d)


def first_of(answers: Answers) -> list[int]:
    """The number of each record's best answer."""
    begins, at = [], 0
    for count in answers.counts:
        begins.append(at)
        at += count
    return begins
