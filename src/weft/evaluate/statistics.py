"""Statistics of a comparison: errors of figures, tests of paired answers, correction for many.

Contestants answer the same items, so every test here is paired: what makes an item hard cancels out. An answer that is
right or wrong is tested by McNemar's test, any other score by turning the signs of the differences at random. Random
numbers come from the generator that is given. A fast function has a plain one beside it, named ``_ref``.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

Floats = NDArray[np.float64]

DRAWS = 9_999  # of a permutation test and of a bootstrap: the smallest p is then 1e-4
_AT_ONCE = 1 << 22  # numbers that one draw of many may take: 32 MB
_FEW = 16  # different values, up to which their counts are drawn
# Quantiles of the normal distribution: half the width of a 95 % interval in standard errors, and a power of 80 %.
Z95, Z80 = 1.959964, 0.841621


@dataclass(frozen=True)
class Estimate:
    """A mean over ``n`` items with its standard error; None for less than two items."""

    value: float
    stderr: float | None
    n: int


def mean(values: ArrayLike) -> Estimate:
    """The mean of values [n], and its standard error s / √n, with s² over n - 1; none if one is infinite.

    Raises:
        ValueError: There is no value.
    """
    found = np.asarray(values, np.float64)
    if not found.size:
        raise ValueError("the mean of no values is not defined")
    known = found.size > 1 and bool(np.isfinite(found).all())
    stderr = float(found.std(ddof=1) / math.sqrt(found.size)) if known else None
    return Estimate(float(found.mean()), stderr, found.size)


# ------------------------------------------------------------------------------------------------------------ bootstrap


def bootstrap_means(values: ArrayLike, generator: np.random.Generator, draws: int = DRAWS) -> Floats:
    """The means [draws] of so many samples, with replacement, of values [n] (Efron, 1979).

    Few different values (right and wrong) are drawn as how often each comes, others item by item.
    """
    found = np.asarray(values, np.float64)
    n = found.size
    different, counts = np.unique(found, return_counts=True)
    if different.size <= _FEW:
        return np.asarray(generator.multinomial(n, counts / n, size=draws) @ different / n, np.float64)
    return np.concatenate([found[generator.integers(0, n, (size, n))].mean(1) for size in _sizes(draws, n)])


def bootstrap_means_ref(values: Sequence[float], generator: np.random.Generator, draws: int = DRAWS) -> list[float]:
    """The plain form: draw n indices, take the mean, again and again. Other draws, the same distribution."""
    n = len(values)
    return [sum(values[i] for i in generator.integers(0, n, n)) / n for _ in range(draws)]


def paired_interval(
    differences: ArrayLike, generator: np.random.Generator, draws: int = DRAWS, level: float = 0.95
) -> tuple[float, float]:
    """The percentile bootstrap's interval of the mean of paired differences [n]."""
    means = bootstrap_means(differences, generator, draws)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return float(low), float(high)


