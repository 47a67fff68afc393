"""PPO (Schulman et al. 2017) as RLHF has it (Ziegler et al. 2019; Ouyang et al. 2022), and its value function.

    r_t = -kl_coef (log policy - log reference)_t, and the answer's reward on its last token
    d_t = r_t + gamma V_{t+1} - V_t        A_t = d_t + gamma lam A_{t+1}        return_t = A_t + V_t
    policy:  -min(rho A, clip(rho, 1 - cliprange, 1 + cliprange) A), A whitened over all real tokens of the step
    value:   max((V - return)^2, (clip(V, V_old - c, V_old + c) - return)^2) / 2

The value function is a job of its own beside the policy's, an adapter with a head of one output over the same base. It
sees the state before a token and learns in the same passes.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor

from weft.objectives.answers import AnswerObjective, Answers, Judgement, Terms, seen
from weft.objectives.rollouts import Credit, RolloutObjective, clipped, log_ratios, rollout_metrics

_EPS = 1e-8


class PPO(RolloutObjective):
    """The settings of PPO, under TRL's names."""

    uses_values: ClassVar[bool] = True

    num_generations: int = Field(1, gt=0, description="answers to each prompt")
    num_iterations: int = Field(4, gt=0, description="optimizer steps with the same answers (TRL's num_ppo_epochs)")
    kl_coef: float = Field(0.05, ge=0, description="how much the KL to the reference takes off the reward")
    target_kl: float | None = Field(
        None, gt=0, description="adapt kl_coef so that answers come this far from the reference (Ziegler et al. 2019)"
    )
    horizon: int = Field(10_000, gt=0, description="answers in which kl_coef may change e-fold, times five")
    gamma: float = Field(1.0, gt=0, le=1, description="what a reward one token later counts")
    lam: float = Field(0.95, ge=0, le=1, description="of generalised advantages: 0 trusts the values, 1 the rewards")
    cliprange: float = Field(0.2, gt=0, lt=1, description="how far the ratio may move")
    cliprange_value: float = Field(0.2, gt=0, description="how far a value may move from the old one")
    whiten_rewards: bool = Field(False, description="bring the tokens' rewards to variance 1")
    value_learning_rate: float | None = Field(None, gt=0, description="of the value function; default: the job's own")

    def credit(
        self, rewards: Tensor, kl: Sequence[Tensor], values: Sequence[Tensor], kl_coef: float | None = None
    ) -> Credit:
        coefficient = self.kl_coef if kl_coef is None else kl_coef
        known = (~rewards.isnan()).flatten().tolist()
        flat = rewards.nan_to_num(0.0).flatten()
        per_token = []
        for number, distance in enumerate(kl):
            own = -coefficient * distance
            own[-1] += flat[number]
            per_token.append(own)
        if self.whiten_rewards:
            per_token = whitened(per_token, known, shift=False)
        advantages = [gae(r, v, self.gamma, self.lam) for r, v in zip(per_token, values, strict=True)]
        returns = [a + v for a, v in zip(advantages, values, strict=True)]
        return Credit(whitened(advantages, known), returns)

    def next_kl_coef(self, now: float, kl: Tensor) -> float:
        """The coefficient for the next answers, after those of which ``kl`` [answers] are the distances."""
        if self.target_kl is None:
            return now
        error = min(max(float(kl.mean()) / self.target_kl - 1, -0.2), 0.2)
        return now * (1 + error * kl.numel() / self.horizon)

    def denominators(self, counts: int, learned: Sequence[float]) -> dict[str, float]:
        return {"policy": sum(learned)}

    def terms(self, answers: Answers) -> Terms:
        assert answers.advantages is not None
        weights = answers.tokens.weights.to(answers.logp.dtype)
        losses, clip = clipped(log_ratios(answers).exp(), answers.advantages, self.cliprange, self.cliprange)
        return Terms({"policy": torch.dot(losses, weights)}, rollout_metrics(answers, clip, weights))


class Value(AnswerObjective):
    """The value function of a PPO job, which Weft adds beside it."""

    judgement: ClassVar[Judgement] = "prompts"
    scores: ClassVar[bool] = True
    per_token: ClassVar[bool] = True
    rate_share: ClassVar[float] = 0.5
    watched: ClassVar[str] = "explained"

    of: str = Field(description="the name of the job whose values it learns")
    cliprange_value: float = Field(0.2, gt=0, description="how far a value may move from the old one")
    num_iterations: int = Field(4, gt=0, description="as the policy's")

    def denominators(self, counts: int, learned: Sequence[float]) -> dict[str, float]:
        return {"value": sum(learned)}

    def terms(self, answers: Answers) -> Terms:
        values, returns, old = answers.scores, answers.returns, answers.values
        assert values is not None
        assert returns is not None
        assert old is not None
        near = torch.minimum(torch.maximum(values, old - self.cliprange_value), old + self.cliprange_value)
        losses = torch.maximum((values - returns) ** 2, (near - returns) ** 2) / 2
        return Terms(
            {"value": torch.dot(losses, answers.tokens.weights.to(losses.dtype))},
            {"values": seen(values), "returns": seen(returns), "value_error": seen((values - returns) ** 2)},
        )


def gae(rewards: Tensor, values: Tensor, gamma: float, lam: float) -> Tensor:
    """Generalised advantages [n] of an answer's tokens (Schulman et al. 2016, equation 16). None follows the last."""
    found = torch.zeros_like(rewards)
    later, value = 0.0, 0.0
    for t in range(len(rewards) - 1, -1, -1):
        later = float(rewards[t] + gamma * value - values[t]) + gamma * lam * later
        value = float(values[t])
        found[t] = later
    return found


def whitened(values: Sequence[Tensor], known: Sequence[bool], *, shift: bool = True) -> list[Tensor]:
    """Each answer's values [n], brought to variance 1, and with ``shift`` to mean 0, over all that are ``known``.

    Only real tokens count: a pad would move the mean.
    """
    real = [value for value, knows in zip(values, known, strict=True) if knows]
    whole = torch.cat(real) if real else torch.zeros(0, dtype=torch.float64)
    if len(whole) < 2:
        return list(values)
    mean, scale = whole.mean(), (whole.var() + _EPS).rsqrt()
    return [(value - mean) * scale + (0.0 if shift else mean) for value in values]
