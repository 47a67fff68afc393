"""RLOO (Ahmadian et al. 2024): the baseline of an answer is the mean of the others in its group.

    R'_i = R_i - beta (sum over tokens of log policy / reference)        A_i = R'_i - mean of R'_j over the others
    loss of an answer = -min(rho A, clip(rho, 1 - epsilon, 1 + epsilon) A),  rho = policy / writer of the whole answer

The KL stands in the reward, where its plain estimate (k1) belongs.
"""

from __future__ import annotations

from collections.abc import Sequence

from pydantic import Field
from torch import Tensor

from weft.objectives.answers import Answers, Terms
from weft.objectives.rollouts import FAR, RolloutObjective, centred, clipped, log_ratios, rollout_metrics


class RLOO(RolloutObjective):
    """The settings of RLOO, under TRL's names."""

    beta: float = Field(0.05, ge=0, description="how much the KL to the reference takes off the reward")
    epsilon: float = Field(0.2, gt=0, lt=1, description="how far the ratio may move")
    num_generations: int = Field(2, gt=1, description="answers to each prompt")

    def advantages(self, rewards: Tensor, kl: Tensor) -> Tensor:
        centre, known = centred(rewards - self.beta * kl)
        count = known.sum(1, keepdim=True)
        # R_i - mean of the others = (R_i - mean of all) K / (K - 1).
        return centre * count / (count - 1).clamp(min=1)

    def denominators(self, counts: int, learned: Sequence[float]) -> dict[str, float]:
        return {"policy": counts}

    def terms(self, answers: Answers) -> Terms:
        assert answers.advantages is not None
        tokens = answers.tokens
        ratio = answers.sums(log_ratios(answers)).clamp(-FAR, FAR).exp()
        # An answer's tokens all have its advantage.
        own = answers.sums(answers.advantages) / answers.sizes.clamp(min=1)
        losses, clip = clipped(ratio, own, self.epsilon, self.epsilon)
        metrics = rollout_metrics(answers, clip[tokens.sequence], tokens.weights.to(losses.dtype))
        return Terms({"policy": losses.sum()}, metrics)
