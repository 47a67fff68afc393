"""What an objective over judged answers is told, and what it gives back.

Such an objective is a pure function: log-probabilities of the policy and of a reference, or scores, go in; sums of
losses with their denominators, and figures to watch, come out. Whoever trains divides each sum by the denominator of
the whole optimizer step, so neither accumulation nor a neighbour changes a result.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import ClassVar, Literal

import torch
from pydantic import ConfigDict
from torch import Tensor

from weft.complaints import Worded
from weft.core.head import Supervised


@dataclass(frozen=True, eq=False)
class Answers:
    """The answers of R records, A in all, of T learned tokens together.

    Attributes:
        logp: [T], log-probability of each token under the policy; of an objective over scores only its
            size counts.
        tokens: where these tokens are (``weft.core.head.Supervised`` of A sequences), with their weights.
        counts: of each record the number of its answers; the first is the best.
        reference: [T], the same under the reference; None where the objective asks for none.
        scores: [A], of an objective over scores ([T], if it has one per token); else None.
        given: of each record, a number that its data gives: by how much the first is better, or its answer's score.
        labels: of each record, as its data says (1: good, 0: bad).
        point: KTO's reference point, of the whole step.
        advantages: [T], of answers that the policy wrote itself: by how much each token was better than expected.
        old: [T], the log-probabilities under the policy that wrote them; None: it is the policy as it is now.
        values, returns: [T], what was expected before each token when it was written, and what came.
    """

    logp: Tensor
    tokens: Supervised
    counts: Sequence[int]
    _: KW_ONLY
    reference: Tensor | None = None
    scores: Tensor | None = None
    given: Sequence[float] = ()
    labels: Sequence[int] = ()
    point: float = 0.0
    advantages: Tensor | None = None
    old: Tensor | None = None
    values: Tensor | None = None
    returns: Tensor | None = None

    @cached_property
    def sizes(self) -> Tensor:
        """[A]: the weight of each answer's tokens, in sum."""
        return self.tokens.per_sequence(torch.ones_like(self.logp))

    def sums(self, values: Tensor) -> Tensor:
        """[A]: the weighted sum of the values [T] of each answer's tokens."""
        return self.tokens.per_sequence(values)

    @cached_property
    def sequence_logps(self) -> Tensor:
        """[A]: the log-probability of each answer."""
        return self.sums(self.logp)

    @cached_property
    def ratios(self) -> Tensor:
        """[A]: log policy(answer) / reference(answer)."""
        assert self.reference is not None
        return self.sums(self.logp - self.reference)

    @cached_property
    def pairs(self) -> Pairs:
        """Every two answers of a record, the better one first."""
        better, worse, margins, begin = [], [], [], 0
        for number, count in enumerate(self.counts):
            for i in range(count):
                for j in range(i + 1, count):
                    better.append(begin + i)
                    worse.append(begin + j)
                    margins.append(self.given[number] if self.given else 0.0)
            begin += count
        device = self.logp.device
        return Pairs(
            torch.tensor(better, device=device, dtype=torch.int64),
            torch.tensor(worse, device=device, dtype=torch.int64),
            torch.tensor(margins, device=device, dtype=torch.float64),
        )


@dataclass(frozen=True)
class Pairs:
    """Pairs of answers by their numbers [P], and by how much the first is better [P]."""

    better: Tensor
    worse: Tensor
    margins: Tensor


@dataclass(frozen=True)
class Terms:
    """A loss in terms: sums (scalars), each of which has its own denominator over the step; and figures to watch, each
    as (sum, how many)."""

    losses: Mapping[str, Tensor]
    metrics: Mapping[str, tuple[float, float]] = field(default_factory=dict)


Judgement = Literal["preference", "kto", "scores", "prompts"]


class AnswerObjective(Worded):
    """An objective over judged answers; its fields are the settings.

    Attributes:
        judgement: the kind of data: pairs and rankings (``preference``), verdicts (``kto``), answers with ``scores``,
            or ``prompts``, whose answers the policy writes.
        uses_reference: whether it compares with a reference.
        scores: whether it learns scores, through a head with one output, instead of log-probabilities.
        per_token: whether it has a score for each token, read before it, and not one for the answer.
        mismatches: whether it needs a reference point, of answers put to other records' prompts.
        least_records: the fewest records of a step.
        rate_share: how much of a method's usual learning rate is usual here.
        watched: the figure that says how good it is, of an evaluation; higher is better.
        watches_chosen: whether it is a fault if the chosen answers become less likely.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    judgement: ClassVar[Judgement] = "preference"
    uses_reference: ClassVar[bool] = False
    scores: ClassVar[bool] = False
    per_token: ClassVar[bool] = False
    mismatches: ClassVar[bool] = False
    least_records: ClassVar[int] = 1
    rate_share: ClassVar[float] = 0.1
    watched: ClassVar[str] = "accuracy"
    watches_chosen: ClassVar[bool] = False

    @abstractmethod
    def denominators(self, counts: int, learned: Sequence[float]) -> dict[str, float]:
        """What a record of ``counts`` answers, whose tokens have these weights in sum, counts in each term's mean."""

    @abstractmethod
    def terms(self, answers: Answers) -> Terms:
        """The sums of some records' losses."""

    def weights(self) -> dict[str, float]:
        """What each term's mean counts in the loss; 1 if it is not named."""
        return {}

    @property
    def softness(self) -> float:
        """The temperature at which log-probabilities are taken."""
        return 1.0


def pairs_of(counts: int) -> float:
    """The number of pairs of so many answers."""
    return counts * (counts - 1) / 2


def seen(values: Tensor) -> tuple[float, float]:
    """The sum of values [n], and n."""
    return float(values.detach().sum()), float(values.numel())


def pair_metrics(answers: Answers, rewards: Tensor) -> dict[str, tuple[float, float]]:
    """What there is to watch of pairs with these rewards [A], under TRL's names but for ``accuracy``, which TRL calls
    ``rewards/accuracies``; and what the length alone would get right."""
    rewards, pairs = rewards.detach(), answers.pairs
    good, bad = rewards[pairs.better], rewards[pairs.worse]
    found = {
        "rewards/chosen": seen(good),
        "rewards/rejected": seen(bad),
        "rewards/margins": seen(good - bad),
        "accuracy": _in_order(rewards, pairs),
        "length_baseline": _in_order(answers.sizes, pairs),
    }
    if answers.scores is None:
        logps = answers.sequence_logps.detach()
        found |= {"logps/chosen": seen(logps[pairs.better]), "logps/rejected": seen(logps[pairs.worse])}
    return found


def _in_order(values: Tensor, pairs: Pairs) -> tuple[float, float]:
    """How often the better answer has the larger of the values [A]; equal ones count half."""
    good, bad = values[pairs.better], values[pairs.worse]
    return seen((good > bad).double() + (good == bad).double() / 2)
