"""What goes into a store comes out of it, bit for bit, from memory and from a file."""

from __future__ import annotations

import math
import os
import random
import resource
import struct
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from weft.data import Sample
from weft.data.store import SampleStore
from weft.data.views import Samples, View, chained, distinct, samples_of, sizes
from weft.errors import UserError

IDS = st.integers(-(2**31), 2**31 - 1)
NUMBERS = st.integers(-(2**63), 2**63 - 1)
WEIGHTS = st.one_of(st.sampled_from([0.0, 1.0, -0.0, math.nan, 0.1]), st.floats())
SOURCES = st.one_of(
    st.builds("{}:{}".format, st.sampled_from(["a.jsonl", "b/文.csv", "c:d", ""]), st.integers(0, 2**70)),
    st.sampled_from(["a:007", "a:+1", "a:-1", "a:１", "a:", ":", "the text", "a: 1"]),
    st.text(st.characters(codec=None), max_size=8),
)
SAMPLES = st.builds(
    Sample,
    st.lists(IDS, max_size=40),
    st.lists(WEIGHTS, max_size=40) | st.lists(st.sampled_from([0.0, 1.0]), max_size=40).map(sorted),
    SOURCES,
    slots=st.lists(IDS, max_size=3).map(tuple),
    answer=st.none() | NUMBERS,
    label=st.none() | NUMBERS,
    target_ids=st.lists(IDS, max_size=5).map(tuple),
    token_types=st.lists(IDS, max_size=5).map(tuple),
    cut=NUMBERS,
)


def exactly(sample: Sample) -> Any:
    """All of a sample, by bits where ``==`` is too kind (-0.0) or too strict (NaN)."""
    rest = [getattr(sample, name) for name in Sample.__slots__ if name != "weights"]
    return [*rest, [type(value) for value in rest], struct.pack(f"{len(sample.weights)}d", *sample.weights)]


def sample(number: int, length: int = 5, source: str = "") -> Sample:
    return Sample([number] * length, [0.0] + [1.0] * (length - 1), source or f"a.jsonl:{number}", answer=1)


def filled(samples: list[Sample], memory: int = 0) -> SampleStore:
    store = SampleStore(memory)
    append(store, samples)
    return store


def append(store: SampleStore, samples: list[Sample]) -> None:
    for one in samples:
        store.append(one)


@given(st.lists(SAMPLES, max_size=6), st.sampled_from([0, 100, 1 << 20]))
def test_every_field_comes_back_exactly(samples: list[Sample], memory: int) -> None:
    store = filled(samples, memory)
    assert len(store) == len(samples)
    places = list(range(len(samples)))
    random.Random(0).shuffle(places)
    for place in [*places, *places]:
        assert exactly(store[place]) == exactly(samples[place])
    assert [exactly(one) for one in store] == [exactly(one) for one in samples]
    assert [array.tolist() for array in store.lengths()] == [
        [len(one.input_ids) for one in samples],
        [len(one.target_ids) for one in samples],
    ]


def test_what_is_read_can_be_changed_and_is_read_again_as_it_was() -> None:
    store = filled([sample(1), sample(2)])
    store[1].weights[0] = 7.0
    store[1].input_ids.clear()
    assert store == [sample(1), sample(2)]


def test_numbers_beyond_32_bits_are_refused_and_leave_no_trace() -> None:
    store = filled([sample(1)])
    with pytest.raises(struct.error):
        store.append(sample(2**31))
    store.append(sample(3))
    assert store == [sample(1), sample(3)]


@given(st.data())
def test_parts_are_what_lists_would_be(data: st.DataObject) -> None:
    """Views, chains and choices, of each other and in any order, beside the same of lists."""
    kept = [sample(number, number + 1) for number in range(12)]
    kept[3] = replace(kept[3], weights=[0.0, 0.5, -1.0, 2.0], answer=None)
    kept[5] = replace(kept[5], target_ids=(7, 8, 9), answer=None)
    kept[6] = replace(kept[6], label=0, token_types=(1,) * 7)
    store = filled(kept)
    found: Any = store
    expected = list(kept)
    for _ in range(data.draw(st.integers(0, 4))):
        how = data.draw(st.sampled_from(["slice", "choice", "chain", "list"]))
        if how == "slice":
            end, step = st.none() | st.integers(-14, 14), st.sampled_from([None, 2, -1])
            part = slice(data.draw(end), data.draw(end), data.draw(step))
            found, expected = found[part], expected[part]
        elif how == "choice":
            wanted = data.draw(st.lists(st.booleans(), min_size=len(expected), max_size=len(expected)))
            found = samples_of(found).picked(np.array(wanted, bool))
            expected = [one for one, take in zip(expected, wanted, strict=True) if take]
        else:
            more: Any = [sample(99)] if how == "list" else store[3:7]
            found, expected = chained([found, more, found]), [*expected, *more, *expected]
    assert len(found) == len(expected)
    assert list(found) == expected
    assert [found[i] for i in range(-len(expected), len(expected))] == expected * 2
    assert sizes(found).tolist() == [len(one.input_ids) + len(one.target_ids) for one in expected]
    for one, other in zip(samples_of(found).columns(), samples_of(expected).columns(), strict=True):
        assert one.tolist() == other.tolist()
    assert (found == expected) is True
    assert found != [*expected, sample(0)]
    for beyond in (len(expected), -len(expected) - 1):
        with pytest.raises(IndexError):
            found[beyond]


