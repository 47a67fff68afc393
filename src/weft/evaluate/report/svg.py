"""Drawings of a page: SVG whose places are shares of its width, so that text keeps its size on a phone.

Colours are the page's own (``var(--…)``), so that they follow light and dark.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from html import escape

_TICKS = 5
_LEFT, _RIGHT = 9.0, 97.0  # of the width, between which curves lie


@dataclass(frozen=True)
class Axis:
    """From ``low`` to ``high``, by logarithm or not; places are 0 to 1."""

    low: float
    high: float
    log: bool = False

    def place(self, value: float) -> float:
        """Where a value lies."""
        low, high, value = (math.log(x) if self.log else x for x in (self.low, self.high, value))
        return (value - low) / (high - low) if high > low else 0.5

    def ticks(self, count: int = _TICKS) -> list[float]:
        """Round values between the ends."""
        if self.log:
            found = [m * 10.0**e for e in range(-9, 10) for m in (1, 2, 5)]
            shown = [value for value in found if self.low <= value <= self.high]
            return shown[:: -(-len(shown) // count)] if shown else [self.low, self.high]
        step = _round_step((self.high - self.low) / count)
        first = math.ceil(self.low / step - 1e-9)
        return [number * step for number in range(first, math.floor(self.high / step + 1e-9) + 1)]


def _round_step(rough: float) -> float:
    if rough <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(rough))
    return next(m * power for m in (1, 2, 2.5, 5, 10) if m * power >= rough * (1 - 1e-9))


def axis_of(values: Sequence[float], *, margin: float = 0.05, log: bool = False, zero: bool = False) -> Axis:
    """An axis that holds all values, with a margin; with ``zero`` it holds zero, too."""
    low, high = min(*values, *([0.0] if zero else []), math.inf), max(*values, *([0.0] if zero else []), -math.inf)
    if log:
        return Axis(low / 1.1, high * 1.1, True)
    room = margin * (high - low) or 0.5 * abs(high) or 1.0
    return Axis(low - room, high + room)


def interval(axis: Axis, value: float, half: float, base: float | None, *, label: str, kind: str = "") -> str:
    """One row of a dot plot: a figure, its 95 % interval, and a line where the reference lies."""
    place, low, high = (100 * min(max(axis.place(x), 0), 1) for x in (value, value - half, value + half))
    parts = [] if base is None else [_line(100 * axis.place(base), 0, 100 * axis.place(base), 100, "ref")]
    parts.append(_line(low, 50, high, 50, f"whisker {kind}"))
    parts.append(f'<circle cx="{place:.2f}%" cy="50%" r="4.5" class="dot {kind}"/>')
    return f'<svg class="interval" role="img" aria-label="{escape(label)}">{"".join(parts)}</svg>'


def scale_row(axis: Axis, percent: bool) -> str:
    """The ticks below the rows of a dot plot."""
    texts = []
    for tick in axis.ticks(4):
        place = 100 * axis.place(tick)
        texts.append(
            f'<text x="{place:.2f}%" y="11" text-anchor="middle">{_tick(100 * tick if percent else tick)}</text>'
        )
    return f'<svg class="scale" aria-hidden="true">{"".join(texts)}</svg>'


@dataclass(frozen=True)
class Point:
    """A point of a scatter plot, with its number beside it."""

    x: float
    y: float
    number: int
    _: KW_ONLY
    label: str
    kind: str = ""


def scatter(points: Sequence[Point], *, x_label: str, y_label: str, x_percent: bool, y_percent: bool) -> str:
    """Points with numbers beside them; lines where nothing is gained and nothing lost."""
    horizontal = axis_of([one.x for one in points], margin=0.1, zero=True)
    vertical = axis_of([one.y for one in points], margin=0.12, zero=True)

    def across(value: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * horizontal.place(value)

    def down(value: float) -> float:
        return 4 + 82 * (1 - vertical.place(value))

    parts = []
    for tick in horizontal.ticks():
        parts.append(_line(across(tick), 4, across(tick), 86, "zero" if abs(tick) < 1e-12 else "grid"))
        text = _tick(100 * tick if x_percent else tick)
        parts.append(f'<text x="{across(tick):.2f}%" y="91%" text-anchor="middle">{text}</text>')
    for tick in vertical.ticks():
        parts.append(_line(_LEFT, down(tick), _RIGHT, down(tick), "zero" if abs(tick) < 1e-12 else "grid"))
        text = _tick(100 * tick if y_percent else tick)
        parts.append(f'<text x="{_LEFT - 1:.2f}%" y="{down(tick):.2f}%" dy="4" text-anchor="end">{text}</text>')
    places = [(across(one.x), down(one.y)) for one in points]
    for one, (x, y), (a, b) in zip(points, places, beside(places), strict=True):
        if abs(a - x) > _NEAR[0] or abs(b - y) > _NEAR[1]:
            parts.append(_line(x, y, a, b, "leader"))
        parts.append(
            f'<g><title>{escape(one.label)}</title><circle cx="{x:.2f}%" cy="{y:.2f}%" r="5" class="point {one.kind}"/>'
            f'<text x="{a:.2f}%" y="{b:.2f}%" dy="4" text-anchor="middle" class="number">{one.number}</text></g>'
        )
    parts.append(
        f'<text x="{(_LEFT + _RIGHT) / 2}%" y="98.5%" text-anchor="middle" class="axis">{escape(x_label)}</text>'
    )
    return f'<p class="axis">{escape(y_label)}</p><svg class="scatter" role="img">{"".join(parts)}</svg>'


def beside(places: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    """A place for the number of each point, near it and on nothing else, as far as there is room; all in percent."""
    taken = list(places)
    found = []
    for x, y in places:
        tries = [(x + dx * far, y + dy * far) for far in (1.0, 1.7, 2.5) for dx, dy in _AROUND]
        free = (one for one in tries if not any(_touch(one, other) for other in taken))
        best = next(free, tries[0])
        taken.append(best)
        found.append(best)
    return found


# Where a number may stand beside its point, in shares of width and height, and how near two may come.
_AROUND = ((3.0, 0.0), (-3.0, 0.0), (0.0, -5.0), (0.0, 5.0), (2.4, -3.8), (-2.4, -3.8), (2.4, 3.8), (-2.4, 3.8))


# A number that is farther away has a line to its point.
_NEAR = (3.2, 5.2)


def _touch(one: tuple[float, float], other: tuple[float, float]) -> bool:
    return abs(one[0] - other[0]) < 2.8 and abs(one[1] - other[1]) < 3.6


def curves(train: Sequence[tuple[int, float]], evals: Sequence[Sequence[tuple[int, float]]], x: Axis, y: Axis) -> str:
    """A job's losses: the training as a line, each evaluated set as a line with dots."""
    parts = []
    for tick in y.ticks(3):
        place = _down(y, tick)
        parts.append(_line(_CURVE_LEFT, place, 100, place, "grid"))
        parts.append(f'<text x="{_CURVE_LEFT - 2}%" y="{place:.2f}%" dy="4" text-anchor="end">{_tick(tick)}</text>')
    parts.append(f'<text x="{_CURVE_LEFT}%" y="98%">{x.low:,.0f}</text>')
    parts.append(f'<text x="99%" y="98%" text-anchor="end">step {x.high:,.0f}</text>')
    parts.append(_polyline(train, x, y, "train"))
    for number, curve in enumerate(evals):
        parts.append(_polyline(curve, x, y, f"eval e{number % 4}"))
        parts += _dots(curve, x, y, f"eval e{number % 4}")
    return f'<svg class="curves" role="img">{"".join(parts)}</svg>'


