"""Several sources: what a configuration means, how many samples an epoch has, in what order, and what is held out."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from itertools import compress
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.tokenizers import talk

from weft.data import Message, Mixture, PlainText, Source, parse_sources
from weft.data.sources import content_key, held_by_hash, number_of
from weft.errors import UserError
from weft.ops.seeds import stable_seed


def mixed(sizes: Sequence[int], weights: Sequence[float] | None) -> Mixture:
    return Mixture(tuple(sizes), None if weights is None else tuple(weights))


def split_by_hash(keys: list[str], share: float) -> tuple[list[str], list[str]]:
    """Those to train on and those held out."""
    held = held_by_hash(map(number_of, keys), share)
    return [key for key, out in zip(keys, held, strict=True) if not out], list(compress(keys, held))


def test_what_a_configuration_means() -> None:
    assert parse_sources("a.jsonl") == (Source("a.jsonl"),)
    assert parse_sources("0.7*mine.jsonl + 0.3*b c/*.jsonl") == (Source("mine.jsonl", 0.7), Source("b c/*.jsonl", 0.3))
    assert parse_sources("2*a.txt + 1 * b.txt") == (Source("a.txt", 2), Source("b.txt", 1))
    assert parse_sources("a.txt + b.txt") == (Source("a.txt"), Source("b.txt"))
    assert parse_sources("2*.jsonl") == (Source("2*.jsonl"),), "one pattern is no sum"
    mapping = {"path": "a", "weight": 0.5, "format": "text", "columns": {"text": "t"}, "limit": 3}
    assert parse_sources([mapping, {"path": "b", "weight": 0.5}]) == (
        Source("a", 0.5, "text", columns={"text": "t"}, limit=3),
        Source("b", 0.5),
    )
    assert parse_sources(["a", "b"]) == (Source("a"), Source("b"))


def test_a_file_whose_name_is_a_sum(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a + b.txt").write_text("x")
    assert parse_sources("a + b.txt") == (Source("a + b.txt"),)


@pytest.mark.parametrize(
    ("data", "parts"),
    [
        ("", ["empty"]),
        (7, ["7", "a path"]),
        ([], ["a path"]),
        ([7], ["entry 1", "7"]),
        ([{"weight": 1}], ["entry 1", "path"]),
        ([{"path": "a", "wieght": 1}], ["entry 1", "'wieght'", "'weight'"]),
        ([{"path": "a", "weight": "x"}], ["weight is 'x'"]),
        ([{"path": "a", "weight": True}], ["weight is True"]),
        ([{"path": "a", "limit": 0}], ["limit is 0"]),
        ([{"path": "a", "columns": ["b"]}], ["columns"]),
        (["0.5*a + 0.5*b"], ["a sum", "mapping"]),
        ("0*a + 1*b", ["weight of a is 0", "above 0"]),
        ("-0.5*a + 1.5*b", ["weight of a is -0.5", "above 0"]),
        ([{"path": "a", "weight": float("nan")}, "b"], ["weight of a is nan"]),
        ("0.7*a + b", ["b has no weight"]),
        ("0.7*a + 0.2*b", ["0.7, 0.2", "sum to 0.9", "expected 1"]),
    ],
)
def test_what_is_refused(data: Any, parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        parse_sources(data)
    for part in parts:
        assert part in str(error.value)


def test_one_source_is_in_the_order_that_jobs_have_always_had() -> None:
    for seed, epoch, size in [(0, 0, 10), (7, 3, 1001), (2**62, 5, 1)]:
        generator = torch.Generator().manual_seed(stable_seed(seed, "order", epoch))
        expected = torch.randperm(size, generator=generator).tolist()
        assert mixed([size], None).order(seed, epoch) == expected
        assert mixed([size], [0.3]).order(seed, epoch) == expected
    assert sorted(mixed([3, 4], None).order(0, 0)) == list(range(7))


def test_the_largest_epoch_that_no_source_is_too_small_for() -> None:
    assert mixed([70, 1000], [0.7, 0.3]).counts == (70, 30)
    assert mixed([1000, 3], [0.7, 0.3]).counts == (7, 3)
    assert mixed([10, 10, 10], [1, 1, 1]).counts == (10, 10, 10)
    assert mixed([100, 100], [7, 3]).counts == (99, 43)
    with pytest.raises(UserError, match="none of them from source 1"):
        _ = mixed([50, 50], [0.001, 0.999]).counts


SIZES = st.lists(st.integers(1, 40), min_size=1, max_size=4)


@settings(max_examples=150, deadline=None)
@given(sizes=SIZES, data=st.data(), seed=st.integers(0, 2**40))
def test_property_nothing_is_seen_twice_before_all_was_seen(sizes: list[int], data: Any, seed: int) -> None:
    weights = data.draw(st.lists(st.integers(1, 9), min_size=len(sizes), max_size=len(sizes)))
    try:
        counts = mixed(sizes, weights).counts
    except UserError:
        return
    total = sum(counts)
    assert all(count <= size for count, size in zip(counts, sizes, strict=True))
    assert all(abs(c - total * w / sum(weights)) < 1 for c, w in zip(counts, weights, strict=True)) or len(sizes) == 1
    bigger = [(total + 1) * w / sum(weights) for w in weights]
    assert len(sizes) == 1 or any(need > size for need, size in zip(bigger, sizes, strict=True)), "N is the largest"
    seen: Counter[int] = Counter()
    starts = [sum(sizes[:i]) for i in range(len(sizes))]
    for epoch in range(7):
        order = mixed(sizes, weights).order(seed, epoch)
        assert len(set(order)) == len(order) == total, "once per epoch"
        seen.update(order)
        for start, size, count in zip(starts, sizes, counts, strict=True):
            own = [seen[i] for i in range(start, start + size)]
            assert sum(own) == count * (epoch + 1)
            assert max(own) - min(own) <= 1 or count * (epoch + 1) % size, "each pass is whole"
            assert max(own) <= -(-count * (epoch + 1) // size)
    again = [5, 0, 3]
    random.Random(seed).shuffle(again)
    from weft.data.sources import _pass

    orders = {epoch: mixed(sizes, weights).order(seed, epoch) for epoch in again}
    _pass.cache_clear()
    assert all(mixed(sizes, weights).order(seed, epoch) == orders[epoch] for epoch in sorted(again)), "a pure function"


def test_seeds_and_epochs_differ() -> None:
    mixture = Mixture((30, 100), (0.5, 0.5))
    assert mixture.per_epoch == 60
    orders = {tuple(mixture.order(seed, epoch)) for seed in range(3) for epoch in range(3)}
    assert len(orders) == 9
    halves = [[i for i in mixed([30, 15], [1, 1]).order(0, epoch) if i < 30] for epoch in range(4)]
    assert set(halves[0]) | set(halves[1]) == set(halves[2]) | set(halves[3]) == set(range(30))
    assert set(halves[0]) != set(halves[2]), "every pass has an order of its own"


def test_split_by_hash_stays_when_records_move_or_come() -> None:
    keys = [content_key(talk(f"question {i}", f"answer {i}")) for i in range(2000)]
    train, held = split_by_hash(keys, 0.05)
    assert 60 < len(held) < 140
    assert sorted(train + held) == sorted(keys)
    shuffled = random.Random(1).sample(keys, len(keys))
    assert set(split_by_hash(shuffled, 0.05)[1]) == set(held)
    more = keys + [content_key(PlainText(f"text {i}", "a:1")) for i in range(500)] + keys[:100]
    train, held_more = split_by_hash(more, 0.05)
    assert set(held) <= set(held_more)
    assert not set(train) & set(held_more)
    assert set(held) <= set(split_by_hash(keys, 0.2)[1]), "a larger share holds out the same and more"


def test_the_hash_is_of_what_is_said() -> None:
    example = talk("q", "a")
    assert content_key(example) == content_key(replace(example, source="elsewhere.csv:9"))
    assert content_key(example) == content_key(talk("q", "a", source="b.json:1"))
    others = [
        talk("q", "b"),
        talk("q", "a", "q", "a"),
        replace(example, messages=(Message("user", "q"), Message("assistant", "a", train=False))),
        replace(example, tools=({"name": "f"},)),
        PlainText("q", "x"),
    ]
    assert len({content_key(other) for other in [example, *others]}) == 6


@pytest.mark.parametrize(("share", "text"), [(0.0, "between 0 and 1"), (1.0, "between"), (0.0001, "none to evaluate")])
def test_splits_that_cannot_be(share: float, text: str) -> None:
    keys = [content_key(PlainText(str(i), "")) for i in range(5)]
    with pytest.raises(UserError, match=text):
        split_by_hash(keys, share)
