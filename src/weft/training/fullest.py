"""The pass of a run that holds most tokens: it is made before the first step, where memory may run out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import torch

from weft.core.adapters import Adapters
from weft.training.job import Job
from weft.training.splitting import Splitting
from weft.training.step import all_passes

# So many steps of a run are looked through.
_STEPS = 20_000


def pass_tokens(jobs: Sequence[Job], step: int) -> list[int]:
    """The tokens of each pass of a step, of all jobs together, with their virtual ones."""
    active = [job for job in jobs if job.parameters and step < job.total_steps]
    micros = [[job.batches.tokens(micro) for micro in job.batches[step]] for job in active]
    return [sum(one) for one in itertools.zip_longest(*micros, fillvalue=0)]


def fullest_step(jobs: Sequence[Job], first: int = 0) -> tuple[int, int]:
    """The step with the largest pass, of those with as large a one the one with most passes; and that pass's tokens.

    Steps before the ``first`` are left out.
    """

    def size(step: int) -> tuple[int, int, int]:
        tokens = pass_tokens(jobs, step)
        return max(tokens, default=0), len(tokens), -step

    last = max((job.total_steps for job in jobs), default=0)
    worst = max(range(first, min(last, first + _STEPS)), key=size, default=first)
    return worst, size(worst)[0]


def make_fullest_pass(adapters: Adapters, jobs: Sequence[Job], splitting: Splitting) -> None:
    """Make the fullest pass of the coming steps now, forward and back, and forget what it computed.

    If memory runs out, it does so here, and ``splitting`` knows from the first step on how large a pass may be. Nothing
    else is kept: the run is the same with this and without.

    Raises:
        UserError: Memory runs out in a pass of a single sequence.
    """
    active = [job for job in jobs if job.active and not job.rolls]  # how long answers become, nobody knows yet
    if not active:
        return
    step = fullest_step(active, min(job.progress.step for job in active))[0]
    tokens = pass_tokens(active, step)
    if not tokens:
        return
    index = tokens.index(max(tokens))
    batches, before = {}, {job.name: job.progress.step for job in active}
    device = adapters.device
    try:
        for job in active:
            job.progress.step = step
            if step < job.total_steps and index < len(micros := job.micro_batches()):
                batches[job.name] = [micros[index]]
        with torch.random.fork_rng([device] if device.type == "cuda" else []):
            all_passes(adapters, [job for job in active if job.name in batches], batches, splitting, update=False)
    finally:
        for job in active:
            job.progress.step = before[job.name]
            job.updates.forget_pass()