def _sizes(draws: int, n: int) -> list[int]:
    each = max(1, _AT_ONCE // max(n, 1))
    return [min(each, draws - begin) for begin in range(0, draws, each)]


# ---------------------------------------------------------------------------------------------------------- permutation


def permutation_p(differences: ArrayLike, generator: np.random.Generator, draws: int = DRAWS) -> float:
    """Two-sided p-value of paired differences [n]: how often random signs give a mean as far from zero.

    Under the null hypothesis the two contestants are exchangeable in every item, so that each sign may be turned
    (Fisher, 1935). The drawn arrangements and the given one count: p = (k + 1) / (draws + 1), never zero (Phipson &
    Smyth, 2010). Items without a difference change nothing and are left out.
    """
    found = np.asarray(differences, np.float64)
    found = found[found != 0]
    n = found.size
    if not n:
        return 1.0
    limit = abs(found.sum()) * (1 - 1e-12)  # sums of the same numbers in another order are as far
    as_far = 0
    for size in _sizes(draws, n):
        signs = generator.integers(0, 2, (size, n), dtype=np.int8) * 2.0 - 1.0
        as_far += int((np.abs(signs @ found) >= limit).sum())
    return (as_far + 1) / (draws + 1)


def permutation_p_ref(differences: Sequence[float]) -> float:
    """The exact value, over all 2ⁿ arrangements of the signs; for a few items only."""
    found = [Fraction(d) for d in differences]
    limit = abs(sum(found, Fraction(0)))
    sums = [Fraction(0)]
    for d in found:
        sums = [total + sign * d for total in sums for sign in (1, -1)]
    return sum(abs(total) >= limit for total in sums) / len(sums)


# -------------------------------------------------------------------------------------------------------------- McNemar


def mcnemar_p(lost: ArrayLike, gained: ArrayLike) -> Floats:
    """Two-sided mid-p value of McNemar's test; counts [...] of items in, p-values [...] out.

    ``lost``: right before and wrong after; ``gained``: wrong before and right after. If neither is likelier, the
    smaller count is Binomial(lost + gained, ½). Mid-p counts half of the probability of what was seen. The exact
    p-value gives 3.8 % false alarms at 5 % for 400 items, this one 4.9 % (Fagerland, Lydersen & Laake, 2013, equation
    4; docs/report.md has the figures).
    """
    b, c = np.broadcast_arrays(np.asarray(lost, np.int64), np.asarray(gained, np.int64))
    few = np.minimum(b, c)
    pairs, place = np.unique(np.stack([(b + c).ravel(), few.ravel()], 1), axis=0, return_inverse=True)
    found = np.array([1.0 if n == 2 * k else float(_mid_p(n, k + 1)[k]) for n, k in pairs.tolist()], np.float64)
    return found[place.reshape(-1)].reshape(few.shape)


def _mid_p(n: int, count: int) -> Floats:
    """2 P(X < k) + P(X = k) [count] for k = 0, 1, … of X ~ Binomial(n, ½)."""
    at = _binomial(n, 0.5, count)
    return np.asarray(np.minimum(1.0, 2 * at.cumsum() - at), np.float64)


def _binomial(n: int, share: float, count: int | None = None) -> Floats:
    """P(X = k) for k = 0, 1, … of X ~ Binomial(n, share): all n + 1, or the first ``count``."""
    k = np.arange(n + 1 if count is None else count)
    if share in (0.0, 1.0):
        return np.asarray(k == n * share, np.float64)
    logs = _log_factorials(n)
    exponent = logs[n] - logs[k] - logs[n - k] + k * math.log(share) + (n - k) * math.log1p(-share)
    return np.asarray(np.exp(exponent), np.float64)


@lru_cache(maxsize=8)
def _log_factorials(largest: int) -> Floats:
    return np.concatenate([[0.0], np.log(np.arange(1, largest + 1)).cumsum()])


def mcnemar_p_ref(lost: int, gained: int) -> Fraction:
    """The same, in whole numbers."""
    n, few = lost + gained, min(lost, gained)
    below, at = sum(math.comb(n, k) for k in range(few)), math.comb(n, few)
    return min(Fraction(1), Fraction(2 * below + at, 2**n))


def mcnemar_exact_p(lost: int, gained: int) -> float:
    """The exact two-sided p-value, 2 P(X ≤ the smaller count) (McNemar, 1947): never above its level, and careful."""
    n, few = lost + gained, min(lost, gained)
    return min(1.0, 2 * sum(math.comb(n, k) for k in range(few + 1)) / 2**n)


def mcnemar_rejects(items: int, lost: float, gained: float, *, level: float = 0.05, mid: bool = True) -> float:
    """The probability that McNemar's test finds a difference; equal shares give its false alarms, others its power.

    Not simulated: the sum over all counts that ``items`` independent items can give, each of which is lost or gained
    with these probabilities. With ``mid`` false of the exact test.
    """
    if lost + gained > 1 or min(lost, gained) < 0:
        raise ValueError(f"shares of lost and gained items are two parts of 1, not {lost} and {gained}")
    share = gained / (lost + gained) if lost + gained else 0.5
    weights = _binomial(items, lost + gained)
    found = 0.0
    for n in np.flatnonzero(weights > 1e-14).tolist():
        if n:
            low = np.flatnonzero(_p_values(n, mid) <= level)
            gains = _binomial(n, share)
            found += weights[n] * (gains[low].sum() + gains[n - low].sum())
    return float(found)


@lru_cache(maxsize=2048)
def _p_values(n: int, mid: bool) -> Floats:
    """The p-values when k = 0, 1, … < n / 2 of n changed items went one way."""
    few = (n + 1) // 2
    return _mid_p(n, few) if mid else np.minimum(1.0, 2 * _binomial(n, 0.5, few).cumsum())


def smallest_found(items: int, changed: float) -> float | None:
    """The smallest gain, a share of ``items``, that McNemar's test at 5 % finds four times in five; None: none.

    ``changed``: the share of items that come out otherwise, which is one minus the agreement of the two contestants.
    Gain = (z₀.₉₇₅ √changed + z₀.₈ √(changed - gain²)) / √items (Connor, 1987, equation 2), solved for the gain.
    """
    gain = 0.0
    for _ in range(50):
        gain = min((Z95 * math.sqrt(changed) + Z80 * math.sqrt(max(0.0, changed - gain**2))) / math.sqrt(items), 1.0)
    return gain if gain < changed else None


def smallest_found_ref(items: int, changed: float) -> float | None:
    """The same without the normal distribution's help, by halving."""

    def finds(gain: float) -> bool:
        return mcnemar_rejects(items, (changed - gain) / 2, (changed + gain) / 2) >= 0.8

    low, high = 0.0, changed
    if not finds(high):
        return None
    while high - low > 1e-4:
        middle = (low + high) / 2
        low, high = (low, middle) if finds(middle) else (middle, high)
    return high


def agreement_of(base: float, gain: float, correlation: float) -> float:
    """The share of items that come out alike, for a base's accuracy, a gain, and the correlation φ of both."""
    after = base + gain
    both = base * after + correlation * math.sqrt(base * (1 - base) * after * (1 - after))
    return 1 - base - after + 2 * both


# ----------------------------------------------------------------------------------------------------------------- many


def holm(p_values: Sequence[float]) -> list[float]:
    """The p-values corrected for their number (Holm, 1979): the chance that any is a false alarm stays at the level."""
    corrected, largest = [0.0] * len(p_values), 0.0
    for rank, index in enumerate(sorted(range(len(p_values)), key=lambda i: p_values[i])):
        largest = max(largest, min(1.0, (len(p_values) - rank) * p_values[index]))
        corrected[index] = largest
    return corrected