_CURVE_LEFT, _CURVE_BOTTOM = 14.0, 84.0


def _across(axis: Axis, value: float) -> float:
    return _CURVE_LEFT + (99 - _CURVE_LEFT) * axis.place(value)


def _down(axis: Axis, value: float) -> float:
    return 4 + (_CURVE_BOTTOM - 4) * (1 - axis.place(value))


def _polyline(curve: Sequence[tuple[int, float]], x: Axis, y: Axis, kind: str) -> str:
    """A line, in a frame of its own that stretches; its width does not."""
    points = " ".join(f"{_across(x, step):.2f},{_down(y, value):.2f}" for step, value in _drawable(curve, y))
    return (
        f'<svg x="0" y="0" width="100%" height="100%" viewBox="0 0 100 100" preserveAspectRatio="none">'
        f'<polyline points="{points}" class="curve {kind}"/></svg>'
    )


def _dots(curve: Sequence[tuple[int, float]], x: Axis, y: Axis, kind: str) -> Iterator[str]:
    for step, value in _drawable(curve, y):
        yield (
            f'<circle cx="{_across(x, step):.2f}%" cy="{_down(y, value):.2f}%" r="3" class="mark {kind}">'
            f"<title>step {step}: {value:.4f}</title></circle>"
        )


def _drawable(curve: Sequence[tuple[int, float]], y: Axis) -> list[tuple[int, float]]:
    return [(step, value) for step, value in curve if not y.log or value > 0]


def _line(x1: float, y1: float, x2: float, y2: float, kind: str) -> str:
    return f'<line x1="{x1:.2f}%" y1="{y1:.2f}%" x2="{x2:.2f}%" y2="{y2:.2f}%" class="{kind}"/>'


def _tick(value: float) -> str:
    return f"{0 if abs(value) < 1e-12 else value:.4g}".replace("-", "−")
