"""Sequences of samples that lie in stores: a sample is made when it is asked for.

A sequence is places in stores, one part after the other. It costs some bytes per sample, however long the samples are.
"""

from __future__ import annotations

import itertools
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple, Protocol, overload

import numpy as np

from weft.data.rendering.sample import Sample

Array = np.ndarray[Any, np.dtype[Any]]
Places = range | Array
_NONE: Array = np.zeros(0, np.int64)


class Columns(NamedTuple):
    """The tokens that samples write, end to end; a sequence-to-sequence sample writes its targets and learns all.

    ``ids`` and ``weights`` are those of the tokens [N]. The others have an entry per sample: its number of tokens, the
    place where its last answer begins (-1: nowhere), whether it has targets, and whether it has a label.
    """

    ids: Array
    weights: Array
    lengths: Array
    answers: Array
    targets: Array
    labels: Array


class Store(Protocol):
    """Where samples lie."""

    def sample(self, place: int, /) -> Sample: ...

    def lengths_at(self, places: Places, /) -> tuple[Array, Array]: ...

    def columns_at(self, places: Places, /) -> Columns: ...

    def branched_at(self, places: Places, /) -> Array: ...

    def known_at(self, places: Places, /) -> tuple[int, Places]:
        """The key of a numbering, and the samples' numbers in it: equal ones are the same sample."""
        ...


class Samples(Sequence[Sample]):
    """Samples that lie in stores. They equal any sequence with equal samples."""

    @abstractmethod
    def parts(self) -> Sequence[tuple[Store, Places]]:
        """Stores and places in them, one part after the other."""

    def __len__(self) -> int:
        return sum(len(places) for _, places in self.parts())

    def __iter__(self) -> Iterator[Sample]:
        return (store.sample(int(place)) for store, places in self.parts() for place in places)

    @overload
    def __getitem__(self, index: int) -> Sample: ...

    @overload
    def __getitem__(self, index: slice) -> Samples: ...

    def __getitem__(self, index: int | slice) -> Sample | Samples:
        if isinstance(index, slice):
            return self._part(range(len(self))[index])
        place = range(len(self))[index]
        for store, places in self.parts():
            if place < len(places):
                return store.sample(int(places[place]))
            place -= len(places)
        raise AssertionError

    def _part(self, part: range) -> Samples:
        if part.step != 1:
            return View(*(one for index in part for one in self[index : index + 1].parts()))
        begins = itertools.accumulate((len(places) for _, places in self.parts()), initial=0)
        return View(
            *(
                (store, places[max(part.start - begin, 0) : max(part.stop - begin, 0)])
                for begin, (store, places) in zip(begins, self.parts(), strict=False)
            )
        )

    def picked(self, wanted: Array) -> Samples:
        """The samples for which ``wanted`` (bool [samples]) is true."""
        if wanted.all():
            return self
        cuts = np.split(wanted, np.cumsum([len(places) for _, places in self.parts()])[:-1])
        return View(
            *((store, np.asarray(places)[cut]) for (store, places), cut in zip(self.parts(), cuts, strict=True))
        )

    def lengths(self) -> tuple[Array, Array]:
        """The numbers of ``input_ids`` and of ``target_ids`` [samples]; no sample of a store is made."""
        found = [store.lengths_at(places) for store, places in self.parts()] or [(_NONE, _NONE)]
        return np.concatenate([one for one, _ in found]), np.concatenate([other for _, other in found])

    def branched(self) -> Array:
        """Whether each sample holds judged answers, bool [samples]; no sample of a store is made."""
        found = [store.branched_at(places) for store, places in self.parts()] or [np.zeros(0, bool)]
        return np.concatenate(found)

    def columns(self) -> Columns:
        """The tokens of all samples as arrays; no sample of a store is made."""
        found = [store.columns_at(places) for store, places in self.parts()] or [ListStore(()).columns_at(range(0))]
        return Columns(*(np.concatenate(column) for column in zip(*found, strict=True)))

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Sequence) or len(self) != len(other):
            return False
        return all(one == two for one, two in zip(self, other, strict=True))

    __hash__ = None  # type: ignore[assignment]


