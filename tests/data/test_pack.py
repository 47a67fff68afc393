"""Packing: nothing lost, nothing cut, nothing too full, as the textbook has it, and random where the order is."""

from __future__ import annotations

import math
import random
import statistics
import time
from collections.abc import Callable, Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data.pack import fill, pack, pack_in_order, pack_in_order_ref, pack_ref


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[int], int]:
    """Lengths and a capacity; also such as fill packs exactly and such as never share one."""
    capacity = draw(st.integers(1, 40))
    return draw(st.lists(st.integers(1, capacity), max_size=60)), capacity


def first_fit_decreasing(lengths: list[int], capacity: int) -> int:
    """How many packs first-fit decreasing needs."""
    rooms: list[int] = []
    for length in sorted(lengths, reverse=True):
        at = next((number for number, room in enumerate(rooms) if room >= length), None)
        if at is None:
            rooms.append(capacity)
        rooms[-1 if at is None else at] -= length
    return len(rooms)


def fewest(lengths: list[int], capacity: int) -> int:
    """How few packs there can be, by trying everything."""

    def search(rest: list[int], rooms: list[int]) -> int:
        if not rest:
            return len(rooms)
        found = search(rest[1:], [*rooms, capacity - rest[0]])
        for at in range(len(rooms)):
            if rooms[at] >= rest[0] and rooms[at] not in rooms[:at]:
                found = min(found, search(rest[1:], [*rooms[:at], rooms[at] - rest[0], *rooms[at + 1 :]]))
        return found

    return search(sorted(lengths, reverse=True), [])


def alpaca_like(count: int) -> list[int]:
    rng = random.Random(0)
    return [min(2048, 20 + int(rng.lognormvariate(4, 0.8))) for _ in range(count)]


@given(problems())
@settings(max_examples=300, deadline=None)
def test_equals_the_textbook(problem: tuple[list[int], int]) -> None:
    assert pack(*problem) == pack_ref(*problem)


@given(problems(), st.integers(1, 70))
@settings(max_examples=300, deadline=None)
def test_in_order_equals_the_plain_one(problem: tuple[list[int], int], window: int) -> None:
    assert pack_in_order(*problem, window) == pack_in_order_ref(*problem, window)


@given(problems(), st.integers(1, 70))
@settings(max_examples=300, deadline=None)
def test_what_both_promise(problem: tuple[list[int], int], window: int) -> None:
    lengths, capacity = problem
    for packs in (pack(lengths, capacity), pack_in_order(lengths, capacity, window)):
        assert sorted(index for one in packs for index in one) == list(range(len(lengths)))
        assert all(one and sum(lengths[index] for index in one) <= capacity for one in packs)
    # Never two packs of which one would have done; so at least half full, but for the last.
    sums = [sum(lengths[index] for index in one) for one in pack(lengths, capacity)]
    assert all(a + b > capacity for i, a in enumerate(sums) for b in sums[:i])


@given(st.lists(st.integers(1, 12), max_size=8), st.integers(12, 14))
@settings(max_examples=200, deadline=None)
def test_never_more_packs_than_the_bound_of_first_fit_decreasing(lengths: list[int], capacity: int) -> None:
    """11/9 of the fewest and 6/9 more (Dósa 2007), which holds for best fit as for first fit."""
    bound = 11 / 9 * fewest(lengths, capacity) + 6 / 9
    assert first_fit_decreasing(lengths, capacity) <= bound
    assert len(pack(lengths, capacity)) <= bound


@pytest.mark.parametrize("how", [pack, pack_ref, pack_in_order, pack_in_order_ref])
@pytest.mark.parametrize(("lengths", "which"), [([3, 9, 2], "sequence 1 has 9"), ([3, 0], "sequence 1 has 0")])
def test_what_cannot_be_packed_is_named(how: object, lengths: list[int], which: str) -> None:
    with pytest.raises(ValueError, match=f"{which} tokens; a pack holds 1 to 8"):
        how(lengths, 8)  # type: ignore[operator]


def test_nothing_gives_nothing() -> None:
    assert pack([], 8) == pack_in_order([], 8) == []
    assert fill([], [], 8) == 1.0


@pytest.mark.parametrize("how", [pack, pack_in_order])
def test_many_sequences(how: object) -> None:
    """As many as Alpaca has: as full as can be, and quickly."""
    lengths = alpaca_like(42_000)
    begun = time.perf_counter()
    packs = how(lengths, 2048)  # type: ignore[operator]
    seconds = time.perf_counter() - begun
    least = math.ceil(sum(lengths) / 2048)
    print(f"[measured] {seconds:.2f} s, fill {fill(lengths, packs, 2048):.4f}, {len(packs)} packs, least {least}")
    assert fill(lengths, packs, 2048) >= 0.99
    assert seconds < 5  # 0.1 s on an idle core


def test_a_random_order_stays_random() -> None:
    """The mean length of a pack spreads as in packs cut from the order; by best-fit decreasing it tells all."""
    lengths = alpaca_like(8000)
    packs = pack_in_order(lengths, 2048)
    rest = iter(range(len(lengths)))
    chance = [[next(rest) for _ in one] for one in packs]

    def spread(packs: list[list[int]]) -> float:
        return statistics.pstdev([statistics.fmean(lengths[i] for i in one) for one in packs])

    found = {"in order": spread(packs), "chance": spread(chance), "decreasing": spread(pack(lengths, 2048))}
    print(f"[measured] {found}")
    assert found["in order"] < 1.3 * found["chance"] < 0.3 * found["decreasing"]


@pytest.mark.parametrize("packer", [pack, pack_in_order])
def test_room_without_end_takes_no_memory(packer: Callable[[Sequence[int], int], list[list[int]]]) -> None:
    assert [sorted(one) for one in packer([3, 1, 4], 10**12)] == [[0, 1, 2]]
