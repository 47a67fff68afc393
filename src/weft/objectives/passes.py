"""One pass of the base over samples of several adapters, and what their heads make of it.

Training, evaluation and the proof of a merge take their losses and logits from here.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import partial
from typing import TypeVar

import torch
from torch import Tensor

from weft.core.adapters import Adapters
from weft.core.head import Sample
from weft.core.stream import Part, Stream
from weft.errors import UserError
from weft.layouts.by_blocks import forward_by_blocks
from weft.objectives.classification import class_metrics
from weft.objectives.judging import Judging, judged_loss, judged_terms, part_of, reference_logps
from weft.objectives.likelihood import likelihood
from weft.objectives.registry import Objective, losses_of

AnySample = TypeVar("AnySample", bound=Sample)
EVALUATION_TOKENS = 4096  # of a pass that evaluates, at most


@dataclass(frozen=True)
class Work:
    """One adapter's samples in one pass; ``divisor`` is the loss weight of its whole optimizer step.

    ``objective`` takes the place of the likelihood, ``judging`` that of both: then the samples are records whose
    answers were judged, each of which is a sequence, and ``divisor`` stays 1.
    """

    adapter: str | None
    samples: Sequence[Sample]
    seed: int | None = None
    _: KW_ONLY
    divisor: float = 1.0
    neftune_alpha: float = 0.0
    objective: Objective | None = None
    judging: Judging | None = None

    def __post_init__(self) -> None:
        if not self.divisor > 0:
            raise UserError(
                f"the divisor of {self.adapter!r} is {self.divisor}; it must be above 0: the loss weight of its step, "
                "sum(adapter.head.loss_weight(sample) for sample in samples)."
            )

    def part(self) -> Part:
        """Its rows of a batch."""
        return part_of(self.adapter, self.samples, self.seed, self.neftune_alpha)

    @property
    def sequences(self) -> int:
        """How many sequences it has in a batch."""
        return sum(len(sample.each) for sample in self.samples) if self.judging else len(self.samples)


def forward_losses(adapters: Adapters, work: Sequence[Work]) -> list[Tensor]:
    """Each entry's loss divided by its divisor: one scalar tensor per entry of ``work``."""
    references = references_of(adapters, work)
    stream, hidden = adapters.run([w.part() for w in work])
    return _divided(_sequence_losses(adapters, work, stream, hidden, references), work)


def references_of(adapters: Adapters, work: Sequence[Work]) -> dict[int, Tensor]:
    """By the number of an entry of ``work`` what its reference says of its answers, [T]; all in one pass."""
    asked = {n: w for n, w in enumerate(work) if w.judging and w.judging.objective.uses_reference}
    if not asked:
        return {}
    judging = [w.judging for w in asked.values() if w.judging]
    names, soft = [one.reference for one in judging], [one.objective.softness for one in judging]
    found = reference_logps(adapters, names, [w.samples for w in asked.values()], soft)
    return dict(zip(asked, found, strict=True))


def losses_by_blocks(adapters: Adapters, passes: Sequence[Sequence[Work]]) -> list[list[Tensor]]:
    """``forward_losses``, scalars, of several passes: all go through a block before one goes through the next."""
    references = [references_of(adapters, work) for work in passes]
    streams = [adapters.stream([w.part() for w in work]) for work in passes]
    states = forward_by_blocks(adapters, streams)
    # From the last to the first, for the reason that ``forward_by_blocks`` has.
    found = [
        _divided(_sequence_losses(adapters, work, stream, hidden, known), work)
        for work, stream, hidden, known in list(zip(passes, streams, states, references, strict=True))[::-1]
    ]
    return found[::-1]


def _divided(losses: Sequence[Tensor], work: Sequence[Work]) -> list[Tensor]:
    return [loss.sum() / w.divisor for loss, w in zip(losses, work, strict=True)]


def sequence_losses(adapters: Adapters, work: Sequence[Work]) -> list[Tensor]:
    """The summed loss of every sequence [sequences], per entry of ``work``; of judged answers the loss of all [1]."""
    references = references_of(adapters, work)
    stream, hidden = adapters.run([w.part() for w in work])
    return _sequence_losses(adapters, work, stream, hidden, references)


