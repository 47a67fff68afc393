"""One training step of many jobs: one forward and backward pass of the base, then every job updates by itself.

Three couplings would let jobs that share a batch change each other, and each has its answer here: every job's loss is
divided by its own number of tokens (over its whole accumulated batch, not a mean of means), every job has its own
optimizer and clipping, and every job draws from its own seeds.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from weft.core.adapters import Adapters
from weft.core.embeddings import output_head
from weft.core.route import Route, Segment
from weft.core.seq2seq import run_seq2seq
from weft.core.stream import Part, Stream
from weft.data import Sample
from weft.data.batch import supervise
from weft.objectives import Head, Objective, class_metrics, classification, likelihood, likelihood_of_logits
from weft.train.batches import size
from weft.train.job import Job


@dataclass(frozen=True)
class Work:
    """One adapter's samples in one forward pass; ``divisor`` is the loss weight of its whole optimizer step.

    ``objective``: what is minimised instead of the likelihood.
    """

    adapter: str | None
    samples: Sequence[Sample]
    seed: int | None = None
    divisor: float = 1.0
    neftune_alpha: float = 0.0
    objective: Objective | None = None


def model_head(adapters: Adapters) -> Head:
    """The frozen output layer of the base, which is one by form (``HeadForm``)."""
    head = output_head(adapters.model)
    form = adapters.architecture.head_form
    assert form is not None
    assert head is not None
    return Head(head.weight, getattr(head, "bias", None), form.softcap, form.scale)


def forward_losses(adapters: Adapters, work: Sequence[Work]) -> list[Tensor]:
    """Each entry's summed loss divided by its divisor: one scalar tensor per entry of ``work``."""
    losses = sequence_losses(adapters, work)
    return [loss.sum() / w.divisor for loss, w in zip(losses, work, strict=True)]


def sequence_losses(adapters: Adapters, work: Sequence[Work]) -> list[Tensor]:
    """The summed loss of every sequence [sequences], per entry of ``work``."""
    stream, hidden = _forward(adapters, work)
    ends = list(itertools.accumulate(len(w.samples) for w in work))
    sequences = [range(end - len(w.samples), end) for w, end in zip(work, ends, strict=True)]
    losses: dict[int, Tensor] = {}
    shared = []
    for index, w in enumerate(work):
        if w.adapter is not None and adapters[w.adapter].head is not None:
            losses[index] = _class_losses(adapters, hidden, stream, w, sequences[index])
        elif w.objective or adapters.changes_head(w.adapter) or adapters.architecture.head_form is None:
            batch = supervise(stream, w.samples, sequences[index])
            logits = adapters.logits(hidden.index_select(0, batch.rows), [(w.adapter, len(batch.rows))])
            losses[index] = (w.objective or likelihood_of_logits)(logits, batch)
        elif adapters.exact:
            # By itself: the same shapes and alignment as if no other job were there.
            losses[index] = _token_losses(adapters, hidden, stream, w.samples, sequences[index])
        else:
            shared.append(index)
    if shared:
        samples = [sample for i in shared for sample in work[i].samples]
        numbers = [number for i in shared for number in sequences[i]]
        per_sequence = _token_losses(adapters, hidden, stream, samples, numbers)
        losses |= dict(zip(shared, per_sequence.split([len(work[i].samples) for i in shared]), strict=True))
    return [losses[i] for i in range(len(work))]


def _forward(adapters: Adapters, work: Sequence[Work]) -> tuple[Stream, Tensor]:
    parts = [_part(w) for w in work]
    if adapters.architecture.task == "seq2seq":
        return run_seq2seq(adapters, parts, [s.target_ids for w in work for s in w.samples])
    stream = adapters.stream(parts)
    return stream, adapters.forward(stream)


def _part(w: Work) -> Part:
    samples = w.samples
    return Part(
        w.adapter,
        [s.input_ids for s in samples],
        w.seed,
        [s.answer for s in samples],
        [s.slots for s in samples],
        w.neftune_alpha,
        [s.token_types for s in samples],
    )


def _token_losses(
    adapters: Adapters, hidden: Tensor, stream: Stream, samples: Sequence[Sample], sequences: Sequence[int]
) -> Tensor:
    batch = supervise(stream, samples, sequences)
    return likelihood(hidden.index_select(0, batch.rows), model_head(adapters), batch)


def class_logits(adapters: Adapters, hidden: Tensor, stream: Stream, name: str, sequences: Sequence[int]) -> Tensor:
    """Logits [n, classes] of some sequences of the stream, all of adapter ``name``, from its own head.

    What stands for a sequence is its first row if tokens see the whole sequence, else its last.
    """
    ends = list(itertools.accumulate(stream.lengths))
    bidirectional = adapters.architecture.bidirectional
    rows = [ends[i] - stream.lengths[i] if bidirectional else ends[i] - 1 for i in sequences]
    head = adapters[name].head
    assert head is not None
    # One row per sequence, for a pooler that the adapter changes.
    route = Route((Segment(name, len(rows), len(rows), lengths=(1,) * len(rows)),), exact=adapters.exact)
    with adapters.route(route):
        return head(hidden.index_select(0, torch.tensor(rows, device=hidden.device)))


