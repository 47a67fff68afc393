"""What objectives have in common whose answers the policy writes itself, and that are told only what each was worth."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor

from weft.objectives.answers import AnswerObjective, Answers, Judgement

# Beyond this a log-ratio says no more than "far away", and exp of it may overflow.
FAR = 20.0


@dataclass(frozen=True)
class Credit:
    """Of each answer its tokens' advantages [n], and their returns [n], if values are learned."""

    advantages: list[Tensor]
    returns: list[Tensor] | None = None


class RolloutObjective(AnswerObjective):
    """An objective over answers that the policy writes; the settings of writing and rewarding, under TRL's names.

    ``uses_values``: whether a job beside it learns what to expect.
    """

    judgement: ClassVar[Judgement] = "prompts"
    uses_reference: ClassVar[bool] = True
    uses_values: ClassVar[bool] = False
    watched: ClassVar[str] = "reward"

    rewards: tuple[object, ...] = Field(
        min_length=1, description="what an answer is worth: names of rewards, or mappings of one with its settings"
    )
    num_generations: int = Field(8, gt=1, description="answers to each prompt")
    max_completion_length: int = Field(256, gt=0, description="the longest answer in tokens")
    temperature: float = Field(1.0, gt=0, description="of writing; log-probabilities are those at it")
    top_p: float = Field(1.0, gt=0, le=1, description="of writing; below 1 the answers are not the policy's own")
    top_k: int = Field(0, ge=0, description="of writing; 0: all tokens")
    num_iterations: int = Field(1, gt=0, description="optimizer steps with the same answers")
    mask_truncated_completions: bool = Field(False, description="learn nothing from answers that have no end")

    @property
    def softness(self) -> float:
        return self.temperature

    def advantages(self, rewards: Tensor, kl: Tensor) -> Tensor:
        """The advantages [P, K] of K answers to each of P prompts.

        Args:
            rewards: [P, K], NaN where no reward had a say; such answers get 0.
            kl: [P, K], log policy / reference of each answer.
        """
        raise NotImplementedError

    def credit(
        self, rewards: Tensor, kl: Sequence[Tensor], values: Sequence[Tensor], kl_coef: float | None = None
    ) -> Credit:
        """By how much each token was better than expected: here all of an answer as much as the answer.

        Args:
            rewards: [P, K], NaN where no reward had a say.
            kl: of each answer log policy / reference of its tokens [n].
            values: of each answer what was expected before its tokens [n], where the objective ``uses_values``.
            kl_coef: what the KL counts now, where it changes.
        """
        sums = torch.stack([one.sum() for one in kl]).view_as(rewards)
        found = self.advantages(rewards, sums).flatten()
        return Credit([found[number].expand(len(one)) for number, one in enumerate(kl)])

    def next_kl_coef(self, now: float, kl: Tensor) -> float:
        """What the KL counts for the next answers; ``kl`` [answers] are the distances of the last ones."""
        return now


def log_ratios(answers: Answers) -> Tensor:
    """[T]: log policy / the policy that wrote, exactly 0 where that is the policy itself; never beyond ``FAR``."""
    old = answers.logp.detach() if answers.old is None else answers.old
    return (answers.logp - old).clamp(-FAR, FAR)


def clipped(
    ratio: Tensor, advantages: Tensor, low: float, high: float, dual: float | None = None
) -> tuple[Tensor, Tensor]:
    """The loss -min(ratio A, clip(ratio, 1 - low, 1 + high) A) of each [n], and whether the clip acts [n] (PPO,
    Schulman et al. 2017, equation 7). ``dual`` bounds it for negative A by -dual A (Ye et al. 2020)."""
    plain, cut = ratio * advantages, ratio.clamp(1 - low, 1 + high) * advantages
    found = torch.minimum(plain, cut)
    if dual is not None:
        found = torch.where(advantages < 0, torch.maximum(found, dual * advantages), found)
    return -found, (cut < plain).detach()


def kl_terms(logp: Tensor, reference: Tensor, kind: Literal["k2", "k3"], ratio: Tensor) -> Tensor:
    """The estimate [T] of KL(policy || reference) for a loss, of tokens that the policy wrote (Schulman 2020).

    k2 = (log policy / reference)^2 / 2, whose gradient is that of the KL on the policy's own answers.
    k3 = r - 1 - log r with r = reference / policy; ``ratio``, policy / writer, weighs it, without which its gradient is
    biased. k1 itself has no place in a loss: its gradient does not know the reference.
    """
    difference = (reference - logp).clamp(-FAR, FAR)
    if kind == "k2":
        return difference**2 / 2
    return ratio * (difference.exp() - 1 - difference)


def rollout_metrics(answers: Answers, clip: Tensor, weights: Tensor) -> dict[str, tuple[float, float]]:
    """What there is to watch, of tokens [T] with these weights: KL by k1, the entropy as the mean of -log p, clips."""
    count = float(weights.sum())
    found = {
        "entropy": (float((-answers.logp.detach() * weights).sum()), count),
        "clip_ratio": (float((clip * weights).sum()), count),
    }
    if answers.reference is not None:
        found["kl"] = (float(((answers.logp.detach() - answers.reference) * weights).sum()), count)
    return found


def centred(rewards: Tensor) -> tuple[Tensor, Tensor]:
    """Rewards [P, K] less the mean of those that are known in the group, 0 where none is; and which are known."""
    known = ~rewards.isnan()
    filled = rewards.nan_to_num(0.0)
    mean = filled.sum(1, keepdim=True) / known.sum(1, keepdim=True).clamp(min=1)
    return torch.where(known, filled - mean, 0.0), known


def spread(centre: Tensor, known: Tensor) -> Tensor:
    """The standard deviation [P, 1] of each group of ``centred`` rewards [P, K], with n - 1 as in torch."""
    return (centre.square().sum(1, keepdim=True) / (known.sum(1, keepdim=True) - 1).clamp(min=1)).sqrt()
