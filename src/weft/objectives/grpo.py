"""GRPO (Shao et al. 2024, equation 3) and its variants: an answer is as good as it is better than its group.

    A_i = (R_i - mean of the group) / (std of the group + 1e-4)
    loss of a token = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon_high) A) + beta KL,  rho = policy / writer

``loss_type`` says what the sum over tokens is divided by, always over the whole optimizer step:

    grpo      each answer by its own tokens, then by the number of answers
    dapo      by the number of tokens (Yu et al. 2025); TRL's bnpo, which has the tokens of a micro-batch, is this too
    dr_grpo   by answers times ``max_completion_length`` (Liu et al. 2025)

``importance_sampling_level: sequence`` takes one rho per answer, exp of the mean log-ratio of its tokens (GSPO, Zheng
et al. 2025).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, field_validator
from torch import Tensor

from weft.objectives.answers import Answers, Terms
from weft.objectives.rollouts import RolloutObjective, centred, clipped, kl_terms, log_ratios, rollout_metrics, spread

_EPS = 1e-4


class GRPO(RolloutObjective):
    """The settings of GRPO, under TRL's names."""

    beta: float = Field(0.0, ge=0, description="how much the KL to the reference counts in the loss")
    kl_estimator: Literal["k2", "k3"] = Field(
        "k3", description="estimate of the KL in the loss; `k1` has no place there: its gradient ignores the reference"
    )
    epsilon: float = Field(0.2, gt=0, lt=1, description="how far the ratio may fall")
    epsilon_high: float | None = Field(None, gt=0, description="how far it may rise; default: epsilon (DAPO: 0.28)")
    dual_clip: float | None = Field(None, gt=1, description="a bound of the loss for bad answers; 3 is usual")
    loss_type: Literal["dapo", "grpo", "dr_grpo", "bnpo"] = Field("dapo", description="what the sum is divided by")
    importance_sampling_level: Literal["token", "sequence"] = Field("token", description="what has a ratio of its own")
    scale_rewards: Literal["group", "batch", "none"] = Field(
        "group", description="by whose standard deviation advantages are divided"
    )

    @field_validator("kl_estimator", mode="before")
    @classmethod
    def _no_k1(cls, value: object) -> object:
        if value == "k1":
            raise ValueError("k1 has no place in a loss: its gradient does not know the reference. Take k3 or k2, or "
                             "the objective rloo, which has k1 in the reward")  # fmt: skip
        return value

    def advantages(self, rewards: Tensor, kl: Tensor) -> Tensor:
        centre, known = centred(rewards)
        if self.scale_rewards == "none":
            return centre
        if self.scale_rewards == "batch":
            values = rewards[known]
            return centre / (values.std() + _EPS) if len(values) > 1 else centre
        return centre / (spread(centre, known) + _EPS)

    def denominators(self, counts: int, learned: Sequence[float]) -> dict[str, float]:
        if self.loss_type == "grpo":
            return {"policy": counts}
        if self.loss_type == "dr_grpo":
            return {"policy": counts * self.max_completion_length}
        return {"policy": sum(learned)}

    def terms(self, answers: Answers) -> Terms:
        assert answers.advantages is not None
        weights = answers.tokens.weights.to(answers.logp.dtype)
        ratios = log_ratios(answers)
        if self.importance_sampling_level == "sequence":
            means = answers.sums(ratios) / answers.sizes.clamp(min=1)
            ratios = means[answers.tokens.sequence]
        ratio = ratios.exp()
        high = self.epsilon if self.epsilon_high is None else self.epsilon_high
        losses, clip = clipped(ratio, answers.advantages, self.epsilon, high, self.dual_clip)
        if self.beta:
            assert answers.reference is not None
            losses = losses + self.beta * kl_terms(answers.logp, answers.reference, self.kl_estimator, ratio)
        if self.loss_type == "grpo":
            weights = weights / answers.sizes.clamp(min=1)[answers.tokens.sequence]
        total = torch.dot(losses, weights)
        return Terms({"policy": total}, rollout_metrics(answers, clip, answers.tokens.weights.to(losses.dtype)))
