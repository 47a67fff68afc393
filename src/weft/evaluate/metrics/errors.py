"""Standard errors: closed forms for means, and a bootstrap for figures that are no mean."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import numpy as np

SAMPLES = 1000  # of a bootstrap


def weighted_mean(values: Sequence[float], weights: Sequence[float]) -> tuple[float, float | None]:
    """The mean sum(w x) / sum(w), and its standard error; None for less than two values.

    The error is that of a ratio of two sums over the items (Cochran 1977, section 2.11), with mean R:
    sqrt(n / (n - 1) * sum(w^2 (x - R)^2)) / sum(w). With equal weights it is the sample's deviation over sqrt(n).
    """
    total, n = math.fsum(weights), len(values)
    mean = math.fsum(w * x for w, x in zip(weights, values, strict=True)) / total
    if n < 2:
        return mean, None
    spread = math.fsum((w * (x - mean)) ** 2 for w, x in zip(weights, values, strict=True))
    return mean, math.sqrt(n / (n - 1) * spread) / total


def bootstrap_error(
    figure: Callable[[Sequence[int]], float], n: int, *, seed: int, samples: int = SAMPLES
) -> float | None:
    """The deviation of a figure over samples of the items, drawn with replacement; None for less than two items.

    Args:
        figure: gives the figure of some items by their places.
        n: how many items there are.
    """
    if n < 2:
        return None
    random = np.random.default_rng(seed)
    found = [figure(random.integers(0, n, n).tolist()) for _ in range(samples)]
    return float(np.std(found, ddof=1))