def _class_losses(adapters: Adapters, hidden: Tensor, stream: Stream, w: Work, sequences: Sequence[int]) -> Tensor:
    assert w.adapter is not None
    logits = class_logits(adapters, hidden, stream, w.adapter, sequences)
    return classification(logits, _labels(w.samples, hidden.device))


def _labels(samples: Sequence[Sample], device: torch.device) -> Tensor:
    return torch.tensor([s.label for s in samples], device=device)


def loss_weight(sample: Sample) -> float:
    """What a sample counts in its job's mean: its learned tokens, or one if it is to be classified."""
    if sample.target_ids:
        return float(len(sample.target_ids))
    return sum(sample.weights) if sample.label is None else 1.0


@dataclass(frozen=True)
class StepResult:
    """Of one job: mean loss per learned token, norm of the gradients before clipping, rate used, tokens seen."""

    loss: float
    grad_norm: float
    learning_rate: float
    tokens: int


def train_step(adapters: Adapters, jobs: Sequence[Job]) -> dict[str, StepResult]:
    """Advance every job by one optimizer step.

    Jobs accumulate different numbers of micro-batches: pass p holds the p-th micro-batch of every job that has one, so
    that all are at a step's end together, and what shares a pass depends on the step alone (an exact resume needs it).
    """
    batches = {job.name: job.micro_batches() for job in jobs}
    weight = {n: sum(loss_weight(s) for micro in micros for s in micro) for n, micros in batches.items()}
    total: dict[str, Tensor] = {}
    for index in range(max(len(micros) for micros in batches.values())):
        present = [job for job in jobs if index < len(batches[job.name])]
        work = [
            Work(
                j.name,
                batches[j.name][index],
                j.dropout_seed(index),
                weight[j.name],
                j.config.neftune_noise_alpha,
                j.objective,
            )
            for j in present
        ]
        losses = forward_losses(adapters, work)
        if index == 0:
            penalties = [job.adapter.penalty() for job in present]
            losses = [a if b is None else a + b.to(a.dtype) for a, b in zip(losses, penalties, strict=True)]
        scaled = [loss * job.progress.loss_scale for loss, job in zip(losses, present, strict=True)]
        torch.autograd.backward(scaled)
        for job, loss in zip(present, losses, strict=True):
            total[job.name] = total.get(job.name, 0) + loss.detach()
    results = {}
    for job in jobs:
        tokens = sum(size(s) for micro in batches[job.name] for s in micro)
        rate = job.learning_rate()
        job.progress.tokens += tokens
        results[job.name] = StepResult(float(total[job.name]), job.update(), rate, tokens)
    return results


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
    max_tokens: int = 4096,
    should_stop: Callable[[], bool] = lambda: False,
) -> Evaluation | None:
    """Evaluate on ``samples``, in passes of at most ``max_tokens`` tokens (or one sequence).

    None if ``should_stop``, asked before every pass, said yes.
    """
    total, weight = 0.0, 0.0
    predicted: list[int] = []
    classifies = adapter is not None and adapters[adapter].head is not None
    for batch in passes(samples, max_tokens):
        if should_stop():
            return None
        if adapter is not None and classifies:
            logits = logits_of(adapters, adapter, batch)
            loss = classification(logits, _labels(batch, logits.device)).sum()
            predicted += logits.argmax(-1).tolist()
        else:
            (loss,) = forward_losses(adapters, [Work(adapter, batch)])
        total += float(loss)
        weight += sum(loss_weight(s) for s in batch)
    metrics = class_metrics(predicted, [s.label for s in samples if s.label is not None]) if classifies else {}
    return Evaluation(total / weight, metrics)


def evaluate_loss(adapters: Adapters, adapter: str | None, samples: Sequence[Sample], max_tokens: int = 4096) -> float:
    """The loss alone."""
    found = evaluate(adapters, adapter, samples, max_tokens)
    assert found is not None
    return found.loss


def passes(samples: Sequence[Sample], max_tokens: int) -> Iterator[list[Sample]]:
    """``samples`` in order, cut where a pass would hold more than ``max_tokens`` tokens."""
    batch: list[Sample] = []
    held = 0
    for sample in samples:
        if batch and held + size(sample) > max_tokens:
            yield batch
            batch, held = [], 0
        batch.append(sample)
        held += size(sample)
    if batch:
        yield batch


def logits_of(adapters: Adapters, name: str, samples: Sequence[Sample]) -> Tensor:
    """Class logits [n, classes] of some samples, in a pass of their own."""
    stream = adapters.stream([_part(Work(name, samples))])
    return class_logits(adapters, adapters.forward(stream), stream, name, range(len(samples)))
