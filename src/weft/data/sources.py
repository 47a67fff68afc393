"""Sources of data: how a configuration names them, how they mix, and which samples are held out."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import random
import re
from array import array
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from fractions import Fraction
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any, TypeVar

from weft.errors import UserError, nearest, shown

T = TypeVar("T")
_TERM = re.compile(r"\s*([+-]?(?:\d+\.?\d*|\.\d+))\s*\*\s*(\S.*?)\s*", re.DOTALL)
_PLUS = re.compile(r"\s\+\s")
_FIELDS = ("path", "weight", "format", "columns", "limit")
_NAME = re.compile(r"\w[\w-]{0,99}")  # of a set of evaluation data; it becomes a part of keys
_EXAMPLE = "`data: 0.7*mine.jsonl + 0.3*general.jsonl`"


@dataclass(frozen=True)
class Source:
    """One file, folder, glob or data set; ``weight`` is its share of the samples of an epoch."""

    path: str
    weight: float | None = None
    format: str | None = None
    _: KW_ONLY
    columns: Mapping[str, str] | None = None
    limit: int | None = None


def parse_sources(data: object) -> tuple[Source, ...]:
    """The sources that ``data`` names: a path, a list of paths and mappings, or ``0.7*a.jsonl + 0.3*b.jsonl``.

    Raises:
        UserError: It is anything else, or weights are not positive, not given to all, or do not sum to 1 (whole numbers
            need not: 7 and 3 are 0.7 and 0.3).
    """
    if isinstance(data, str):
        sources = _terms(data)
    elif isinstance(data, (list, tuple)) and data:
        sources = tuple(_source(item, number) for number, item in enumerate(data, start=1))
    else:
        raise UserError(
            f"data is {shown(data)}; expected a path, a list of paths (or mappings with `path`), or {_EXAMPLE}."
        )
    _weights(sources)
    return sources


def parse_sets(data: object) -> dict[str, tuple[Source, ...]]:
    """The sources of each set of evaluation data, by its name; one without a name is called "". None holds no set.

    Raises:
        UserError: A name cannot be a part of a key, or ``parse_sources`` cannot read what it names.
    """
    if not isinstance(data, Mapping):
        return {} if data is None else {"": parse_sources(data)}
    if not data:
        raise UserError("no set is named; expected {name: path}, or a path.")
    sets = {}
    for name, paths in data.items():
        if not isinstance(name, str):
            raise UserError(f"{name!r} cannot name a set; a name is text: put it in quotes.")
        if name in _FIELDS:
            raise UserError(
                f"'{name}' cannot name a set: it is a key of a source, and sources stand in a list (- path: …)."
            )
        if not _NAME.fullmatch(name):
            raise UserError(
                f"{name!r} cannot name a set: use letters, digits, '_' and '-'; the path stands behind the name."
            )
        try:
            sets[name] = parse_sources(paths)
        except UserError as error:
            raise UserError(f"{name}: {error}") from None
    return sets


def with_paths(data: Any, change: Callable[[str], str]) -> Any:
    """``data``, also by name, with every path in it changed; the rest stays as it is."""
    if isinstance(data, str):
        terms = [(weight, path, change(path)) for weight, path in weighted_terms(data)]
        if all(path == new for _, path, new in terms):
            return data
        return " + ".join(f"{weight}*{new}" if weight else new for weight, _, new in terms)
    if isinstance(data, Mapping):
        if "path" not in data:
            return {name: with_paths(paths, change) for name, paths in data.items()}
        return {**data, "path": change(data["path"])}
    return [with_paths(item, change) if isinstance(item, Mapping) else change(item) for item in data]


def _terms(text: str) -> tuple[Source, ...]:
    if not text.strip():
        raise UserError("data is empty; expected the path of a data file.")
    return tuple(Source(path, float(weight) if weight else None) for weight, path in weighted_terms(text))


def weighted_terms(text: str) -> list[tuple[str, str]]:
    """The terms of ``0.7*a.jsonl + 0.3*b.jsonl`` as (weight, path), both as written.

    Anything else is one term without a weight, and so is the path of a file that exists, whatever it looks like.
    """
    parts = _PLUS.split(text)
    if len(parts) == 1 or _is_there(text):
        return [("", text)]
    found = [_TERM.fullmatch(part) for part in parts]
    return [(term[1], term[2]) if term else ("", part.strip()) for term, part in zip(found, parts, strict=True)]


def _is_there(path: str) -> bool:
    try:
        return Path(path).exists()
    except OSError:  # the name is too long
        return False


def _source(item: object, number: int) -> Source:
    where = f"data: entry {number}"
    if isinstance(item, str):
        if len(_PLUS.split(item)) > 1 and not Path(item).exists():
            raise UserError(f"{where} is a sum ({shown(item)}); in a list write a mapping for each: {{path, weight}}.")
        return Source(item)
    if not isinstance(item, Mapping):
        raise UserError(f"{where} is {shown(item)}; expected a path or a mapping with {', '.join(_FIELDS)}.")
    if item and not item.keys() & set(_FIELDS):
        raise UserError(
            f"{where} has the fields {', '.join(map(repr, item))}, as a record has. Records are read from files: write "
            "them as JSON, one a line, and give the path."
        )
    for key in item:
        if key not in _FIELDS:
            raise UserError(f"{where}: unknown key {key!r}.{nearest(str(key), _FIELDS)} Known: {', '.join(_FIELDS)}.")
    path, weight, limit, columns = (item.get(key) for key in ("path", "weight", "limit", "columns"))
    if not isinstance(path, str) or not path.strip():
        raise UserError(f"{where}: path is {shown(path)}; expected the path of a file, a folder or a pattern.")
    if weight is not None and (isinstance(weight, bool) or not isinstance(weight, (int, float))):
        raise UserError(f"{where}: weight is {shown(weight)}; expected a number above 0, such as 0.3.")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, int) or limit < 1):
        raise UserError(f"{where}: limit is {shown(limit)}; expected a number of records, 1 or more.")
    named = isinstance(columns, Mapping) and all(isinstance(name, str) for pair in columns.items() for name in pair)
    if columns is not None and not named:
        raise UserError(f"{where}: columns is {shown(columns)}; expected {{field of the format: field in the data}}.")
    return Source(path, weight, item.get("format"), columns=columns, limit=limit)


def _weights(sources: Sequence[Source]) -> None:
    weights = [source.weight for source in sources if source.weight is not None]
    for source in sources:
        if source.weight is not None and not (math.isfinite(source.weight) and source.weight > 0):
            raise UserError(
                f"data: the weight of {source.path} is {source.weight:g}; expected a number above 0. Leave the source "
                "out if none of it is to be seen."
            )
        if source.weight is None and weights:
            raise UserError(f"data: {source.path} has no weight, others have one. Give each a weight, or none.")
    if not weights or all(weight == int(weight) for weight in weights):
        return
    if abs(sum(weights) - 1) > 1e-6:
        raise UserError(
            f"data: the weights {', '.join(f'{weight:g}' for weight in weights)} sum to {sum(weights):g}, expected 1. "
            "They are the shares of the samples of an epoch; whole numbers are taken as proportions (7 and 3)."
        )


# --------------------------------------------------------------------------------------------------------------- order


@dataclass(frozen=True)
class Mixture:
    """How many samples each source has, and its share (None: every sample of every source, once per epoch)."""

    sizes: tuple[int, ...]
    weights: tuple[float, ...] | None = None

    @property
    def per_epoch(self) -> int:
        """How many samples an epoch has."""
        return sum(self.counts)

    @cached_property
    def counts(self) -> tuple[int, ...]:
        """The number of samples of each source in an epoch: by weight, as many as possible without giving one twice.

        Raises:
            UserError: A source would give no sample.
        """
        sizes, weights = self.sizes, self.weights
        if weights is None or len(sizes) == 1:
            return sizes
        given = [Fraction(repr(float(weight))) for weight in weights]
        shares = [weight / sum(given) for weight in given]
        total = math.floor(min(size / share for size, share in zip(sizes, shares, strict=True)))
        counts = [math.floor(total * share) for share in shares]
        rest = sorted(range(len(shares)), key=lambda i: (counts[i] - total * shares[i], i))
        for index in rest[: total - sum(counts)]:
            counts[index] += 1
        for number, count in enumerate(counts, start=1):
            if not count:
                raise UserError(
                    f"data: with sources of {', '.join(map(str, sizes))} samples and weights "
                    f"{', '.join(f'{weight:g}' for weight in weights)} an epoch has {total} samples, none of them from "
                    f"source {number}. Raise its weight, or give the smallest source more samples or less weight."
                )
        return tuple(counts)

    def order(self, seed: int, epoch: int) -> list[int]:
        """The samples of an epoch in their order, as places in the concatenation of all sources.

        A source that gives a part per epoch goes on in the next where it stopped: none of its samples is seen again
        before all have been seen, and none twice within an epoch. The order depends on nothing but the arguments and
        the mixture.
        """
        shuffled = _shuffled(self.per_epoch, seed, "order", epoch)
        if self.counts == self.sizes:
            return shuffled
        chosen: list[int] = []
        first = 0
        for number, (size, count) in enumerate(zip(self.sizes, self.counts, strict=True)):
            chosen += [first + place for place in _part(size, count, seed, number, epoch)]
            first += size
        return [chosen[place] for place in shuffled]


def _part(size: int, count: int, seed: int, number: int, epoch: int) -> tuple[int, ...]:
    """The samples that source ``number`` gives to an epoch: the next ``count`` of its passes."""
    begin = epoch * count
    turn, at = divmod(begin, size)
    now = _pass(size, count, seed, number, turn)
    part = now[at : at + count]
    return part if len(part) == count else part + _pass(size, count, seed, number, turn + 1)[: count - len(part)]


def _shuffled(size: int, *seed: object) -> list[int]:
    import torch  # imported here, because it takes seconds and reading data does not need it

    from weft.ops.seeds import stable_seed

    order: list[int] = torch.randperm(size, generator=torch.Generator().manual_seed(stable_seed(*seed))).tolist()
    return order


@lru_cache(maxsize=16)
def _pass(size: int, count: int, seed: int, number: int, turn: int) -> tuple[int, ...]:
    """The ``turn``-th random order of all samples of a source.

    If an epoch ends one pass and begins the next, the samples it had from the one do not come first in the other.
    """
    order: tuple[int, ...] = ()
    for passed in range(turn + 1):
        fresh = _shuffled(size, seed, "source", number, passed)
        left = passed * size % count  # samples that the pass before gave to the epoch in which this one begins
        if left:
            seen = set(order[size - left :])
            head = [place for place in fresh if place not in seen][: count - left]
            first = set(head)
            fresh = head + [place for place in fresh if place not in first]
        order = tuple(fresh)
    return order


# --------------------------------------------------------------------------------------------------------------- split


def content_key(example: object) -> str:
    """A hash of what an example says, whatever its place and its format."""
    return hashlib.sha256(json.dumps(_plain(example), sort_keys=True).encode()).hexdigest()


def _plain(value: object) -> object:
    """A dataclass as JSON, without its source and its empty fields (so that a new field changes no hash)."""
    if dataclasses.is_dataclass(value):
        pairs = ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))
        return {name: _plain(item) for name, item in pairs if name != "source" and item not in (None, (), "")}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def number_of(key: str) -> int:
    """The first 64 bits of a hash, which decide a split."""
    return int(key[:16], 16)


def held_by_hash(numbers: Iterable[int], share: float) -> bytearray:
    """Which samples are held out (1) if about ``share`` of them are, chosen by the hash of their content.

    The same record is always on the same side, in whatever order and company it comes.

    Args:
        numbers: ``number_of`` the key of every sample.
        share: how much is held out.

    Raises:
        UserError: Nothing would be held out, or nothing left to train on.
    """
    if not 0 < share < 1:
        raise UserError(f"eval_split is {share:g}; expected a share between 0 and 1, such as 0.05.")
    bound = int(share * 2**64)
    held = bytearray(number < bound for number in numbers)
    if not 0 < held.count(1) < len(held):
        side = "evaluate" if not held.count(1) else "train"
        raise UserError(
            f"eval_split {share:g} of {len(held)} samples leaves none to {side} on: each is held out by the hash of "
            "its content. Take another share, or eval_size for an exact number."
        )
    return held


def split_holdout(samples: Sequence[T], n_eval: int, seed: int) -> tuple[list[T], list[T]]:
    """Choose ``n_eval`` samples at random (the same ones for the same seed and count): ``(train, eval)``.

    Both parts keep the order of ``samples``. Raises UserError when nothing would be left to train on.
    """
    held = held_by_chance(len(samples), n_eval, seed)
    train = [sample for sample, out in zip(samples, held, strict=True) if not out]
    return train, [sample for sample, out in zip(samples, held, strict=True) if out]


def held_by_chance(count: int, n_eval: int, seed: int) -> bytearray:
    """Which of ``count`` samples ``split_holdout`` holds out: 1 for each that it does.

    Raises:
        UserError: Nothing would be left to train on.
    """
    if not 0 <= n_eval < max(count, 1):
        raise UserError(f"cannot hold out {n_eval} of {count} samples: expected 0 or more, and fewer than all.")
    held = bytearray(count)
    if n_eval:
        order = array("q", range(count))  # a list would take five times the memory
        random.Random(seed).shuffle(order)
        for index in order[:n_eval]:
            held[index] = 1
    return held
