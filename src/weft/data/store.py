"""Rendered samples in compact form: a little of each in memory, the rest in memory or, if there is much, in a file.

A ``Sample`` of Python lists takes some 42 bytes per token. Here it is 4 bytes per token and some 60 per sample in a
``SampleStore``, of which 16 bytes per sample stay in memory however many there are. Parts of a store are ``View``s, and
several parts in a row a ``Chain``: sequences of samples, each made anew whenever it is asked for.
"""

from __future__ import annotations

import itertools
import os
import struct
import tempfile
import weakref
from abc import abstractmethod
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Sequence
from typing import IO, Any, overload

import numpy as np

from weft.data.rendering.sample import Sample
from weft.errors import UserError

Array = np.ndarray[Any, np.dtype[Any]]

MEMORY = 64 << 20  # bytes of a store that stay in memory; beyond that all of them go to a file
_BLOCK = 1 << 20  # what is written at once
_NAMES = 1024  # paths that are remembered, to be neither written nor read again
_HEAD = struct.Struct("=HIqqI")  # flags, runs of weights, line, place and length of the path
_RUN = struct.Struct("=dI")
_NUMBER, _COUNT = struct.Struct("=q"), struct.Struct("=I")
_ANSWER, _LABEL, _CUT, _SLOTS, _TYPES, _LINE = 1, 2, 4, 8, 16, 32  # which fields are not their defaults
_DIGITS = 18


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


