"""Successive halving: which trials stay at which step.

With n trials, a factor η and T steps, the best n/η^k stay after T/η^(s-k+1) steps, k = 1 … s = ⌊log_η n⌋ (Jamieson &
Talwalkar 2016, algorithm 1; the names of Li et al. 2018, Hyperband).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from weft.errors import UserError
from weft.training.settings import JobConfig


@dataclass(frozen=True)
class Rung:
    """After ``step`` steps at most ``keep`` trials stay."""

    step: int
    keep: int


def rungs_of(jobs: Sequence[JobConfig], factor: int) -> tuple[Rung, ...]:
    """The rungs of these jobs. They lie where evaluations are, if the jobs evaluate while they train.

    Raises:
        UserError: The jobs do not have the same number of steps, or too few of them; or there is nothing to halve.
    """
    if factor < 2:
        raise UserError(f"--halving {factor}: expected 2 or more; 3 keeps the best third each time.")
    if len(jobs) < 2:
        raise UserError("--halving: there is one trial, and nothing to compare it with.")
    steps = {job.steps for job in jobs}
    if None in steps:
        raise UserError("--halving compares trials after the same number of steps, so it needs steps=N (not epochs).")
    if len(steps) > 1:
        raise UserError("--halving compares trials after the same number of steps; do not try other values of steps.")
    every = {job.eval_steps for job in jobs}
    if len(every) > 1:
        raise UserError("--halving compares trials where all are evaluated; do not try other values of eval_steps.")
    total, unit = int(steps.pop() or 0), every.pop() or 1
    count = _whole_log(len(jobs), factor)
    found: list[Rung] = []
    for number in range(1, count + 1):
        step = max(1, round(total / factor ** (count - number + 1) / unit)) * unit
        keep = max(1, len(jobs) // factor**number)
        if step < total and (not found or step > found[-1].step):
            found.append(Rung(step, keep))
        elif found:
            found[-1] = Rung(found[-1].step, keep)
    if not found:
        raise UserError(f"--halving {factor}: of {total} steps, evaluated every {unit}, none is left to compare at.")
    return tuple(found)


def _whole_log(number: int, base: int) -> int:
    """The largest k with base**k <= number."""
    found = 0
    while base ** (found + 1) <= number:
        found += 1
    return max(1, found)


def place(figures: Mapping[str, float], lower: bool) -> list[str]:
    """The names, the best first; of equal ones the first, and last those whose figure is not finite.

    ``lower``: a lower figure is better.
    """
    sign = 1.0 if lower else -1.0
    return sorted(figures, key=lambda name: (not math.isfinite(figures[name]), sign * _number(figures[name])))


def _number(value: float) -> float:
    return value if math.isfinite(value) else 0.0


def leaving(figures: Mapping[str, float], rung: Rung, metric: str, *, lower: bool) -> dict[str, str]:
    """Why each trial that leaves at a rung does so."""
    order = place(figures, lower)
    return {
        name: f"after {rung.step} steps {metric} was {figures[name]:.6g}, place {number} of {len(order)}"
        for number, name in enumerate(order, 1)
        if number > rung.keep
    }
