"""The route of one segment with nobody beside it."""

from __future__ import annotations

import pytest
import torch
from tests import kit

from weft.api import Adapters
from weft.core.route import BatchRoute, Segment, StreamRoute
from weft.core.stream import Part
from weft.generation.cache import KeyValueCache
from weft.layouts.packed import Packed
from weft.layouts.padded_batch import Padded
from weft.models import describe


@pytest.fixture
def adapters() -> Adapters:
    model = kit.make_model("llama")
    made = Adapters(model, describe(model))
    for name in ("prefix_tuning", "lora", "prompt_tuning"):
        made.add(name, kit.method_config(name))
    return made


@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("exact", [False, True])
def test_alone_is_what_a_stream_of_its_own_has(adapters: Adapters, exact: bool, padded: bool) -> None:
    kind = Padded if padded else Packed
    layout = kind(adapters.model, adapters.architecture, adapters.router, adapters._adapters, exact)
    names = ["lora", "prefix_tuning", None, "prompt_tuning"]
    parts = [Part(name, kit.texts(2 + i, seed=i), seed=5) for i, name in enumerate(names)]
    route = layout.stream(parts).route
    for index, part in enumerate(parts):
        alone, own = route.alone(index), layout.stream([part]).route
        assert route.alone(index) is alone
        assert alone.segments == own.segments == (route.segments[index],)
        assert (alone.padded, alone.exact, alone.cache) == (padded, exact, None)
        assert set(alone.prefixes) == set(own.prefixes) == ({0} if part.adapter == "prefix_tuning" else set())
        assert (alone.layout is None) == padded
        if alone.layout is not None and own.layout is not None:
            assert alone.layout.lengths == own.layout.lengths
            assert [b.sequences for b in alone.layout.buckets] == [b.sequences for b in own.layout.buckets]
            assert alone.layout.prefix_groups == own.layout.prefix_groups
            assert alone.layout.separate_groups == exact


def filled(lengths: list[int], prefixes: list[int], seed: int = 0) -> tuple[KeyValueCache, torch.Tensor]:
    cache = KeyValueCache(torch.tensor(lengths), torch.tensor(prefixes), 4)
    generator = torch.Generator().manual_seed(seed)
    return cache, torch.randn(2, sum(lengths), 3, generator=generator)


def test_a_part_of_the_cache_holds_its_rows_alone() -> None:
    """Layer 5 of two adapters (rows 1 and 2; row 3) in one cache, against a cache of each part's own."""
    lengths, prefixes = [3, 2, 4, 1, 2], [2, 0, 0, 0, 3]
    cache, k = filled(lengths, prefixes)
    segments = tuple(
        Segment(n, sum(lengths[a:b]), b - a) for n, a, b in (("p", 0, 1), ("a", 1, 3), ("b", 3, 4), ("q", 4, 5))
    )
    route = StreamRoute(segments, cache=cache)
    begin = [0, 3, 9, 10]
    parts = {1: cache.part(1, 2), 2: cache.part(3, 1)}
    singles = {1: KeyValueCache(torch.tensor([2, 4]), torch.tensor([0, 0]), 4),
               2: KeyValueCache(torch.tensor([1]), torch.tensor([0]), 4)}  # fmt: skip
    for index, part in parts.items():
        assert not part.prefilled
        rows = k[:, begin[index] : begin[index] + segments[index].tokens]
        part.prefill(5, rows, rows * 2, route.alone(index))
        singles[index].prefill(5, rows, rows * 2, StreamRoute((segments[index],)))
    cache.prefilled = True
    assert parts[1].prefilled
    for step in range(3):
        for index, part in parts.items():
            count = segments[index].sequences if step < 2 or index == 2 else 1
            new = torch.randn(2, count, 3, generator=torch.Generator().manual_seed(step))
            for a, b in zip(part.append(5, new, new * 2), singles[index].append(5, new, new * 2), strict=True):
                assert torch.equal(a, b)
        cache.advance()
        for single in singles.values():
            single.advance()
        if step == 1:  # row 1 leaves, and so do the prefixes' rows
            cache.keep(torch.tensor([2, 3]))
            singles[1].keep(torch.tensor([1]))
            parts = {1: cache.part(0, 1), 2: cache.part(1, 1)}
    nested = cache.part(0, 2).part(1, 1)
    assert nested.rows == slice(1, 2)


def segments(*sizes: tuple[int, ...]) -> tuple[Segment, ...]:
    return tuple(Segment(str(i), sum(lengths), len(lengths), lengths=lengths) for i, lengths in enumerate(sizes))


def test_arguments_of_a_block_on_padded_batches() -> None:
    """Masks and ALiBi lose the columns of neighbours' prefixes, rotary angles of the same length do not."""
    prefix = [(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4))]
    route = BatchRoute(segments((5, 2), (4,), (1, 3, 5)), prefixes={1: prefix})
    batch, width, heads = 6, 5, 2
    hidden = torch.zeros(batch, width, 8)
    mask = torch.arange(batch * width * 8).view(batch, 1, width, 8)
    assert torch.equal(route.part(mask, 2, hidden), mask[3:, :, :, 3:])
    assert torch.equal(route.part(mask.bool(), 0, hidden), mask.bool()[:2, :, :, 3:])
    shared = mask[:1]
    assert torch.equal(route.part(shared, 2, hidden), shared[..., 3:])
    angles = torch.rand(batch, width, 8)  # head_dim 8 = 3 + 5
    assert torch.equal(route.part(angles, 1, hidden), angles[2:3])
    assert route.part((angles[:1], angles), 1, hidden)[0].shape == (1, width, 8)
    alibi = torch.rand(batch * heads, 1, 8)
    assert torch.equal(route.part(alibi, 2, hidden), alibi[6:, :, 3:])
    positions = torch.arange(batch * width).view(batch, width)
    assert torch.equal(route.part(positions, 0, hidden), positions[:2])
    assert route.part(torch.arange(batch), 0, hidden).tolist() == list(range(batch))
    from transformers import DynamicCache

    assert route.part(DynamicCache(), 0, hidden) is None
    assert route.part("word", 0, hidden) == "word"


def test_arguments_of_a_block_in_the_stream() -> None:
    route = StreamRoute(segments((5, 2), (4,)))
    hidden, cos = torch.zeros(1, 11, 8), torch.rand(1, 11, 4)
    for index, rows in enumerate((slice(0, 7), slice(7, 11))):
        part = route.part((cos, None, torch.arange(11)[None]), index, hidden)
        assert torch.equal(part[0], cos[:, rows])
        assert part[0].data_ptr() != cos[:, rows].data_ptr(), "where rows begin in memory must not depend on neighbours"
        assert part[1] is None
        assert part[2].tolist() == [list(range(11))[rows]]
