"""Judged answers in a pass: their log-probabilities under policy and reference, or scores, and what comes of them.

Log-probabilities are those of the model's own distribution over the whole vocabulary, at the objective's temperature,
in fp32 (fp64 for fp64 models), of the learned tokens. All that needs them takes them from here.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from weft.core.adapters import Adapters
from weft.core.head import Sample, Supervised, TokenHead
from weft.core.stream import Part, Stream
from weft.objectives.answers import AnswerObjective, Answers, Terms
from weft.ops.loss import losses_of_logits


class Tally:
    """Figures to watch, summed over the passes of a step or of an evaluation."""

    def __init__(self) -> None:
        self._sums: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def add(self, metrics: Mapping[str, tuple[float, float]]) -> None:
        """Take in the figures of a pass, each as (sum, how many)."""
        for name, (total, count) in metrics.items():
            held = self._sums[name]
            held[0] += total
            held[1] += count

    def means(self) -> dict[str, float]:
        """The mean of each figure; one that was never seen is left out."""
        return {name: total / count for name, (total, count) in self._sums.items() if count}

    def count(self, name: str) -> float:
        """How many values a figure is the mean of."""
        return self._sums[name][1]


@dataclass(frozen=True)
class Judging:
    """How a job's records are judged in a pass: the objective, its terms' denominators, and the reference's name."""

    objective: AnswerObjective
    denominators: Mapping[str, float]
    _: KW_ONLY
    reference: str | None = None
    point: float = 0.0
    tally: Tally = field(default_factory=Tally)


def part_of(
    adapter: str | None, samples: Sequence[Sample], seed: int | None = None, neftune_alpha: float = 0.0
) -> Part:
    """The rows of some records: each of their answers is a sequence, and those of a record share its prompt."""
    each = [answer for sample in samples for answer in sample.each]
    return Part(
        adapter,
        [s.input_ids for s in each],
        seed,
        answers=[s.answer for s in each],
        slots=[s.slots for s in each],
        neftune_alpha=neftune_alpha,
        token_types=[s.token_types for s in each],
        targets=[s.target_ids for s in each],
        shared=[count for sample in samples for count in sample.shared],
    )


def denominators_of(objective: AnswerObjective, samples: Sequence[Sample]) -> dict[str, float]:
    """What some records count in each term's mean, in sum."""
    total: dict[str, float] = defaultdict(float)
    for sample in samples:
        each = sample.each
        for name, value in objective.denominators(len(each), [sum(one.weights) for one in each]).items():
            total[name] += value
    return dict(total)


@torch.no_grad()
def reference_logps(
    adapters: Adapters,
    names: Sequence[str | None],
    records: Sequence[Sequence[Sample]],
    softness: Sequence[float] = (),
) -> list[Tensor]:
    """For each reference its records' log-probabilities [T], all in one pass that draws and keeps nothing.

    ``softness``: for each the temperature; default: 1.
    """
    stream, hidden = adapters.run([part_of(*pair) for pair in zip(names, records, strict=True)])
    found, begin = [], 0
    for name, samples, soft in zip(names, records, softness or [1.0] * len(names), strict=True):
        each = [answer for sample in samples for answer in sample.each]
        tokens = adapters.head(name).learned(stream, each, range(begin, begin + len(each)))
        found.append(token_logps(adapters, name, hidden, tokens, soft))
        begin += len(each)
    return found


def token_logps(
    adapters: Adapters, name: str | None, hidden: Tensor, tokens: Supervised, softness: float = 1.0
) -> Tensor:
    """``log p`` [T] of tokens under adapter ``name`` at a temperature, from the batch's last hidden states [N, d]."""
    rows, head = [(name, len(tokens.rows))], adapters.head(name)
    states = hidden.index_select(0, tokens.rows)
    with adapters.router.use(adapters.rows_route(rows)):
        if softness == 1.0:
            return -head.losses(states, tokens.targets, partial(adapters.losses, rows=rows))
        logits = head.logits(states, partial(adapters.logits, rows=rows))
        return -losses_of_logits(logits.to(torch.promote_types(logits.dtype, torch.float32)) / softness, tokens.targets)


def token_scores(adapters: Adapters, name: str | None, hidden: Tensor, tokens: Supervised) -> Tensor:
    """The scores [T] of adapter ``name``, whose head has one output, at rows of the last hidden states [N, d]."""
    rows = [(name, len(tokens.rows))]
    with adapters.router.use(adapters.rows_route(rows)):
        head = adapters.head(name)
        return head.logits(hidden.index_select(0, tokens.rows), partial(adapters.logits, rows=rows))[:, 0]


@torch.no_grad()
def expected_values(adapters: Adapters, name: str, samples: Sequence[Sample]) -> Tensor:
    """What the value function ``name`` expects before each learned token of some records [T]."""
    stream, hidden = adapters.run([part_of(name, samples)])
    each = [answer for sample in samples for answer in sample.each]
    return token_scores(adapters, name, hidden, TokenHead().learned(stream, each, range(len(each))))


def judged_terms(
    adapters: Adapters,
    name: str | None,
    judging: Judging,
    *,
    samples: Sequence[Sample],
    sequences: Sequence[int],
    stream: Stream,
    hidden: Tensor,
    reference: Tensor | None,
) -> Terms:
    """The terms of an adapter's records, whose answers are these sequences of the batch with last hidden states [N, d].

    ``reference``: the reference's log-probabilities [T], if the objective asks for them.
    """
    each = [answer for sample in samples for answer in sample.each]
    facts: dict[str, Any] = {
        "counts": [len(sample.each) for sample in samples],
        "given": [sample.given for sample in samples],
        "labels": [-1 if sample.label is None else sample.label for sample in samples],
    }
    head = adapters.head(name)
    tokens = head.learned(stream, each, sequences)
    if not judging.objective.scores:
        logp = token_logps(adapters, name, hidden, tokens, judging.objective.softness)
        old = _told(samples, "old", logp)
        facts |= {"advantages": _told(samples, "advantages", logp), "old": old if len(old) else None}
        answers = Answers(logp, tokens, reference=reference, point=judging.point, **facts)
        return judging.objective.terms(answers)
    if judging.objective.per_token:
        tokens = TokenHead().learned(stream, each, sequences)
        scores = token_scores(adapters, name, hidden, tokens)
        facts |= {key: _told(samples, key, scores) for key in ("values", "returns")}
        return judging.objective.terms(Answers(scores, tokens, scores=scores, **facts))
    scores = token_scores(adapters, name, hidden, tokens)
    sizes = torch.tensor([sum(one.weights) for one in each], dtype=torch.float64, device=hidden.device)
    answers = Answers(scores.new_ones(len(each)), replace(tokens, weights=sizes), scores=scores, **facts)
    return judging.objective.terms(answers)


def _told(samples: Sequence[Sample], key: str, like: Tensor) -> Tensor:
    """What records of answers that the policy wrote say of their learned tokens [T]; empty if nothing."""
    values = [value for sample in samples for value in getattr(sample, key, ())]
    return torch.tensor(values, dtype=like.dtype, device=like.device)


def judged_loss(judging: Judging, terms: Terms) -> Tensor:
    """The loss of a pass, a scalar: each term over its denominator of the whole step, times its weight."""
    weights = judging.objective.weights()
    judging.tally.add(terms.metrics)
    # Where nothing counts, as when no reward had a say, the sum is 0 too.
    parts = [weights.get(k, 1.0) * total / (judging.denominators[k] or 1.0) for k, total in terms.losses.items()]
    return torch.stack(parts).sum()
