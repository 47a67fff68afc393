"""The settings that a sweep tries: all combinations of lists of values, or draws from lists and ranges."""

from __future__ import annotations

import itertools
import math
import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Protocol

from weft.errors import UserError, nearest, shown
from weft.foreign import parse_yaml

MOST = 1000  # trials of one sweep
_KINDS = ("log", "uniform", "int", "logint")
_RANGE = re.compile(r"(\w+):([^:]*):([^:]*)")
_DIGITS = 4  # of a number that is drawn: what the table shows is what was tried
_DRAWS = 100  # in a row that bring nothing new before a space counts as used up


class Values(Protocol):
    """What one key can be."""

    @property
    def finite(self) -> tuple[str, ...] | None:
        """All of the values, as they are written; None: they lie in a range."""

    def draw(self, generator: random.Random) -> str:
        """One of the values, as it is written."""


@dataclass(frozen=True)
class Listed:
    """Values that are named one by one."""

    texts: tuple[str, ...]

    @property
    def finite(self) -> tuple[str, ...] | None:
        return self.texts

    def draw(self, generator: random.Random) -> str:
        return generator.choice(self.texts)


@dataclass(frozen=True)
class Range:
    """Numbers from ``low`` to ``high``, all as likely; with ``log`` all orders of magnitude are as likely."""

    low: float
    high: float
    log: bool
    whole: bool

    @property
    def finite(self) -> tuple[str, ...] | None:
        return None

    def draw(self, generator: random.Random) -> str:
        if self.whole and not self.log:
            return str(generator.randint(int(self.low), int(self.high)))
        low, high = (math.log(self.low), math.log(self.high)) if self.log else (self.low, self.high)
        value = generator.uniform(low, high)
        value = min(max(math.exp(value) if self.log else value, self.low), self.high)
        return str(round(value)) if self.whole else f"{value:.{_DIGITS}g}"


@dataclass(frozen=True)
class Dimension:
    """A key of the configuration and what it can be."""

    key: str
    values: Values


def swept(word: str) -> bool:
    """Whether a ``key=value`` word names several values, or a range; else it is a setting of all trials."""
    _, equals, text = word.partition("=")
    return bool(equals) and (len(_pieces(text)) > 1 or _range_like(text))


def dimension(word: str) -> Dimension:
    """The dimension that ``key=value,value`` or ``key=log:low:high`` names.

    Raises:
        UserError: It is none: no key, no value, a value twice, or a range that holds nothing.
    """
    key, equals, text = word.partition("=")
    if not equals or not all(key.split(".")):
        raise UserError(
            f"--grid {word!r} is not of the form key=value,value (or key=log:1e-5:1e-2 with --random; docs/sweep.md)."
        )
    if _range_like(text):
        return Dimension(key, _range(key, text))
    pieces = [piece.strip() for piece in _pieces(text)]
    if not all(pieces):
        raise UserError(f"--grid {word!r}: there is an empty value. Write {key}=4,16 for two values.")
    read = [repr(parse_yaml(piece, f"--grid {key}: the value")) for piece in pieces]
    for number, one in enumerate(read):
        if one in read[:number]:
            raise UserError(f"--grid {word!r} names the value {pieces[number]} twice; leave one out.")
    return Dimension(key, Listed(tuple(pieces)))


def grid(dimensions: Sequence[Dimension]) -> list[tuple[str, ...]]:
    """All combinations as ``key=value`` words, the last key varying fastest.

    Raises:
        UserError: A dimension is a range, or there are too many.
    """
    for one in dimensions:
        if one.values.finite is None:
            raise UserError(f"--grid {one.key}: a range has no end of values; add --random N to draw from it.")
    count = math.prod(len(one.values.finite or ()) for one in dimensions)
    if count > MOST:
        raise UserError(f"the grid has {count:,} trials, and at most {MOST:,} are tried. Add --random N to draw.")
    lists = [[f"{one.key}={text}" for text in one.values.finite or ()] for one in dimensions]
    return list(itertools.product(*lists))


def drawn(dimensions: Sequence[Dimension], count: int, seed: int) -> list[tuple[str, ...]]:
    """So many different combinations, drawn with a generator of this seed.

    Raises:
        UserError: There are fewer, or more are asked for than are tried.
    """
    if count > MOST:
        raise UserError(f"--random {count:,}: at most {MOST:,} trials are tried.")
    sizes = [one.values.finite for one in dimensions]
    there = math.prod(len(size) for size in sizes if size is not None)
    if all(size is not None for size in sizes) and count > there:
        raise UserError(f"--random {count}: the values make {there} different trials; ask for at most so many.")
    generator = random.Random(seed)
    found: dict[tuple[str, ...], None] = {}
    vain = 0
    while len(found) < count:
        before = len(found)
        found[tuple(f"{one.key}={one.values.draw(generator)}" for one in dimensions)] = None
        vain = 0 if len(found) > before else vain + 1
        if vain > _DRAWS * max(1, there):
            raise UserError(f"--random {count}: the ranges hold only {before} different trials.")
    return list(found)


def _pieces(text: str) -> list[str]:
    """The parts between the commas that stand in no brackets and no quotes."""
    return list(_split(text)) if text else [""]


def _split(text: str) -> Iterator[str]:
    depth, quote, start = 0, "", 0
    for place, mark in enumerate(text):
        if quote:
            quote = "" if mark == quote else quote
        elif mark in "\"'":
            quote = mark
        elif mark in "[{(":
            depth += 1
        elif mark in "]})":
            depth -= 1
        elif mark == "," and depth <= 0:
            yield text[start:place]
            start = place + 1
    yield text[start:]


def _range_like(text: str) -> bool:
    found = _RANGE.fullmatch(text.strip())
    return found is not None and bool(found[1]) and not found[1].isdecimal()


def _range(key: str, text: str) -> Range:
    found = _RANGE.fullmatch(text.strip())
    assert found is not None
    kind, where = found[1], f"--grid {key}={text}"
    if kind not in _KINDS:
        raise UserError(f"{where}: no range is called {kind!r}; there are {', '.join(_KINDS)}.{nearest(kind, _KINDS)}")
    whole = kind.endswith("int")
    ends: list[float] = []
    for end in (parse_yaml(end, f"{where}: an end") for end in found.groups()[1:]):
        if isinstance(end, bool) or not isinstance(end, int if whole else (int, float)) or not math.isfinite(end):
            raise UserError(f"{where}: expected two {'whole ' * whole}numbers, as {kind}:1:64, not {shown(end)}.")
        ends.append(end)
    low, high = ends
    if low >= high:
        raise UserError(f"{where}: {low} is not below {high}; write the lower end first.")
    if kind.startswith("log") and low <= 0:
        raise UserError(f"{where}: a logarithmic range begins above 0.")
    return Range(low, high, log=kind.startswith("log"), whole=whole)
