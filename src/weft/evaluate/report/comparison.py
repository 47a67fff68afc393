"""Figures of every contestant on every task, and what each gains or loses beside its reference, item by item."""

from __future__ import annotations

import math
import zlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import numpy as np

from weft.evaluate.report.sheet import Sheet
from weft.evaluate.results import Item, TaskRecord
from weft.evaluate.statistics import DRAWS, holm, mcnemar_p, mean, paired_interval, permutation_p

LEVEL = 0.05
MCNEMAR, PERMUTATION = "McNemar, mid-p", "paired permutation"


@dataclass(frozen=True)
class Difference:
    """A contestant beside its reference, on the items that both answered.

    Attributes:
        value, stderr, low, high: the mean difference, its error, its 95 % interval by bootstrap. Where the figure is
            no mean over items (perplexity, BLEU, MCC), ``value`` is that of the two figures, and the others are None.
        items_change: the mean difference over the items, which is what ``test`` looks at.
        p: of ``test``; ``p_holm``: corrected for all ``tests`` of this report.
        gained, lost: items that were wrong and are right, and the other way; of scores between 0 and 1, those that rose
            and fell.
        counted: the scores are right or wrong, so that ``gained`` and ``lost`` are flips.
    """

    reference: str
    _: KW_ONLY
    value: float
    stderr: float | None
    low: float | None
    high: float | None
    items_change: float
    n: int
    test: str
    p: float
    p_holm: float
    gained: tuple[str, ...]
    lost: tuple[str, ...]
    counted: bool

    @property
    def found(self) -> bool:
        """Whether the test finds a difference at 5 %, after the correction."""
        return self.p_holm <= LEVEL

    @property
    def of_items(self) -> bool:
        """Whether the figure is a mean over items."""
        return self.low is not None


@dataclass(frozen=True)
class Figure:
    """One metric of one contestant on one task. ``difference`` is of the task's first metric alone; None without a
    reference, or where items have no score of that metric."""

    contestant: str
    task: str
    metric: str
    _: KW_ONLY
    value: float
    stderr: float | None
    n: int
    difference: Difference | None = None


@dataclass(frozen=True)
class Leaders:
    """Of one task: the one with the best figure, and those that a paired test (Holm) does not tell from it."""

    task: str
    best: str
    near: tuple[str, ...]


@dataclass(frozen=True)
class Comparison:
    """All figures of a sheet. ``figures`` hold the first metric of each task, ``others`` the rest."""

    figures: tuple[Figure, ...]
    others: tuple[Figure, ...]
    leaders: tuple[Leaders, ...]

    @property
    def tests(self) -> int:
        """How many tests the correction counts."""
        return sum(figure.difference is not None for figure in self.figures)

    def figure(self, contestant: str, task: str) -> Figure | None:
        """The first metric of a contestant on a task."""
        return next((one for one in self.figures if (one.contestant, one.task) == (contestant, task)), None)


def compare(sheet: Sheet, reference: str | None = None, *, seed: int = 0) -> Comparison:
    """Figures and paired differences of all on a sheet.

    ``reference``: the contestant that all others are compared with; None: the base. The draws of bootstrap and
    permutation come from ``seed`` and the names, so that a report made again is the same.
    """
    figures, others = [], []
    # The smallest p of the permutations, times the number of tests, must stay below the level.
    draws = max(DRAWS, 100 * len(sheet.answers) - 1)
    for task in sheet.tasks.values():
        for name in sheet.asked(task.name):
            for one in _figures(sheet, name, task):
                if one.metric != task.metric:
                    others.append(one)
                elif (beside := sheet.reference(name, reference)) is not None and (beside, task.name) in sheet.answers:
                    figures.append(replace(one, difference=_difference(sheet, name, beside, task, seed, draws)))
                else:
                    figures.append(one)
    leaders = tuple(_leaders(sheet, figures, task, seed) for task in _judged(sheet, figures))
    return Comparison(tuple(_corrected(figures)), tuple(others), leaders)


def _figures(sheet: Sheet, name: str, task: TaskRecord) -> Iterator[Figure]:
    items = sheet.answers[name, task.name]
    scored = dict.fromkeys(metric for item in items.values() for metric in item.scores)
    known = dict.fromkeys(metric for who, of, metric in sheet.scores if (who, of) == (name, task.name))
    for metric in dict.fromkeys([task.metric, *known, *scored]):
        score = sheet.scores.get((name, task.name, metric))
        values = [item.scores[metric] for item in items.values() if metric in item.scores]
        if score is not None and (not values or score.n == len(values)):
            yield Figure(name, task.name, metric, value=score.value, stderr=score.stderr, n=score.n)
        elif values:
            found = mean(values)
            yield Figure(name, task.name, metric, value=found.value, stderr=found.stderr, n=found.n)


