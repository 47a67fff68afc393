"""One training step of many jobs: one forward and backward pass of the base, then every job updates by itself.

Three couplings would let jobs that share a batch change each other, and each has its answer here: every job's loss is
divided by its own number of tokens (over its whole accumulated batch, not a mean of means), every job has its own
optimizer and clipping, and every job draws from its own seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core.adapters import Adapters
from weft.layouts.by_blocks import goes_by_blocks
from weft.objectives.passes import Work, forward_losses, losses_by_blocks
from weft.training.job import Job


@dataclass(frozen=True)
class StepResult:
    """The figures of one job's step: mean loss per learned token, norm before clipping, rate, tokens seen."""

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
    weight = {
        job.name: sum(job.adapter.head.loss_weight(s) for micro in batches[job.name] for s in micro) for job in jobs
    }
    total: dict[str, Tensor] = {}
    passes = [
        [job for job in jobs if index < len(batches[job.name])]
        for index in range(max(len(micros) for micros in batches.values()))
    ]
    works = [
        [
            Work(
                j.name,
                batches[j.name][index],
                j.dropout_seed(index),
                divisor=weight[j.name],
                neftune_alpha=j.config.neftune_noise_alpha,
                objective=j.objective,
            )
            for j in present
        ]
        for index, present in enumerate(passes)
    ]
    for group in _losses(adapters, works):
        scaled: list[Tensor] = []
        for index, losses in group:
            present = passes[index]
            if index == 0:
                penalties = [job.adapter.penalty() for job in present]
                losses = [a if b is None else a + b.to(a.dtype) for a, b in zip(losses, penalties, strict=True)]
            scaled += [loss * job.progress.loss_scale for loss, job in zip(losses, present, strict=True)]
            for job, loss in zip(present, losses, strict=True):
                total[job.name] = total.get(job.name, 0) + loss.detach()
        torch.autograd.backward(scaled)
    results = {}
    for job in jobs:
        tokens = sum(s.size for micro in batches[job.name] for s in micro)
        rate = job.learning_rate()
        results[job.name] = StepResult(float(total[job.name]), job.update(tokens), rate, tokens)
    return results


def _losses(adapters: Adapters, works: Sequence[Sequence[Work]]) -> Iterator[list[tuple[int, list[Tensor]]]]:
    """The losses of each pass, with its number; passes that go through the base together come together."""
    if len(works) > 1 and goes_by_blocks(adapters):
        yield list(enumerate(losses_by_blocks(adapters, works)))
        return
    for index, work in enumerate(works):
        yield [(index, forward_losses(adapters, work))]
