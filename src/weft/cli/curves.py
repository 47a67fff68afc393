"""Curves of figures as text: one line of blocks, or several."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence

_BLOCKS = " ▁▂▃▄▅▆▇█"
# What a curve of one line is made of: its lowest value has to be seen, too.
_LOWEST = 1
ALL = _BLOCKS[_LOWEST:]


def plot(steps: Sequence[int], values: Sequence[float], width: int, height: int = 1) -> list[str]:
    """The curve in ``height`` lines of ``width`` characters, the highest first; values that are not finite are gaps.

    Every character stands for as many steps. It shows the mean of the values there; between values lies a line.
    """
    columns = _columns(steps, values, width)
    finite = [value for value in columns if value is not None]
    if not finite:
        return [" " * width] * height
    low, high = min(finite), max(finite)
    levels = height * 8
    heights = [None if one is None else _level(one, low, high, levels) for one in columns]
    lines = []
    for row in range(height - 1, -1, -1):
        marks = [" " if level is None else _BLOCKS[min(8, max(0, level - 8 * row))] for level in heights]
        lines.append("".join(marks))
    return lines


def _level(value: float, low: float, high: float, levels: int) -> int:
    share = 0.5 if high == low else (value - low) / (high - low)
    return _LOWEST + round(share * (levels - _LOWEST))


def _columns(steps: Sequence[int], values: Sequence[float], width: int) -> list[float | None]:
    """The mean of the values in each of ``width`` equal ranges of steps; None before the first value."""
    found: list[list[float]] = [[] for _ in range(width)]
    pairs = [(step, value) for step, value in zip(steps, values, strict=True) if math.isfinite(value)]
    if not pairs:
        return [None] * width
    first, last = pairs[0][0], max(step for step, _ in pairs)
    for step, value in pairs:
        found[min(width - 1, (step - first) * width // max(1, last - first))].append(value)
    known = [(place, sum(group) / len(group)) for place, group in enumerate(found) if group]
    columns: list[float | None] = [None] * known[0][0]
    for (start, low), (end, high) in itertools.pairwise(known):
        columns += [low + (high - low) * part / (end - start) for part in range(end - start)]
    return [*columns, *[known[-1][1]] * (width - len(columns))]