def _difference(
    sheet: Sheet, name: str, reference: str, task: TaskRecord, seed: int, draws: int = DRAWS
) -> Difference | None:
    before, after = sheet.answers[reference, task.name], sheet.answers[name, task.name]
    pairs = _pairs(before, after, task.metric)
    if not pairs:
        return None
    values = np.array([two - one for _, one, two in pairs])
    counted = all(score in (0, 1) for _, one, two in pairs for score in (one, two))
    better = values if task.higher_is_better else -values
    gained = tuple(item for (item, *_), change in zip(pairs, better, strict=True) if change > 0)
    lost = tuple(item for (item, *_), change in zip(pairs, better, strict=True) if change < 0)
    generator = np.random.default_rng([seed, zlib.crc32(f"{name}\0{reference}\0{task.name}".encode())])
    p = float(mcnemar_p(len(lost), len(gained))) if counted else permutation_p(values, generator, draws)
    found, whole = mean(values), _of_figures(sheet, name, reference, task)
    low, high = paired_interval(values, generator) if whole is None else (None, None)
    return Difference(
        reference,
        value=found.value if whole is None else whole,
        stderr=found.stderr if whole is None else None,
        low=low,
        high=high,
        items_change=found.value,
        n=found.n,
        test=MCNEMAR if counted else PERMUTATION,
        p=p,
        p_holm=p,  # until all are known
        gained=gained,
        lost=lost,
        counted=counted,
    )


def _of_figures(sheet: Sheet, name: str, reference: str, task: TaskRecord) -> float | None:
    """The difference of two figures that are no means over their items; None where they are."""
    figures = [next(_figures(sheet, one, task), None) for one in (name, reference)]
    values = [
        [item.scores[task.metric] for item in sheet.answers[one, task.name].values() if task.metric in item.scores]
        for one in (name, reference)
    ]
    mine, theirs = figures
    if mine is None or theirs is None or mine.metric != task.metric or theirs.metric != task.metric:
        return None
    means = (math.isclose(figure.value, sum(own) / len(own), rel_tol=1e-5, abs_tol=1e-9)
             for figure, own in zip((mine, theirs), values, strict=True))  # fmt: skip
    return None if all(means) or not math.isfinite(mine.value - theirs.value) else mine.value - theirs.value


def _pairs(before: Mapping[str, Item], after: Mapping[str, Item], metric: str) -> list[tuple[str, float, float]]:
    """(item, score before, score after) of the items that both answered and gave a finite score."""
    return [
        (key, before[key].scores[metric], item.scores[metric])
        for key, item in after.items()
        if key in before and metric in item.scores and metric in before[key].scores
        # An infinite loss has no difference to another.
        and math.isfinite(before[key].scores[metric]) and math.isfinite(item.scores[metric])
    ]  # fmt: skip


def _corrected(figures: Sequence[Figure]) -> list[Figure]:
    tested = [one.difference.p for one in figures if one.difference is not None]
    corrected = iter(holm(tested))
    return [
        one if one.difference is None else replace(one, difference=replace(one.difference, p_holm=next(corrected)))
        for one in figures
    ]


# -------------------------------------------------------------------------------------------------------------- leaders


def _judged(sheet: Sheet, figures: Sequence[Figure]) -> list[TaskRecord]:
    """The tasks that choose between contestants: not general text, and answered by two or more."""
    return [
        task
        for task in sheet.tasks.values()
        if not is_general(task) and sum(one.task == task.name for one in figures) > 1
    ]


def is_general(task: TaskRecord) -> bool:
    """Whether a task measures the loss on general text, which shows what was forgotten."""
    return task.kind == "perplexity" and task.facts.get("general") is True


def _leaders(sheet: Sheet, figures: Sequence[Figure], task: TaskRecord, seed: int) -> Leaders:
    own = [one for one in figures if one.task == task.name]
    best = max(own, key=lambda one: _goodness(one, task))
    tried = {
        one.contestant: _difference(sheet, one.contestant, best.contestant, task, seed)
        for one in own
        if one is not best
    }
    tested = {name: found.p for name, found in tried.items() if found is not None}
    corrected = dict(zip(tested, holm(list(tested.values())), strict=True))
    return Leaders(task.name, best.contestant, tuple(name for name, p in corrected.items() if p > LEVEL))


def _goodness(figure: Figure, task: TaskRecord) -> float:
    """A number that is larger for a better figure; what is no number is worst."""
    value = figure.value if task.higher_is_better else -figure.value
    return -math.inf if math.isnan(value) else value