def test_views_and_chains_make_nothing_until_asked(monkeypatch: pytest.MonkeyPatch) -> None:
    store = filled([sample(number) for number in range(9)])
    monkeypatch.setattr(SampleStore, "sample", lambda *_: pytest.fail("made a sample"))
    chain = chained([store[2:5], store.picked(np.arange(9) % 2 == 0)])
    assert (len(chain), len(chain[1:4])) == (8, 3)
    assert chain.lengths()[0].tolist() == [5] * 8
    assert [len(part) for part in distinct(chain, store)] == [6, 3]
    assert bool(store[9:]) is False


def test_samples_given_twice_count_once() -> None:
    kept = [sample(number) for number in range(6)]
    store, other = filled(kept), filled(kept)
    listed = [sample(7), sample(7)]  # equal, but two
    train = chained([store[:4], listed, store[2:], View((store, np.array([5, 5]))), [listed[1]], listed])
    found, held = distinct(train, chained([store, other[1:3], [sample(8)]]))
    assert list(found) == [*kept[:4], *listed, *kept[4:]], "by place and by object"
    assert list(held) == [*kept[1:3], sample(8)]
    twice, _ = distinct(View((store, np.array([3, 1, 3, 0, 1]))), store)
    assert list(twice) == [kept[3], kept[1], kept[0]]


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    monkeypatch.setattr(tempfile, "tempdir", None)
    return tmp_path


def open_files(folder: Path) -> list[str]:
    links = [f"/proc/self/fd/{number}" for number in os.listdir("/proc/self/fd")]
    return [os.readlink(link) for link in links if os.path.exists(link) or os.path.islink(link)]


@pytest.mark.skipif(not Path("/proc/self/fd").is_dir(), reason="needs /proc")
def test_the_file_lies_where_tmpdir_says_and_has_no_name(folder: Path) -> None:
    store = filled([sample(number, 100) for number in range(50)], memory=50 * 300)
    assert any(name.startswith(str(folder)) for name in open_files(folder))
    assert list(folder.iterdir()) == []
    assert store[49] == sample(49, 100)
    del store
    assert not any(name.startswith(str(folder)) for name in open_files(folder))


def test_little_data_makes_no_file(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: pytest.fail("made a file"))
    assert len(filled([sample(number, 100) for number in range(100)], memory=1 << 20)) == 100


def test_a_full_disk_says_where_and_what_to_do(folder: Path) -> None:
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    store = SampleStore(memory=0)
    resource.setrlimit(resource.RLIMIT_FSIZE, (3 << 20, before[1]))  # as if there were no more room
    try:
        with pytest.raises(UserError, match=rf"do not fit .*{folder}: .* after \d MB.*TMPDIR.*`limit`"):
            append(store, [sample(number, 100) for number in range(10_000)])
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_folder_that_is_not_there_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "none"))
    with pytest.raises(UserError, match=r"do not fit .*none: No such file"):
        filled([sample(1)])


@pytest.mark.long
def test_memory_does_not_grow_with_tokens() -> None:
    """Some tens of bytes per sample; in lists these would be 170 MB."""
    ids = list(range(1000, 1200))
    tracemalloc.start()
    try:
        store = SampleStore(memory=1 << 20)
        for number in range(20_000):
            store.append(Sample(ids, [0.0] * 100 + [1.0] * 100, f"folder/{number % 5000}.txt:{number}", answer=100))
        held, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert store[19_999].source == "folder/4999.txt:19999"
    assert store._bytes.size > 16_000_000
    assert held < 3 << 20
    assert peak < 6 << 20


def test_what_they_have_in_common() -> None:
    for one in (SampleStore(), SampleStore()[:], chained([])):
        assert isinstance(one, Samples)
        assert (list(one), one == [], one != [sample(1)], one == 3) == ([], True, True, False)
        with pytest.raises(TypeError):
            hash(one)
