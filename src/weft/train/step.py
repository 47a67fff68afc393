"""One training step of many jobs: one forward and backward pass of the base, then every job updates by itself.

Three couplings would let jobs that share a batch change each other, and each has its answer here: every job's loss is
divided by its own number of tokens (over its whole accumulated batch, not a mean of means), every job has its own
optimizer and clipping, and every job draws from its own seeds.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core.adapters import Adapters, head_scaling
from weft.core.stream import Part, Stream
from weft.data import Sample
from weft.data.batch import supervise
from weft.objectives import Head, likelihood
from weft.train.job import Job


@dataclass(frozen=True)
class Work:
    """One adapter's samples in one forward pass; ``divisor`` is the loss weight of its whole optimizer step."""

    adapter: str | None
    samples: Sequence[Sample]
    seed: int | None = None
    divisor: float = 1.0


def model_head(adapters: Adapters) -> Head:
    """The frozen output layer of the base."""
    head = adapters.model.get_output_embeddings()  # type: ignore[operator]
    softcap, scale = head_scaling(adapters.model)
    return Head(head.weight, getattr(head, "bias", None), softcap, scale)


def forward_losses(adapters: Adapters, work: Sequence[Work]) -> list[Tensor]:
    """Each entry's summed token loss divided by its divisor: one scalar tensor per entry of ``work``."""
    stream = adapters.stream([Part(w.adapter, [s.input_ids for s in w.samples], w.seed) for w in work])
    hidden, head = adapters.forward(stream), model_head(adapters)
    if adapters.exact:
        losses, begin = [], 0
        for w in work:
            # A copy of its own for every job: the same shapes and alignment as if it were alone.
            losses.append(_losses(hidden, head, stream, w.samples, begin).sum())
            begin += len(w.samples)
    else:
        samples = [sample for w in work for sample in w.samples]
        per_sequence = _losses(hidden, head, stream, samples, 0)
        losses = [part.sum() for part in per_sequence.split([len(w.samples) for w in work])]
    return [loss / w.divisor for loss, w in zip(losses, work, strict=True)]


def _losses(hidden: Tensor, head: Head, stream: Stream, samples: Sequence[Sample], begin: int) -> Tensor:
    batch = supervise(stream, samples, begin)
    return likelihood(hidden.index_select(0, batch.rows), head, batch)


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
    weight = {n: sum(sum(s.weights) for micro in micros for s in micro) for n, micros in batches.items()}
    total: dict[str, Tensor] = {}
    for index in range(max(len(micros) for micros in batches.values())):
        present = [job for job in jobs if index < len(batches[job.name])]
        work = [Work(j.name, batches[j.name][index], j.dropout_seed(index), weight[j.name]) for j in present]
        losses = forward_losses(adapters, work)
        scaled = [loss * job.progress.loss_scale for loss, job in zip(losses, present, strict=True)]
        torch.autograd.backward(scaled)
        for job, loss in zip(present, losses, strict=True):
            total[job.name] = total.get(job.name, 0) + loss.detach()
    results = {}
    for job in jobs:
        tokens = sum(len(s.input_ids) for micro in batches[job.name] for s in micro)
        rate = job.learning_rate()
        job.progress.tokens += tokens
        results[job.name] = StepResult(float(total[job.name]), job.update(), rate, tokens)
    return results


@torch.no_grad()
def evaluate_loss(
    adapters: Adapters,
    adapter: str | None,
    samples: Sequence[Sample],
    max_tokens: int = 4096,
    should_stop: Callable[[], bool] = lambda: False,
) -> float | None:
    """Mean loss per learned token over ``samples``, in passes of at most ``max_tokens`` tokens (or one sequence).

    None if ``should_stop``, asked before every pass, said yes.
    """
    total, weight, size = 0.0, 0.0, 0
    batch: list[Sample] = []
    for sample in (*samples, None):
        if should_stop():
            return None
        if batch and (sample is None or size + len(sample.input_ids) > max_tokens):
            (loss,) = forward_losses(adapters, [Work(adapter, batch)])
            total += float(loss)
            weight += sum(sum(s.weights) for s in batch)
            batch, size = [], 0
        if sample is not None:
            batch.append(sample)
            size += len(sample.input_ids)
    return total / weight