class SampleStore(Samples):
    """Samples that are appended one by one and stay as they are, in the order in which they came.

    Up to ``memory`` bytes are held in memory; beyond that all go to a file without a name in the folder for temporary
    files (the environment variable TMPDIR names another), which is gone with the store or the process.

    Raises:
        UserError: that folder is full, or cannot be written to.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self._bytes = _Bytes(memory)
        self._ends, self._inputs, self._targets = array("q"), array("i"), array("i")
        self._written: dict[str, tuple[int, int]] = {}  # path -> its place and length
        self._read: dict[int, str] = {}  # the same the other way round

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, sample: Sample) -> None:
        """Take in one more. Raises struct.error for ids beyond 32 bits, UserError where the disk is full."""
        flags, line, path = 0, 0, sample.source
        name, colon, number = path.rpartition(":")
        if colon and number.isascii() and number.isdigit() and len(number) <= _DIGITS and str(int(number)) == number:
            flags, line, path = _LINE, int(number), name
        parts: list[bytes] = [b"", _packed(sample.input_ids)]
        runs = _runs(sample.weights)
        parts += runs
        if sample.target_ids:
            parts.append(_packed(sample.target_ids))
        for flag, value in ((_ANSWER, sample.answer), (_LABEL, sample.label), (_CUT, sample.cut or None)):
            if value is not None:
                flags |= flag
                parts.append(_NUMBER.pack(value))
        for flag, values in ((_SLOTS, sample.slots), (_TYPES, sample.token_types)):
            if values:
                flags |= flag
                parts += (_COUNT.pack(len(values)), _packed(values))
        begin = self._bytes.size
        place = self._written.get(path)
        if place is None:
            text = path.encode("utf-8", "surrogatepass")
            place = (begin + _HEAD.size + sum(map(len, parts)), len(text))
            parts.append(text)
            if len(self._written) >= _NAMES:
                self._written.clear()
            self._written[path] = place
        parts[0] = _HEAD.pack(flags, len(runs), line, *place)
        self._bytes.append(b"".join(parts))
        self._ends.append(self._bytes.size)
        self._inputs.append(len(sample.input_ids))
        self._targets.append(len(sample.target_ids))

    def sample(self, index: int) -> Sample:
        """The sample at ``index``, 0 … len - 1, made anew."""
        data = memoryview(self._bytes.read(self._ends[index - 1] if index else 0, self._ends[index]))
        flags, runs, line, place, length = _HEAD.unpack_from(data)
        at = _HEAD.size + 4 * self._inputs[index]
        ids: list[int] = data[_HEAD.size : at].cast("i").tolist()
        weights: list[float] = []
        for value, count in _RUN.iter_unpack(data[at : at + _RUN.size * runs]):
            weights += [value] * count
        at += _RUN.size * runs
        path = self._read.get(place) or self._path(place, length)
        source = f"{path}:{line}" if flags & _LINE else path
        if not self._targets[index] and not flags & ~_LINE:
            return Sample(ids, weights, source)
        return self._rest(Sample(ids, weights, source, target_ids=()), data, at, flags, self._targets[index])

    def lengths(self) -> tuple[Array, Array]:
        """Of every sample the number of ``input_ids`` and of ``target_ids``."""
        return np.array(self._inputs, np.int64), np.array(self._targets, np.int64)

    def part(self, part: slice) -> View:
        """Some of them."""
        return View(self, range(len(self))[part])

    @staticmethod
    def _rest(sample: Sample, data: memoryview, at: int, flags: int, targets: int) -> Sample:
        def numbers(count: int) -> tuple[int, ...]:
            nonlocal at
            at += 4 * count
            return tuple(data[at - 4 * count : at].cast("i"))

        def number(flag: int) -> int | None:
            nonlocal at
            if not flags & flag:
                return None
            at += _NUMBER.size
            found: int = _NUMBER.unpack_from(data, at - _NUMBER.size)[0]
            return found

        def counted(flag: int) -> tuple[int, ...]:
            nonlocal at
            if not flags & flag:
                return ()
            at += _COUNT.size
            return numbers(_COUNT.unpack_from(data, at - _COUNT.size)[0])

        target_ids = numbers(targets)
        answer, label, cut = number(_ANSWER), number(_LABEL), number(_CUT)
        slots, types = counted(_SLOTS), counted(_TYPES)
        return Sample(
            sample.input_ids, sample.weights, sample.source, slots, answer, label, target_ids, types, cut or 0
        )

    def _path(self, place: int, length: int) -> str:
        if len(self._read) >= _NAMES:
            self._read.clear()
        path = self._bytes.read(place, place + length).decode("utf-8", "surrogatepass")
        self._read[place] = path
        return path


class View(Samples):
    """Some samples of a store, in the order of ``places``."""

    def __init__(self, store: SampleStore, places: range | Array) -> None:
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
        inputs, targets = self.store.lengths()
        places = slice(self.places.start, self.places.stop) if isinstance(self.places, range) else self.places
        if isinstance(self.places, range) and self.places.step != 1:
            places = np.array(self.places, np.int64)
        return inputs[places], targets[places]


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
    if isinstance(samples, SampleStore):
        samples = samples.part(slice(None))
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
        yield samples.part(slice(None)) if isinstance(samples, SampleStore) else samples


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


def _runs(weights: Sequence[float]) -> list[bytes]:
    """``(weight, how often)`` in turn; weights of equal bits are equal, so that -0.0 and NaN come back too."""
    if not weights:
        return []
    bits = np.frombuffer(struct.pack(f"={len(weights)}d", *weights), np.int64)
    begins = [0, *(np.flatnonzero(bits[1:] != bits[:-1]) + 1).tolist()]
    ends = [*begins[1:], len(weights)]
    return [_RUN.pack(weights[begin], end - begin) for begin, end in zip(begins, ends, strict=True)]


def _packed(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"={len(numbers)}i", *numbers)  # twice as fast as an array


class _Bytes:
    """Bytes that are appended: up to ``memory`` of them in memory, more in a temporary file.

    It is read with ``pread``: pages of a mapped file would count as this process's memory.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._file: IO[bytes] | None = None
        self._written, self._tail = 0, bytearray()  # bytes in the file, and those that follow them

    @property
    def size(self) -> int:
        """How many there are."""
        return self._written + len(self._tail)

    def append(self, data: bytes) -> None:
        """Put ``data`` at the end."""
        self._tail += data
        if len(self._tail) > (self._memory if self._file is None else _BLOCK):
            self._write()

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), which were appended at once."""
        if start >= self._written:
            return bytes(self._tail[start - self._written : stop - self._written])
        assert self._file is not None
        data = os.pread(self._file.fileno(), stop - start, start)
        if len(data) != stop - start:
            raise OSError(f"a temporary file ends at {start + len(data)}, before {stop}")
        return data

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            with memoryview(self._tail) as left:
                done = 0
                while done < len(left):
                    done += os.pwrite(self._file.fileno(), left[done : done + _BLOCK], self._written + done)
        except OSError as error:
            raise UserError(
                f"the rendered samples do not fit into the folder for temporary files, {_folder()}: "
                f"{error.strerror or error}, after {self._written / 1e6:,.0f} MB. Free some space there, name another "
                "folder with the environment variable TMPDIR (4 bytes per token are needed, twice that with documents: "
                "joined), or read fewer records (`limit`)."
            ) from error
        self._written += len(self._tail)
        self._tail = bytearray()


def _folder() -> str:
    try:
        return tempfile.gettempdir()
    except OSError:
        return os.environ.get("TMPDIR", "/tmp")
