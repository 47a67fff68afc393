"""One training step of many jobs: one forward and backward pass of the base, then every job updates by itself.

Three couplings would let jobs that share a batch change each other, and each has its answer here: every job's loss is
divided by its own number of tokens (over its whole accumulated batch, not a mean of means), every job has its own
optimizer and clipping, and every job draws from its own seeds.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field

import torch
from torch import Tensor

from weft.core.adapters import Adapters
from weft.data import Sample
from weft.layouts.by_blocks import goes_by_blocks
from weft.objectives.passes import Work, forward_losses, losses_by_blocks
from weft.training.job import Job
from weft.training.judged import judging_of
from weft.training.splitting import Splitting, give_back, is_out_of_memory

# The micro-batches of every job's step, by its name.
_Batches = Mapping[str, list[list[Sample]]]


@dataclass(frozen=True)
class StepResult:
    """The figures of one job's step: mean loss per learned token, norm before clipping, rate, tokens seen; and what
    else there is to watch."""

    loss: float
    _: KW_ONLY
    grad_norm: float
    learning_rate: float
    tokens: int
    figures: Mapping[str, float] = field(default_factory=dict)


def train_step(adapters: Adapters, jobs: Sequence[Job], splitting: Splitting | None = None) -> dict[str, StepResult]:
    """Advance every job by one optimizer step.

    Jobs accumulate different numbers of micro-batches: pass p holds the p-th micro-batch of every job that has one, so
    that all are at a step's end together, and what shares a pass depends on the step alone (an exact resume needs it).
    Where memory runs out, the step begins again in smaller passes, which ``splitting`` remembers.

    Raises:
        UserError: Memory runs out in a pass of a single sequence, or where a step cannot begin again.
    """
    batches = {job.name: job.micro_batches() for job in jobs}
    total = all_passes(adapters, jobs, batches, splitting or Splitting())
    results = {}
    for job in jobs:
        tokens = sum(s.size for micro in batches[job.name] for s in micro)
        rate = job.learning_rate()
        norm = job.update(tokens)
        results[job.name] = StepResult(
            float(total[job.name]), grad_norm=norm, learning_rate=rate, tokens=tokens, figures=job.figures
        )
    return results


def all_passes(
    adapters: Adapters, jobs: Sequence[Job], batches: _Batches, splitting: Splitting, *, update: bool = True
) -> dict[str, Tensor]:
    """All passes of a step, in smaller ones where memory runs out; each job's loss, a scalar, by its name.

    ``update``: a tensor may be updated within the last of them.

    Raises:
        UserError: As ``train_step``.
    """
    while (total := _attempt(adapters, jobs, batches, splitting, update=update)) is None:
        # Here the failed pass is gone with its error. Its gradients, some whole and some not, go as well.
        for job in jobs:
            job.updates.forget_pass()
        give_back(adapters.device)
        splitting.halve(adapters)
    return total


def _attempt(
    adapters: Adapters, jobs: Sequence[Job], batches: _Batches, splitting: Splitting, *, update: bool
) -> dict[str, Tensor] | None:
    """What ``all_passes`` returns; None: memory ran out."""
    try:
        return _passes(adapters, jobs, batches, splitting, update=update)
    except (MemoryError, RuntimeError) as error:
        if not is_out_of_memory(error):
            raise
        return None


def _passes(
    adapters: Adapters, jobs: Sequence[Job], batches: _Batches, splitting: Splitting, *, update: bool
) -> dict[str, Tensor]:
    judged = [job for job in jobs if job.judged is not None]
    judging = {job.name: judging_of(adapters, job, batches[job.name], job.in_order()) for job in judged}
    weight = {
        job.name: 1.0
        if job.name in judging
        else sum(job.adapter.head.loss_weight(s) for micro in batches[job.name] for s in micro)
        for job in jobs
    }
    named = {job.name: job for job in jobs}
    pieces: list[list[Work]] = []
    for index in range(max(len(micros) for micros in batches.values())):
        work = [
            Work(
                j.name,
                batches[j.name][index],
                j.dropout_seed(index),
                divisor=weight[j.name],
                neftune_alpha=0.0 if j.judged else j.config.neftune_noise_alpha,
                objective=j.objective,
                judging=judging.get(j.name),
            )
            for j in jobs
            if index < len(batches[j.name])
        ]
        pieces += splitting.pieces(adapters, work)
    last = {str(one.adapter): number for number, piece in enumerate(pieces) for one in piece}
    total: dict[str, Tensor] = {}
    for group in _losses(adapters, pieces, splitting):
        scaled: list[Tensor] = []
        for number, found in group:
            present = [named[str(one.adapter)] for one in pieces[number]]
            penalties = [None if job.name in total else job.adapter.penalty() for job in present]
            losses = [a if b is None else a + b.to(a.dtype) for a, b in zip(found, penalties, strict=True)]
            scaled += [loss * job.progress.loss_scale for loss, job in zip(losses, present, strict=True)]
            for job, loss in zip(present, losses, strict=True):
                total[job.name] = total.get(job.name, 0) + loss.detach()
                if update and number == last[job.name]:
                    job.begin_last_pass()
        torch.autograd.backward(scaled)
    for name, one in judging.items():
        named[name].figures = one.tally.means()
    return total


def _losses(
    adapters: Adapters, pieces: Sequence[list[Work]], splitting: Splitting
) -> Iterator[list[tuple[int, list[Tensor]]]]:
    """The losses of each pass, with its number; passes that go through the base together come together."""
    if len(pieces) > 1 and goes_by_blocks(adapters):
        splitting.begin(max(pieces, key=lambda piece: sum(s.size for work in piece for s in work.samples)))
        yield list(enumerate(losses_by_blocks(adapters, pieces)))
        return
    for number, piece in enumerate(pieces):
        splitting.begin(piece)
        yield [(number, forward_losses(adapters, piece))]
