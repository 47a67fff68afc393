"""Rendered samples in compact form: a little of each in memory, the rest in memory or, if there is much, in a file.

A ``Sample`` of Python lists takes some 42 bytes per token. Here it is 4 bytes per token and some 70 per sample, of
which 16 bytes per sample stay in memory however many there are.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import numpy as np

from weft.data.rendering.sample import Sample
from weft.data.spill import Bytes
from weft.data.views import Array, Columns, Places, Samples

_Rest = tuple[tuple[int, ...], int | None, tuple[int, ...], tuple[int, ...], int]

MEMORY = 64 << 20  # bytes of a store that stay in memory; beyond that all of them go to a file
_NAMES = 1024  # paths that are remembered, to be neither written nor read again
_HEAD = struct.Struct("=HIqqqI")  # flags, runs of weights, answer, line, place and length of the path
_RUN = struct.Struct("=dI")
_RUNS = np.dtype([("weight", "=f8"), ("count", "=u4")])
_NUMBER, _COUNT = struct.Struct("=q"), struct.Struct("=I")
_ANSWER, _LINE, _LABEL, _CUT, _SLOTS, _TYPES = 1, 2, 4, 8, 16, 32  # which fields are not their defaults
_USUAL = _ANSWER | _LINE
_DIGITS = 18


class SampleStore(Samples):
    """Samples that are appended one by one and stay as they are, in the order in which they came.

    Up to ``memory`` bytes are held in memory; beyond that all go to a file without a name in the folder for temporary
    files (the environment variable TMPDIR names another), which is gone with the store or the process.

    Raises:
        UserError: that folder is full, or cannot be written to.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self._bytes = Bytes(memory)
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
        for flag, value in ((_LABEL, sample.label), (_CUT, sample.cut or None)):
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
        if sample.answer is not None:
            flags |= _ANSWER
        parts[0] = _HEAD.pack(flags, len(runs), sample.answer or 0, line, *place)
        self._bytes.append(b"".join(parts))
        self._ends.append(self._bytes.size)
        self._inputs.append(len(sample.input_ids))
        self._targets.append(len(sample.target_ids))

    def sample(self, index: int) -> Sample:
        """The sample at ``index``, 0 … len - 1, made anew."""
        data = memoryview(self._bytes.read(self._ends[index - 1] if index else 0, self._ends[index]))
        flags, runs, answer, line, place, length = _HEAD.unpack_from(data)
        at = _HEAD.size + 4 * self._inputs[index]
        ids: list[int] = data[_HEAD.size : at].cast("i").tolist()
        weights: list[float] = []
        for value, count in _RUN.iter_unpack(data[at : at + _RUN.size * runs]):
            weights += [value] * count
        path = self._read.get(place) or self._path(place, length)
        source = f"{path}:{line}" if flags & _LINE else path
        rest = () if flags <= _USUAL and not self._targets[index] else self._rest(index, data, at + _RUN.size * runs)
        slots, label, targets, types, cut = rest or ((), None, (), (), 0)
        given = answer if flags & _ANSWER else None
        return Sample(
            ids, weights, source, slots=slots, answer=given, label=label, target_ids=targets, token_types=types, cut=cut
        )

    def _rest(self, index: int, data: memoryview, at: int) -> _Rest:
        """The fields that few samples have."""
        flags: int = _HEAD.unpack_from(data)[0]

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

        targets, label, cut = numbers(self._targets[index]), number(_LABEL), number(_CUT)
        slots, types = counted(_SLOTS), counted(_TYPES)
        return slots, label, targets, types, cut or 0

    def columns_at(self, places: Places) -> Columns:
        """The tokens of the samples at ``places``."""
        ids, runs, lengths, answers, targets, labels = [], [], [], [], [], []
        for index in map(int, places):
            data = self._bytes.read(self._ends[index - 1] if index else 0, self._ends[index])
            flags, count, answer, *_ = _HEAD.unpack_from(data)
            at = _HEAD.size + 4 * self._inputs[index]
            end = at + _RUN.size * count
            length = self._targets[index]
            ids.append(data[end : end + 4 * length] if length else data[_HEAD.size : at])
            runs.append(_RUN.pack(1.0, length) if length else data[at:end])
            lengths.append(length or self._inputs[index])
            answers.append(answer if flags & _ANSWER else -1)
            targets.append(length > 0)
            labels.append(flags & _LABEL > 0)
        weights = np.frombuffer(b"".join(runs), _RUNS)
        return Columns(
            np.frombuffer(b"".join(ids), "=i4"),
            np.repeat(weights["weight"].astype(np.float32), weights["count"]),
            *(np.array(column, np.int64) for column in (lengths, answers)),
            *(np.array(column, bool) for column in (targets, labels)),
        )

    def lengths_at(self, places: Places) -> tuple[Array, Array]:
        """Of the samples at ``places`` the number of ``input_ids`` and of ``target_ids``."""
        chosen = slice(places.start, places.stop) if isinstance(places, range) else places
        inputs, targets = (np.frombuffer(numbers, np.int32)[chosen] for numbers in (self._inputs, self._targets))
        return inputs.astype(np.int64), targets.astype(np.int64)  # copies: an array that is looked at cannot grow

    def known_at(self, places: Places) -> tuple[int, Places]:
        """A sample is told by its place in the store."""
        return id(self), places

    def parts(self) -> Sequence[tuple[SampleStore, Places]]:
        """All of it."""
        return [(self, range(len(self)))] if len(self) else []

    def _path(self, place: int, length: int) -> str:
        if len(self._read) >= _NAMES:
            self._read.clear()
        path = self._bytes.read(place, place + length).decode("utf-8", "surrogatepass")
        self._read[place] = path
        return path


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
