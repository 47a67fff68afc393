"""Rendered samples in compact form: a little of each stays in memory, the rest goes to a file if it is much.

A ``Sample`` of Python lists takes some 42 bytes per token. Here it is 4 bytes per token and some 70 per sample, of
which 16 bytes per sample stay in memory whatever their number.
"""

from __future__ import annotations

import struct
from array import array
from collections.abc import Sequence

import numpy as np

from weft.data.rendering.sample import Sample
from weft.data.spill import Spill
from weft.data.views import Array, Columns, Places, Samples

MEMORY = 64 << 20  # bytes of a store that stay in memory; beyond that all of them go to a file
_NAMES = 1024  # remembered paths, which need not be written or read again
_HEAD = struct.Struct("=HIqqqI")  # flags, runs of weights, answer, line, place and length of the path
_RUN = struct.Struct("=dI")
_RUNS = np.dtype([("weight", "=f8"), ("count", "=u4")])
# Label, cut, numbers of slots, token types and branches, the given number, bytes of facts: what few samples have.
_REST = struct.Struct("=qqIIIdI")
_ANSWER, _LINE, _LABEL, _MORE = 1, 2, 4, 8  # fields that differ from their defaults
_DIGITS = 18


class SampleStore(Samples):
    """Samples in the order in which they are appended; none of them changes.

    Up to ``memory`` bytes are held in memory. Beyond that all go to a file without a name in the folder for temporary
    files (the environment variable TMPDIR names another); it vanishes with the store or the process.

    Raises:
        UserError: That folder is full, or cannot be written to.
    """

    def __init__(self, memory: int = MEMORY) -> None:
        self._bytes = Spill(memory)
        self._ends, self._inputs, self._targets = array("q"), array("i"), array("i")
        self._branched = array("b")
        self._written: dict[str, tuple[int, int]] = {}  # path -> its place and length
        self._read: dict[int, str] = {}  # the same the other way round

    def __len__(self) -> int:
        return len(self._ends)

    def append(self, sample: Sample) -> None:
        """Take in one more. Raises struct.error for ids beyond 32 bits, and UserError if the disk is full."""
        flags, line, path = 0, 0, sample.source
        name, colon, number = path.rpartition(":")
        if colon and number.isascii() and number.isdigit() and len(number) <= _DIGITS and str(int(number)) == number:
            flags, line, path = _LINE, int(number), name
        runs = _runs(sample.weights)
        parts: list[bytes] = [b"", _packed(sample.input_ids), *runs, _packed(sample.target_ids)]
        if sample.label is not None:
            flags |= _LABEL
        slots, types = sample.slots, sample.token_types
        branches, facts = sample.branches, sample.facts.encode("utf-8", "surrogatepass")
        if sample.label is not None or sample.cut or slots or types or branches or facts:
            flags |= _MORE
            counts = map(len, (slots, types, branches))
            rest = _REST.pack(sample.label or 0, sample.cut, *counts, sample.given, len(facts))
            parts += (rest, _packed(slots), _packed(types), _packed(branches), facts)
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
        self._branched.append(bool(branches))

    def sample(self, index: int) -> Sample:
        """Make the sample at ``index``, 0 … len - 1."""
        data = memoryview(self._bytes.read(self._ends[index - 1] if index else 0, self._ends[index]))
        flags, runs, answer, line, place, length = _HEAD.unpack_from(data)
        at = _HEAD.size + 4 * self._inputs[index]
        ids = _unpacked(data[_HEAD.size : at])
        weights: list[float] = []
        end = at + _RUN.size * runs
        for value, count in _RUN.iter_unpack(data[at:end]):
            weights += [value] * count
        at = end + 4 * self._targets[index]
        targets = tuple(_unpacked(data[end:at]))
        path = self._read.get(place) or self._path(place, length)
        source = f"{path}:{line}" if flags & _LINE else path
        given = answer if flags & _ANSWER else None
        if not flags & _MORE:
            return Sample(ids, weights, source, answer=given, target_ids=targets)
        label, cut, *counts, number, size = _REST.unpack_from(data, at)
        at += _REST.size
        lists = []
        for count in counts:
            lists.append(tuple(_unpacked(data[at : at + 4 * count])))
            at += 4 * count
        return Sample(
            ids,
            weights,
            source,
            slots=lists[0],
            answer=given,
            label=label if flags & _LABEL else None,
            target_ids=targets,
            token_types=lists[1],
            cut=cut,
            branches=lists[2],
            given=number,
            facts=bytes(data[at : at + size]).decode("utf-8", "surrogatepass"),
        )

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
        """The numbers of ``input_ids`` and of ``target_ids`` of the samples at ``places``."""
        chosen = slice(places.start, places.stop) if isinstance(places, range) else places
        inputs, targets = (np.frombuffer(numbers, np.int32)[chosen] for numbers in (self._inputs, self._targets))
        return inputs.astype(np.int64), targets.astype(np.int64)  # copies: an array that is looked at cannot grow

    def branched_at(self, places: Places) -> Array:
        """Whether the samples at ``places`` hold judged answers."""
        chosen = slice(places.start, places.stop) if isinstance(places, range) else places
        return np.frombuffer(self._branched, np.int8)[chosen].astype(bool)

    def known_at(self, places: Places) -> tuple[int, Places]:
        """A sample is known by its place in the store."""
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
    """Runs of equal weights as ``(weight, count)``; their bits are compared, so that -0.0 and NaN come back too."""
    if not weights:
        return []
    bits = np.frombuffer(struct.pack(f"={len(weights)}d", *weights), np.int64)
    begins = [0, *(np.flatnonzero(bits[1:] != bits[:-1]) + 1).tolist()]
    ends = [*begins[1:], len(weights)]
    return [_RUN.pack(weights[begin], end - begin) for begin, end in zip(begins, ends, strict=True)]


def _packed(numbers: Sequence[int]) -> bytes:
    return struct.pack(f"={len(numbers)}i", *numbers)  # twice as fast as an array


def _unpacked(data: memoryview) -> list[int]:
    return data.cast("i").tolist()
