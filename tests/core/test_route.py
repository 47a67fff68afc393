"""The route of one segment with nobody beside it."""

from __future__ import annotations

import pytest
import torch
from tests import kit

from weft.api import Adapters
from weft.core.route import BatchRoute, Segment, StreamRoute
from weft.core.stream import Part
from weft.generation.pool import Pass, Piece, Pool
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


def test_a_part_of_a_pass_sees_its_texts_alone() -> None:
    """Texts of two adapters in one pass, single tokens and longer pieces, against a pass of each part's own."""
    pieces = [Piece((3, 1), 5, 1), Piece((2,), 0, 3), Piece((0, 4), 4, 2), Piece((5,), 2, 1)]

    def numbers(heads: int, seed: int) -> torch.Tensor:
        return torch.randn(heads, 7, 8, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)

    def filled() -> Pool:
        pool = Pool(6, 4)
        places, old = torch.arange(24), torch.Generator().manual_seed(9)
        pool.store(5, places, *torch.randn(2, 2, 24, 8, generator=old, dtype=torch.float64))
        return pool

    q, k, v = numbers(4, 0), numbers(2, 1), numbers(2, 2)
    whole = Pass(filled(), pieces, torch.device("cpu"))
    out = whole.attend(5, q, k, v, scale=0.3)
    for first, count, rows in ((0, 2, slice(0, 4)), (2, 1, slice(4, 6)), (3, 1, slice(6, 7)), (1, 3, slice(1, 7))):
        own = Pass(filled(), pieces, torch.device("cpu")).part(first, count)
        found = own.attend(5, q[:, rows], k[:, rows], v[:, rows], scale=0.3)
        torch.testing.assert_close(found, out[rows], rtol=0, atol=1e-12)
    # What the blocks hold is what counts: another's are not seen, one's own are.
    other = filled()
    other.store(5, torch.arange(20, 24), *torch.zeros(2, 2, 4, 8, dtype=torch.float64))
    changed = Pass(other, pieces, torch.device("cpu")).attend(5, q, k, v, scale=0.3)
    assert torch.equal(changed[:6], out[:6])
    assert not torch.equal(changed[6], out[6])


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
