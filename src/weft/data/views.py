"""Sequences of samples that are made when they are asked for: parts of a store, and several parts in a row.

``View``s and ``Chain``s of them cost some bytes per sample, however long the samples are.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple, Protocol, overload

import numpy as np

from weft.data.rendering.sample import Sample

Array = np.ndarray[Any, np.dtype[Any]]


class Samples(Sequence[Sample]):
    """A sequence of samples that knows how long they are without making them. Equal to any with equal samples."""

    @abstractmethod
    def lengths(self) -> tuple[Array, Array]:
        """Of every sample the number of ``input_ids`` and of ``target_ids``."""

    @abstractmethod
    def sample(self, index: int) -> Sample:
        """The sample at ``index``, 0 … len - 1."""

    def part(self, part: slice) -> Sequence[Sample]:
        """Some of them."""
        return [self.sample(index) for index in range(*part.indices(len(self)))]

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Sequence[Sample]: ...

    def __getitem__(self, index: int | slice) -> Sample | Sequence[Sample]:
        if isinstance(index, slice):
            return self.part(index)
        place = index + len(self) if index < 0 else index
        if not 0 <= place < len(self):
            raise IndexError(f"sample {index} of {len(self)}")
        return self.sample(place)

    def __iter__(self) -> Iterator[Sample]:
        return map(self.sample, range(len(self)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class Columns(NamedTuple):
    """What samples are to write, end to end: of a sequence-to-sequence sample the targets, all of which are learned.

    ``ids`` and ``weights`` of the tokens [N]; of every sample its length, where its last answer begins (-1: nowhere),
    whether it has targets, and a label.
    """

    ids: Array
    weights: Array
    lengths: Array
    answers: Array
    targets: Array
    labels: Array


class Store(Protocol):
    """What a view asks of its store."""

    def __len__(self) -> int: ...

    def sample(self, index: int, /) -> Sample: ...

    def lengths_at(self, places: slice | Array, /) -> tuple[Array, Array]: ...

    def columns_at(self, places: Iterable[int], /) -> Columns: ...


class View(Samples):
    """Some samples of a store, in the order of ``places``."""

    def __init__(self, store: Store, places: range | Array) -> None:
        self.store = store
        if not isinstance(places, range):
            places = places.astype(np.int32 if len(store) < 2**31 else np.int64)
        self.places = places

    def __len__(self) -> int:
        return len(self.places)

    def sample(self, index: int) -> Sample:
        """The sample at ``index``, 0 … len - 1."""
        return self.store.sample(int(self.places[index]))

    def part(self, part: slice) -> View:
        """Some of them."""
        return View(self.store, self.places[part])

    def lengths(self) -> tuple[Array, Array]:
        """Of every sample the number of ``input_ids`` and of ``target_ids``."""
        if isinstance(self.places, range) and self.places.step == 1:
            return self.store.lengths_at(slice(self.places.start, self.places.stop))
        return self.store.lengths_at(_numbers(self.places))


class Chain(Samples):
    """Several sequences of samples, one after the other."""

    def __init__(self, parts: Iterable[Sequence[Sample]]) -> None:
        self.parts = tuple(parts)
        self._ends = list(itertools.accumulate(map(len, self.parts)))

    def __len__(self) -> int:
        return self._ends[-1] if self._ends else 0

    def __iter__(self) -> Iterator[Sample]:
        return itertools.chain.from_iterable(self.parts)

    def sample(self, index: int) -> Sample:
        """The sample at ``index``, 0 … len - 1."""
        number = bisect_right(self._ends, index)
        return self.parts[number][index - self._ends[number] + len(self.parts[number])]

    def part(self, part: slice) -> Sequence[Sample]:
        """Some of them."""
        start, stop, step = part.indices(len(self))
        if step != 1:
            return super().part(part)
        begins = [0, *self._ends]
        found = [
            one[max(start - begin, 0) : max(stop - begin, 0)] for one, begin in zip(self.parts, begins, strict=False)
        ]
        return Chain(one for one in found if len(one))

    def lengths(self) -> tuple[Array, Array]:
        """Of every sample the number of ``input_ids`` and of ``target_ids``."""
        found = [lengths(part) for part in self.parts] or [lengths(())]
        return np.concatenate([one for one, _ in found]), np.concatenate([other for _, other in found])


def chained(parts: Sequence[Sequence[Sample]]) -> Sequence[Sample]:
    """``parts`` one after the other; a single one as it is."""
    return parts[0] if len(parts) == 1 else Chain(parts)


def picked(samples: Sequence[Sample], wanted: Array) -> Sequence[Sample]:
    """The samples at the places where ``wanted`` (bool, one per sample) says so; of those in a store a view."""
    if wanted.all():
        return samples
    if isinstance(samples, Samples):
        samples = samples[:]  # of a store a view
    if isinstance(samples, View):
        return View(samples.store, _numbers(samples.places)[wanted])
    if isinstance(samples, Chain):
        cuts = np.split(wanted, samples._ends[:-1])
        return Chain(picked(part, cut) for part, cut in zip(samples.parts, cuts, strict=True))
    return [samples[i] for i in np.flatnonzero(wanted).tolist()]


def lengths(samples: Sequence[Sample]) -> tuple[Array, Array]:
    """Of every sample the number of ``input_ids`` and of ``target_ids``, without making those of a store."""
    if isinstance(samples, Samples):
        return samples.lengths()
    inputs = np.fromiter((len(sample.input_ids) for sample in samples), np.int64, len(samples))
    return inputs, np.fromiter((len(sample.target_ids) for sample in samples), np.int64, len(samples))


def columns(samples: Sequence[Sample]) -> Columns:
    """The tokens of many samples as arrays, without making those of a store."""
    if isinstance(samples, Samples):
        samples = samples[:]  # of a store a view
    if isinstance(samples, View):
        return samples.store.columns_at(_numbers(samples.places).tolist())
    if isinstance(samples, Chain) and samples.parts:
        found = [columns(part) for part in samples.parts]
        return Columns(*(np.concatenate(column) for column in zip(*found, strict=True)))
    rows = [sample.target_ids or sample.input_ids for sample in samples]
    weights = ([1.0] * len(sample.target_ids) if sample.target_ids else sample.weights for sample in samples)
    total = sum(map(len, rows))
    return Columns(
        np.fromiter(itertools.chain.from_iterable(rows), np.int64, total),
        np.fromiter(itertools.chain.from_iterable(weights), np.float32, total),
        np.fromiter(map(len, rows), np.int64, len(rows)),
        np.array([-1 if sample.answer is None else sample.answer for sample in samples], np.int64),
        np.array([bool(sample.target_ids) for sample in samples], bool),
        np.array([sample.label is not None for sample in samples], bool),
    )


def sizes(samples: Sequence[Sample]) -> Array:
    """Tokens of every sample that a model reads."""
    inputs, targets = lengths(samples)
    return inputs + targets


def distinct(*groups: Sequence[Sample]) -> list[Sequence[Sample]]:
    """Each group without the samples that stood in it, or in one before it, already.

    Samples of a store are told apart by their places there, others by being the same object.
    """
    seen: dict[int, Array] = {}  # of each store (by its id) what was met
    known: set[int] = set()  # ids of samples that are in no store
    return [Chain(_fresh(part, seen, known) for part in _parts(group)) for group in groups]


def _parts(samples: Sequence[Sample]) -> Iterator[Sequence[Sample]]:
    if isinstance(samples, Chain):
        for part in samples.parts:
            yield from _parts(part)
    else:
        yield samples[:] if isinstance(samples, Samples) else samples


def _fresh(part: Sequence[Sample], seen: dict[int, Array], known: set[int]) -> Sequence[Sample]:
    if not isinstance(part, View):
        found = []
        for sample in part:
            if id(sample) not in known:
                known.add(id(sample))
                found.append(sample)
        return found
    met = seen.setdefault(id(part.store), np.zeros(len(part.store), bool))
    places = _numbers(part.places)
    fresh = places[~met[places]]
    before = int(np.count_nonzero(met))
    met[fresh] = True
    if int(np.count_nonzero(met)) - before < len(fresh):  # some stand twice in this very part
        fresh = fresh[np.sort(np.unique(fresh, return_index=True)[1])]
    return part if len(fresh) == len(part) else View(part.store, fresh)


def _numbers(places: range | Array) -> Array:
    return np.arange(places.start, places.stop, places.step) if isinstance(places, range) else places
