"""Where the jobs of a run are compared with each other, and leave before their last step.

Successive halving (Jamieson & Talwalkar 2016, algorithm 1) gives every job a few steps, keeps the best share of them,
gives these more, and so on. A rung is a step at which that happens. Whoever holds the jobs decides who leaves; it is
asked again after an interruption that came before its answer was saved, so it must give the same answer again.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from weft.training.job import Job
from weft.training.settings import eval_key

# The step and the figure of each job that is still there (not finite: it cannot be compared) -> why each of those that
# leave does so; None: that depends on jobs of other runs, which have not come so far. The run then saves and ends.
Judge = Callable[[int, Mapping[str, float]], Mapping[str, str] | None]


@dataclass(frozen=True)
class Rungs:
    """``steps`` at which the jobs of a run are compared by ``metric``, a key of their evaluations."""

    steps: tuple[int, ...]
    metric: str
    judge: Judge

    def figure(self, job: Job) -> float:
        """The figure of a job's last evaluation; NaN if there is none."""
        found = figures(job).get(self.metric)
        return math.nan if found is None else found


def figures(job: Job) -> dict[str, float | None]:
    """The figures of a job's last evaluation by their keys: ``eval_loss``, of a named set ``eval_domain_loss``."""
    progress = job.progress
    losses = progress.eval_loss if isinstance(progress.eval_loss, dict) else {"": progress.eval_loss}
    told = {eval_key(name, "loss"): loss for name, loss in losses.items()}
    return {**told, **{eval_key("", key): value for key, value in progress.metrics.items()}}
