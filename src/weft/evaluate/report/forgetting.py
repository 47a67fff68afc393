"""What a contestant forgot: the change of the loss on general text beside its base, and what it gained for that."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import KW_ONLY, dataclass

from weft.evaluate.report.comparison import Comparison, Figure, is_general
from weft.evaluate.report.sheet import Sheet

# Metrics of text, and each one's cross-entropy in nats (per token, or per byte).
_NATS: dict[str, Callable[[float], float]] = {
    "cross_entropy": float,
    "loss": float,
    "nats_per_token": float,
    "perplexity": math.log,
    "word_perplexity": math.log,
    "byte_perplexity": math.log,
    "bits_per_byte": lambda bits: bits * math.log(2),
    "bits_per_token": lambda bits: bits * math.log(2),
}


@dataclass(frozen=True)
class Forgetting:
    """The change of cross-entropy on one general text, in nats; ``stderr`` is of the paired difference, where known."""

    contestant: str
    task: str
    metric: str
    _: KW_ONLY
    change: float
    stderr: float | None


@dataclass(frozen=True)
class Trade:
    """A contestant in the plot: the mean gain over ``tasks``, and the mean change on all general texts."""

    contestant: str
    gain: float
    forgetting: float
    tasks: tuple[str, ...]


def forgetting_of(sheet: Sheet, comparison: Comparison) -> list[Forgetting]:
    """The changes on all general texts of all who have a reference there."""
    found = []
    for figure in comparison.figures:
        if not is_general(sheet.tasks[figure.task]) or figure.difference is None:
            continue
        base = comparison.figure(figure.difference.reference, figure.task)
        nats = next(
            (name for name in (figure.metric, *_NATS) if name in _NATS and _has(figure, name, comparison)), None
        )
        if base is None or nats is None:
            continue
        mine, theirs = (_named(one.contestant, figure.task, nats, comparison) for one in (figure, base))
        if mine is not None and theirs is not None and mine > 0 and theirs > 0:
            same = nats == figure.metric and _NATS[nats] is float
            change = _NATS[nats](mine) - _NATS[nats](theirs)
            stderr = figure.difference.stderr if same else None
            found.append(Forgetting(figure.contestant, figure.task, nats, change=change, stderr=stderr))
    return found


def _has(figure: Figure, metric: str, comparison: Comparison) -> bool:
    return _named(figure.contestant, figure.task, metric, comparison) is not None


def _named(contestant: str, task: str, metric: str, comparison: Comparison) -> float | None:
    for one in (*comparison.figures, *comparison.others):
        if (one.contestant, one.task, one.metric) == (contestant, task, metric):
            return one.value
    return None


def trades(sheet: Sheet, comparison: Comparison, changes: list[Forgetting]) -> list[Trade]:
    """Gain and forgetting of everyone that has both; gains only of tasks whose figure is a share that should rise."""
    found = []
    for name in sheet.contestants:
        own = [one.change for one in changes if one.contestant == name]
        gains = {
            one.task: one.difference.value
            for one in comparison.figures
            if one.contestant == name
            and one.difference is not None
            and sheet.tasks[one.task].higher_is_better
            and 0 <= one.value <= 1
        }
        if own and gains:
            found.append(Trade(name, sum(gains.values()) / len(gains), sum(own) / len(own), tuple(gains)))
    return found
