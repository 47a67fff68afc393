"""Where virtual tokens stand, for any places that a method may name."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import kit

from weft.api import Adapters
from weft.core.adapter import Adapter
from weft.core.stream import Part
from weft.layouts.building import embed
from weft.layouts.end_to_end import interleave
from weft.models import describe

Runs = list[tuple[int, int]]


@st.composite
def sequences(draw: st.DrawFn) -> tuple[int, Runs, int]:
    length = draw(st.integers(1, 12))
    runs = draw(st.lists(st.tuples(st.integers(0, length), st.integers(0, 4)), max_size=5))
    return length, runs, draw(st.integers(0, 50))


@given(sequences())
@settings(deadline=None, max_examples=300)
def test_every_row_is_taken_once_and_stands_where_it_was_asked(case: tuple[int, Runs, int]) -> None:
    length, runs, start = case
    own, virtual = interleave(length, runs, start)
    total = length + sum(count for _, count in runs)
    assert sorted([*own, *virtual]) == list(range(start, start + total))
    assert own == sorted(own)
    assert len(own) == length
    begin = 0
    for index, (place, count) in enumerate(runs):
        rows = virtual[begin : begin + count]
        begin += count
        assert rows == list(range(rows[0], rows[0] + count)) if rows else True
        for row in rows:
            # As many own tokens stand before it as its place says.
            assert sum(other < row for other in own) == place
        if rows:
            # Of two runs at one place the first named comes first.
            earlier = sum(c for i, (p, c) in enumerate(runs) if p < place or (p == place and i < index))
            assert rows[0] == start + place + earlier


def reference(ids: list[int], runs: Runs) -> list[tuple[str, int]]:
    """The sequence written out token by token: ('own', id) and ('virtual', number)."""
    numbers, out, number = [], [], 0
    for _, count in runs:
        numbers.append(list(range(number, number + count)))
        number += count
    for place in range(len(ids) + 1):
        for index, (at, _) in enumerate(runs):
            if at == place:
                out += [("virtual", n) for n in numbers[index]]
        if place < len(ids):
            out.append(("own", ids[place]))
    return out


@given(st.lists(sequences(), min_size=1, max_size=4))
@settings(deadline=None, max_examples=60)
def test_the_embeddings_are_the_sequences_written_out(cases: list[tuple[int, Runs, int]]) -> None:
    """An adapter whose places differ from sequence to sequence, with as many virtual tokens in each."""
    model = MODEL
    count = 4
    plans = [(length, spread(runs, count, length)) for length, runs, _ in cases]

    class Placed(Adapter):
        num_virtual_tokens = count

        def places(self, length: int, answer: int | None, slots: object) -> Runs:
            assert answer is not None
            return plans[answer][1]

        def virtual_tokens(self, seed: int | None = None) -> torch.Tensor:
            return torch.arange(count)[:, None].expand(count, 32) + 1000.0

    adapters = Adapters(model, describe(model))
    adapters._adapters["it"] = Placed(kit.method_config("prompt_tuning"), "it")
    texts = [[3 + i for i in range(length)] for length, _ in plans]
    try:
        stream = adapters.stream([Part("it", texts, answers=range(len(texts)))])
        hidden = embed(model, stream, adapters._adapters)
        table = model.get_input_embeddings().weight
        wanted = [
            table[what] if kind == "own" else torch.full((32,), 1000.0 + what)
            for ids, (_, runs) in zip(texts, plans, strict=True)
            for kind, what in reference(ids, runs)
        ]
        assert torch.equal(hidden, torch.stack(wanted))
        assert [len(rows) for rows in stream.rows] == [len(ids) for ids in texts]
    finally:
        del adapters._adapters["it"]
        adapters.close()


def spread(runs: Runs, count: int, length: int) -> Runs:
    """The runs with ``count`` tokens in all."""
    out, left = [], count
    for place, wanted in runs:
        out.append((place, min(wanted, left)))
        left -= out[-1][1]
    return [*out, (length, left)]


MODEL = kit.make_model("llama")
