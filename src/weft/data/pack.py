"""Fill packs of a fixed number of tokens with whole sequences.

A pack is a micro-batch: one stream of sequences end to end, in which no token sees another sequence
(``weft.core.stream``). So any sequences may go together; only how full and how random the packs are counts. Packs by
best-fit decreasing hold either a few long sequences or many short ones. ``pack_in_order`` fills packs as well and keeps
a random order random (docs/data.md has the figures), so it is used where each pack is a step.
"""

from __future__ import annotations

import heapq
from collections import deque
from collections.abc import Sequence


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Best-fit decreasing: the longest sequence first, each into the fullest pack that still has room for it.

    Args:
        lengths: tokens of every sequence, 1 or more.
        capacity: tokens that a pack may hold.

    Returns:
        Every index of ``lengths`` exactly once; packs in the order in which they were opened. Of equal sequences the
        first in ``lengths`` is placed first. Of equally full packs the first that was opened is taken.

    Raises:
        ValueError: a length is below 1 or above ``capacity``: sequences are never cut, nor left out.
    """
    order = _longest_first(lengths, capacity)
    capacity = min(capacity, max(sum(lengths), 1))  # the masks are as wide as the room
    packs: list[list[int]] = []
    open_with: dict[int, list[int]] = {}  # room -> heap of the packs that have exactly that much left
    rooms = 0  # bit r is set while open_with[r] holds a pack
    for index in order:
        length = lengths[index]
        fitting = rooms >> length
        if fitting:
            room = length + (fitting & -fitting).bit_length() - 1  # the lowest bit: the tightest fit
            heap = open_with[room]
            number = heapq.heappop(heap)
            packs[number].append(index)
            if not heap:
                rooms ^= 1 << room
        else:
            room, number = capacity, len(packs)
            packs.append([index])
        left = room - length
        if left:
            heapq.heappush(open_with.setdefault(left, []), number)
            rooms |= 1 << left
    return packs


def pack_ref(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """``pack`` as in the textbook: every sequence looks at every pack, O(n²)."""
    packs: list[list[int]] = []
    rooms: list[int] = []
    for index in _longest_first(lengths, capacity):
        fitting = [(room, number) for number, room in enumerate(rooms) if room >= lengths[index]]
        if fitting:
            number = min(fitting)[1]
            packs[number].append(index)
            rooms[number] -= lengths[index]
        else:
            packs.append([index])
            rooms.append(capacity - lengths[index])
    return packs


def pack_in_order(lengths: Sequence[int], capacity: int, window: int = 1024) -> list[list[int]]:
    """Fill one pack after the other: with the next sequences while they fit, then with the best of those that follow.

    Each pack begins with the first sequence that is left, and goes on with those after it. When the next one does not
    fit, the longest that does is taken out of the ``window`` sequences from the pack's first on, until none fits.

    Returns:
        Every index of ``lengths`` exactly once.

    Raises:
        ValueError: as ``pack``.
    """
    _check(lengths, capacity)
    packs: list[list[int]] = []
    taken = bytearray(len(lengths))
    near: dict[int, deque[int]] = {}  # length -> the indices inside the window that have it, some already taken
    known = 0  # bit l is set while near[l] is not empty
    longest = max(lengths, default=0)  # a mask as wide as any capacity would not fit into memory
    first = seen = 0  # the first index left, the first beyond the window
    while True:
        while first < len(lengths) and taken[first]:
            first += 1
        if first == len(lengths):
            return packs
        while seen < min(first + window, len(lengths)):
            near.setdefault(lengths[seen], deque()).append(seen)
            known |= 1 << lengths[seen]
            seen += 1
        one: list[int] = []
        room, at = capacity, first
        while at < seen and (taken[at] or lengths[at] <= room):
            if not taken[at]:
                taken[at] = True
                one.append(at)
                room -= lengths[at]
            at += 1
        while fitting := known & ((2 << min(room, longest)) - 1):
            length = fitting.bit_length() - 1  # the highest bit: the longest that fits
            index = near[length].popleft()
            if not near[length]:
                known ^= 1 << length
            if not taken[index]:
                taken[index] = True
                one.append(index)
                room -= length
        packs.append(one)


def pack_in_order_ref(lengths: Sequence[int], capacity: int, window: int = 1024) -> list[list[int]]:
    """``pack_in_order`` with a look through the whole window for every sequence."""
    _check(lengths, capacity)
    packs: list[list[int]] = []
    left = list(range(len(lengths)))
    while left:
        near = [index for index in left if index < left[0] + window]
        room, one = capacity, []
        while near and lengths[near[0]] <= room:
            one.append(near.pop(0))
            room -= lengths[one[-1]]
        while fitting := [index for index in near if lengths[index] <= room]:
            one.append(max(fitting, key=lambda index: lengths[index]))
            near.remove(one[-1])
            room -= lengths[one[-1]]
        packs.append(one)
        left = [index for index in left if index not in one]
    return packs


def fill(lengths: Sequence[int], packs: Sequence[Sequence[int]], capacity: int) -> float:
    """The share of the packs' room that is taken; 1.0 if there are no packs."""
    return sum(lengths[index] for one in packs for index in one) / (len(packs) * capacity) if packs else 1.0


def _longest_first(lengths: Sequence[int], capacity: int) -> list[int]:
    _check(lengths, capacity)
    return sorted(range(len(lengths)), key=lambda index: -lengths[index])


def _check(lengths: Sequence[int], capacity: int) -> None:
    for index, length in enumerate(lengths):
        if not 1 <= length <= capacity:
            raise ValueError(f"sequence {index} has {length} tokens; a pack holds 1 to {capacity}, and nothing is cut")