def _sequence_losses(
    adapters: Adapters, work: Sequence[Work], stream: Stream, hidden: Tensor, references: Mapping[int, Tensor]
) -> list[Tensor]:
    ends = list(itertools.accumulate(w.sequences for w in work))
    losses: dict[int, Tensor] = {}
    for i, w in enumerate(work):
        if w.judging is not None:
            terms = judged_terms(
                adapters, w.adapter, w.judging, samples=w.samples, sequences=range(ends[i] - w.sequences, ends[i]),
                stream=stream, hidden=hidden, reference=references.get(i),
            )  # fmt: skip
            losses[i] = judged_loss(w.judging, terms)[None]
    plain = [i for i in range(len(work)) if i not in losses]
    # In exact mode each by itself: the same shapes and alignment as if no other job were there.
    shared = [i for i in plain if not (adapters.exact or work[i].objective) and adapters.shares_head(work[i].adapter)]
    for members in (*([i] for i in plain if i not in shared), *([shared] if shared else [])):
        samples = [sample for i in members for sample in work[i].samples]
        sequences = [number for i in members for number in range(ends[i] - len(work[i].samples), ends[i])]
        found = _losses(adapters, work[members[0]], stream, hidden=hidden, samples=samples, sequences=sequences)
        losses |= dict(zip(members, found.split([len(work[i].samples) for i in members]), strict=True))
    return [losses[i] for i in range(len(work))]


def _losses(
    adapters: Adapters,
    work: Work,
    stream: Stream,
    hidden: Tensor,
    samples: Sequence[Sample],
    sequences: Sequence[int],
) -> Tensor:
    """The summed loss of some sequences of a batch, all of one ``work`` or of some that share its head."""
    name, head = work.adapter, adapters.head(work.adapter)
    batch = head.learned(stream, samples, sequences)
    rows = [(name, len(batch.rows))]
    with adapters.router.use(adapters.rows_route(rows)):
        if work.objective is not None:
            logits = head.logits(hidden.index_select(0, batch.rows), partial(adapters.logits, rows=rows))
            return losses_of(work.objective, logits, batch)
        losses = head.losses(hidden.index_select(0, batch.rows), batch.targets, partial(adapters.losses, rows=rows))
    return likelihood(losses, batch)


def logits_of(adapters: Adapters, name: str | None, samples: Sequence[Sample]) -> Tensor:
    """Logits [n, tokens or classes] at all rows at which the samples are answered, in a pass of their own."""
    stream, hidden = adapters.run([Work(name, samples).part()])
    return answer_logits(adapters, name, stream, hidden, range(len(samples)))


def answer_logits(
    adapters: Adapters, name: str | None, stream: Stream, hidden: Tensor, sequences: Sequence[int]
) -> Tensor:
    """Such logits for some sequences of a batch, all of adapter ``name``, from its last hidden states [N, d]."""
    head = adapters.head(name)
    at = head.rows(stream, sequences)
    rows = [(name, len(at))]
    with adapters.router.use(adapters.rows_route(rows)):
        return head.logits(
            hidden.index_select(0, torch.tensor(at, device=hidden.device)), partial(adapters.logits, rows=rows)
        )


@dataclass(frozen=True)
class Evaluation:
    """Mean loss per learned token, or per sequence of a classification job, whose ``metrics`` are ``class_metrics``."""

    loss: float
    metrics: dict[str, float] = field(default_factory=dict)


@torch.no_grad()
def evaluate(
    adapters: Adapters,
    adapter: str | None,
    samples: Sequence[Sample],
    max_tokens: int = EVALUATION_TOKENS,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on ``samples``, in passes of at most ``max_tokens`` tokens (or one sequence).

    None if ``should_stop``, asked before every pass, said yes.

    Raises:
        UserError: Nothing is learned in the samples.
    """
    total, weight, head = 0.0, 0.0, adapters.head(adapter)
    predicted: list[int] = []
    for asked in passes(samples, max_tokens):
        if should_stop():
            return None
        work = Work(adapter, asked)
        stream, states = adapters.run([work.part()])
        total += float(_losses(adapters, work, stream, hidden=states, samples=asked, sequences=range(len(asked))).sum())
        weight += sum(map(head.loss_weight, asked))
        if head.labels:
            predicted += answer_logits(adapters, adapter, stream, states, range(len(asked))).argmax(-1).tolist()
    if not weight:
        raise UserError(f"there is nothing to evaluate on: {len(samples)} samples, in which nothing is learned.")
    metrics = class_metrics(predicted, [s.label for s in samples if s.label is not None]) if predicted else {}
    return Evaluation(total / weight, metrics)


def evaluate_loss(
    adapters: Adapters, adapter: str | None, samples: Sequence[Sample], max_tokens: int = EVALUATION_TOKENS
) -> float:
    """The loss of ``evaluate`` alone."""
    found = evaluate(adapters, adapter, samples, max_tokens)
    assert found is not None
    return found.loss


def passes(samples: Sequence[AnySample], max_tokens: int) -> Iterator[list[AnySample]]:
    """``samples`` in order, cut where a pass would hold more than ``max_tokens`` tokens."""
    batch: list[AnySample] = []
    held = 0
    for sample in samples:
        if batch and held + sample.size > max_tokens:
            yield batch
            batch, held = [], 0
        batch.append(sample)
        held += sample.size
    if batch:
        yield batch
