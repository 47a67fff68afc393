"""The figures of a comparison: rates with errors, the judge's biases, its agreement with people.

A rate is a mean over items; its standard error is that of a mean, s/√n. Where an item gives several verdicts, the rate
is Σf/Σd over items (f of d verdicts), with the error of a ratio over clusters: √(n/(n-1)·Σ(f - r·d)²)/Σd.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from weft.evaluate.judge.judging import Compared, Winner
from weft.evaluate.judge.length import LengthControlled, length_controlled_minimal

_VALUE: dict[Winner, float] = {"a": 1.0, "tie": 0.5, "b": 0.0}


@dataclass(frozen=True)
class Rate:
    """A mean with its standard error, over ``n`` items. Both are None where nothing defines them."""

    value: float | None
    stderr: float | None
    n: int

    @classmethod
    def of(cls, values: Sequence[float]) -> Rate:
        """The mean of values, one for each item."""
        if not values:
            return cls(None, None, 0)
        x = np.asarray(values, dtype=float)
        return cls(float(x.mean()), float(x.std(ddof=1) / np.sqrt(len(x))) if len(x) > 1 else None, len(x))

    @classmethod
    def ratio(cls, parts: Sequence[tuple[float, float]]) -> Rate:
        """The rate of items that give f of d verdicts each."""
        kept = np.asarray([part for part in parts if part[1]], dtype=float).reshape(-1, 2)
        if not len(kept):
            return cls(None, None, 0)
        share, n = float(kept[:, 0].sum() / kept[:, 1].sum()), len(kept)
        rest = kept[:, 0] - share * kept[:, 1]
        error = float(np.sqrt(n / (n - 1) * (rest**2).sum()) / kept[:, 1].sum()) if n > 1 else None
        return cls(share, error, n)

    def entries(self) -> dict[str, object]:
        """It as JSON holds it."""
        return {"value": self.value, "stderr": self.stderr, "n": self.n}


@dataclass(frozen=True, kw_only=True)
class Comparison:
    """What a judge found of A against B.

    Attributes:
        items: that were to be judged; ``wins``, ``ties``, ``losses`` of A; ``unparsed``: those without a whole verdict,
            and ``failures`` why, by kind; ``unasked``: for which the budget had no room.
        win_rate: of A; a tie counts half.
        length_controlled: the same if both answers were of one length.
        first: the share of verdicts, ties left out, for the answer that stood first. 0.5: the place does not count.
        follows_place: the share of items whose two verdicts name the same place, and so contradict each other.
        longer: the share of verdicts, ties left out, for the longer answer. It holds what longer answers deserve, too.
        own: the win rate of the judge's own model, where it is one of the two.
        agreement, kappa: with people.
    """

    items: int
    wins: int
    ties: int
    losses: int
    unparsed: int
    unasked: int
    failures: Mapping[str, int]
    win_rate: Rate
    length_controlled: LengthControlled
    first: Rate
    follows_place: Rate
    longer: Rate
    own: Rate | None = None
    agreement: Rate | None = None
    kappa: Rate | None = None

    def entries(self) -> dict[str, object]:
        """It as JSON holds it."""
        counts = ("items", "wins", "ties", "losses", "unparsed", "unasked")
        rates = ("win_rate", "first", "follows_place", "longer", "own", "agreement", "kappa")
        told: dict[str, object] = {name: getattr(self, name) for name in counts}
        told |= {name: rate.entries() for name in rates if (rate := getattr(self, name)) is not None}
        return {**told, "failures": dict(self.failures), "length_controlled_minimal": self.length_controlled.entries()}


def compare_figures(
    judged: Sequence[Compared], *, labels: Mapping[str, Winner] | None = None, own: Winner | None = None
) -> Comparison:
    """The figures of a comparison.

    Args:
        judged: What the judge said of each pair.
        labels: item -> who wins, as people say.
        own: Which of the two is the judge's own model, where that is known.
    """
    whole = [(one, winner) for one in judged if (winner := one.winner) is not None]
    count, failures = Counter(winner for _, winner in whole), Counter[str]()
    unasked = sum("budget" in one.failures for one in judged)
    failures.update(kind for one in judged for kind in one.failures if kind and kind != "budget")
    values = [_VALUE[winner] for _, winner in whole]
    gaps = [len(one.pair.a) - len(one.pair.b) for one, _ in whole]
    rate = Rate.of(values)
    known = [(winner, labels[one.pair.item]) for one, winner in whole if labels and one.pair.item in labels]
    return Comparison(
        items=len(judged),
        wins=count["a"],
        ties=count["tie"],
        losses=count["b"],
        unparsed=len(judged) - len(whole) - unasked,
        unasked=unasked,
        failures=failures,
        win_rate=rate,
        length_controlled=length_controlled_minimal(values, gaps),
        first=Rate.ratio([_first(one) for one, _ in whole]),
        follows_place=Rate.of([float(one.verdicts in (("first",) * 2, ("second",) * 2)) for one, _ in whole]),
        longer=Rate.ratio([_longer(one) for one, _ in whole]),
        own=None if own is None else Rate.of([value if own == "a" else 1 - value for value in values]),
        agreement=Rate.of([float(one == other) for one, other in known]) if labels is not None else None,
        kappa=kappa([one for one, _ in known], [other for _, other in known]) if labels is not None else None,
    )


def _first(one: Compared) -> tuple[int, int]:
    """How many verdicts of an item are for the first place, and how many for one."""
    return one.verdicts.count("first"), 2 - one.verdicts.count("tie")


def _longer(one: Compared) -> tuple[int, int]:
    """How many verdicts of an item are for the longer answer, and how many for one."""
    a, b = len(one.pair.a), len(one.pair.b)
    if a == b:
        return 0, 0
    places = ("first", "second") if a > b else ("second", "first")
    return sum(said == place for said, place in zip(one.verdicts, places, strict=True)), _first(one)[1]


def kappa(one: Sequence[object], other: Sequence[object], *, steps: Sequence[object] | None = None) -> Rate:
    """Cohen's kappa of two lists of labels [items], with its large-sample error √(p(1-p)/n)/(1-q).

    Args:
        one, other: The labels.
        steps: All labels in their order, where they are steps of a scale: then a disagreement counts by the square of
            its distance (the weighted kappa of Cohen 1968), and no error is given.
    """
    n = len(one)
    words = list(steps) if steps is not None else sorted({*one, *other}, key=str)
    if not n or len(words) < 2:
        return Rate(None, None, n)
    place = {word: number for number, word in enumerate(words)}
    table: NDArray[np.float64] = np.zeros((len(words), len(words)))
    for left, right in zip(one, other, strict=True):
        table[place[left], place[right]] += 1 / n
    chance = np.outer(table.sum(1), table.sum(0))
    ranks = np.arange(len(words))
    costs = (ranks[:, None] - ranks) ** 2 if steps is not None else 1 - np.eye(len(words))
    expected = float((costs * chance).sum())
    if not expected:
        return Rate(None, None, n)
    seen = float((costs * table).sum())
    error = None if steps is not None else float(np.sqrt(seen * (1 - seen) / n) / expected)
    return Rate(1 - seen / expected, error, n)
