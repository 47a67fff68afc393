"""How much memory a process takes for pieces that come and go, where the C library hands memory out.

glibc gives each piece of at least ``mmap_threshold`` bytes pages of its own, and gives them back at once. Smaller ones
come from a heap that grows at its end: each takes the smallest gap that is large enough. Gaps that touch become one.
torch wants aligned memory, and for that glibc looks for a gap with room to spare, of which it gives back the rest. So a
gap that a piece leaves behind is too small for the next piece of the same size, unless its neighbours go too.
While ``weft.machine.freed_memory_kept`` is on, the heap never shrinks, so its length is what the process holds.
"""

from __future__ import annotations

import bisect
from collections import Counter
from collections.abc import Iterable

from weft.machine import SMALLEST_ROOM, room_size
from weft.planning.dry_run import Piece

MMAP_THRESHOLD = 32 << 20
# Bytes: of a piece's head; to which sizes are rounded; of the smallest piece; to which torch wants its memory aligned.
_HEAD, _ROUNDED, _SMALLEST, _ALIGNMENT = 16, 16, 32, 64


class Heap:
    """A heap and the pieces beside it.

    Attributes:
        length: bytes of the heap.
        beside: bytes of the pieces that have pages of their own, now.
        peak: the most bytes of both.
    """

    def __init__(self, mmap_threshold: int = MMAP_THRESHOLD, page: int = 4096) -> None:
        self.threshold, self.page = mmap_threshold, page
        self.length = self.beside = self.peak = 0
        self._gaps: list[tuple[int, int]] = []  # (bytes, place), sorted
        self._at: dict[int, int] = {}  # place of a gap -> its bytes
        self._ends: dict[int, int] = {}  # end of a gap -> its place

    def take(self, count: int) -> int | None:
        """Take so many bytes; returns their place, None for those that have pages of their own."""
        if count >= self.threshold:
            self.beside += -(-count // self.page) * self.page
            self._note()
            return None
        size = self._rounded(count)
        asked = size + _ALIGNMENT + _SMALLEST
        index = bisect.bisect_left(self._gaps, (asked, -1))
        if index < len(self._gaps):
            there, place = self._gaps[index]
            self._drop(place)
        else:
            last = self._ends.get(self.length)
            place = self.length if last is None else last
            if last is not None:
                self._drop(last)
            there = max(asked, self.length - place)
            self.length = place + there
            self._note()
        begin = -(-(place + _HEAD) // _ALIGNMENT) * _ALIGNMENT - _HEAD
        if 0 < begin - place < _SMALLEST:
            begin += _ALIGNMENT
        if begin > place:
            self._add(place, begin - place)
        if place + there > begin + size:
            self._add(begin + size, place + there - begin - size)
        return begin

    def give_back(self, place: int | None, count: int) -> None:
        """Give back what ``take(count)`` put at ``place``."""
        if place is None:
            self.beside -= -(-count // self.page) * self.page
            return
        size = self._rounded(count)
        if (after := self._at.get(place + size)) is not None:
            self._drop(place + size)
            size += after
        if (before := self._ends.get(place)) is not None:
            size += place - before
            place = before
            self._drop(place)
        self._add(place, size)

    def _rounded(self, count: int) -> int:
        return max(_SMALLEST, -(-(count + 8) // _ROUNDED) * _ROUNDED)

    def _note(self) -> None:
        self.peak = max(self.peak, self.length + self.beside)

    def _add(self, place: int, size: int) -> None:
        self._at[place], self._ends[place + size] = size, place
        bisect.insort(self._gaps, (size, place))

    def _drop(self, place: int) -> None:
        size = self._at.pop(place)
        del self._ends[place + size]
        del self._gaps[bisect.bisect_left(self._gaps, (size, place))]


class HeapAndRooms(Heap):
    """A heap beside ``weft.machine.Rooms``, in which the large pieces lie. A room that is free waits for the next piece
    of its size, and nothing else is put there.
    """

    def __init__(self) -> None:
        super().__init__()
        self._free: Counter[int] = Counter()

    def take(self, count: int) -> int | None:
        """As a heap's."""
        if count < SMALLEST_ROOM:
            return super().take(count)
        size = room_size(count)
        if self._free[size]:
            self._free[size] -= 1
        else:
            self.beside += size
            self._note()
        return None

    def give_back(self, place: int | None, count: int) -> None:
        """As a heap's."""
        if count < SMALLEST_ROOM:
            super().give_back(place, count)
        else:
            self._free[room_size(count)] += 1


def heap_of(device: str) -> Heap:
    """The heap of a device. torch hands out a GPU's memory in pieces of 512 bytes, of which it counts what is held."""
    return Heap(mmap_threshold=0, page=512) if device == "cuda" else Heap()


def peak_of(pieces: Iterable[Piece], heap: Heap) -> tuple[int, int]:
    """The most bytes that the process holds for the pieces, and the event at which it does."""
    events: list[tuple[int, bool, Piece]] = []
    for piece in pieces:
        events.append((piece.taken, True, piece))
        if piece.freed is not None:
            events.append((piece.freed, False, piece))
    events.sort(key=lambda event: event[0])
    places: dict[int, int | None] = {}
    most, at = heap.peak, 0
    for number, taken, piece in events:
        if taken:
            places[id(piece)] = heap.take(piece.bytes)
        else:
            heap.give_back(places.pop(id(piece)), piece.bytes)
        if heap.peak > most:
            most, at = heap.peak, number
    return most, at