class View(Samples):
    """Some samples of several stores."""

    def __init__(self, *parts: tuple[Store, Places]) -> None:
        self._parts = [
            (store, places if isinstance(places, range) else places.astype(np.int32 if places.max() < 2**31 else int))
            for store, places in parts
            if len(places)
        ]

    def parts(self) -> Sequence[tuple[Store, Places]]:
        """Stores and places in them, one part after the other."""
        return self._parts


class ListStore:
    """A list in the role of a store."""

    def __init__(self, samples: Sequence[Sample]) -> None:
        self.samples = samples

    def sample(self, place: int) -> Sample:
        """The sample at a place."""
        return self.samples[place]

    def lengths_at(self, places: Places) -> tuple[Array, Array]:
        """The numbers of ``input_ids`` and of ``target_ids`` of the samples at ``places``."""
        samples = [self.samples[place] for place in places]
        inputs = np.fromiter((len(sample.input_ids) for sample in samples), np.int64, len(samples))
        return inputs, np.fromiter((len(sample.target_ids) for sample in samples), np.int64, len(samples))

    def columns_at(self, places: Places) -> Columns:
        """The tokens of the samples at ``places``."""
        samples = [self.samples[place] for place in places]
        rows, weights = zip(*(sample.written for sample in samples), strict=True) if samples else ((), ())
        total = sum(map(len, rows))
        return Columns(
            np.fromiter(itertools.chain.from_iterable(rows), np.int64, total),
            np.fromiter(itertools.chain.from_iterable(weights), np.float32, total),
            np.fromiter(map(len, rows), np.int64, len(rows)),
            answers=np.array([-1 if sample.answer is None else sample.answer for sample in samples], np.int64),
            targets=np.array([bool(sample.target_ids) for sample in samples], bool),
            labels=np.array([sample.label is not None for sample in samples], bool),
        )

    def branched_at(self, places: Places) -> Array:
        """Whether the samples at ``places`` hold judged answers."""
        return np.array([bool(self.samples[place].branches) for place in places], bool)

    def known_at(self, places: Places) -> tuple[int, Places]:
        """A sample is known by its identity as an object."""
        return 0, np.array([id(self.samples[place]) for place in places], np.int64)


def samples_of(samples: Sequence[Sample]) -> Samples:
    """Make a list ``Samples``; those stay as they are."""
    return samples if isinstance(samples, Samples) else View((ListStore(samples), range(len(samples))))


def chained(groups: Sequence[Sequence[Sample]]) -> Samples:
    """The samples of several groups, one group after the other."""
    if len(groups) == 1:
        return samples_of(groups[0])
    return View(*(part for group in groups for part in samples_of(group).parts()))


def sizes(samples: Sequence[Sample]) -> Array:
    """The number of tokens that a model reads of each sample, [samples]."""
    inputs, targets = samples_of(samples).lengths()
    return inputs + targets


def distinct(*groups: Sequence[Sample]) -> list[Samples]:
    """Each group without the samples that came earlier in it or in a group before it."""
    seen: dict[int, Array] = {}
    return [View(*(_fresh(*part, seen) for part in samples_of(group).parts())) for group in groups]


def _fresh(store: Store, places: Places, seen: dict[int, Array]) -> tuple[Store, Places]:
    whose, numbers = store.known_at(places)
    if isinstance(numbers, range) and whose not in seen:  # each is there once
        seen[whose] = np.asarray(numbers)
        return store, places
    fresh = np.zeros(len(places), bool)
    fresh[np.unique(numbers, return_index=True)[1]] = True
    fresh &= ~np.isin(numbers, seen.get(whose, _NONE))
    seen[whose] = np.union1d(seen.get(whose, _NONE), numbers)
    return store, np.asarray(places)[fresh]


def each_answer(samples: Samples) -> tuple[Samples, Array]:
    """The samples with each judged answer, after its prompt, as one of its own; and whose each is, [those].

    Where no answers were judged they are the samples themselves.
    """
    if not samples.branched().any():
        return samples, np.arange(len(samples))
    found = [(number, one) for number, sample in enumerate(samples) for one in sample.each]
    return samples_of([one for _, one in found]), np.array([number for number, _ in found], np.int64)
