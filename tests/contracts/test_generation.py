"""Decoding with a cache says what teacher forcing says, whoever else is in the batch."""

from __future__ import annotations

import pytest
import torch
from tests import kit

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.generation import Request, generate
from weft.generation.sampling import Drawing, Sampling, choose

WHO = [None, *kit.ALL]


def requests(count: int = 2, new: int = 6, **sampling: float) -> list[Request]:
    """Some for everyone, in a mixed order and with different lengths."""
    out = []
    for turn in range(count):
        for index, name in enumerate(WHO):
            (ids,) = kit.texts(1, 1, 17, seed=10 * turn + index)
            out.append(
                Request(ids, name, new + (index + turn) % 3, sampling=Sampling(seed=100 * turn + index, **sampling))
            )
    return out


def teacher(adapters: Adapters, request: Request, answer: list[int]) -> list[int]:
    """The likeliest token at every place of the answer, from one pass over the whole text."""
    with torch.no_grad():
        (hidden,) = kit.hidden_of(adapters, [Part(request.adapter, [[*request.prompt, *answer]])])
        logits = adapters.logits(hidden, [(request.adapter, len(hidden))])
        return logits.argmax(-1)[len(request.prompt) - 1 : -1].tolist()


@pytest.mark.parametrize(
    ("kind", "padded"),
    kit.in_turn(["llama", "gpt2", "bloom"], [pytest.param(False, id="cache"), pytest.param(True, id="padded")]),
)
def test_greedy_equals_teacher_forcing_and_one_at_a_time(kind: str, padded: bool) -> None:
    adapters = kit.open_with_all(kit.make_model(kind, torch.float64), padded=padded)
    asked = requests()
    answers = [c.ids for c in generate(adapters, asked, stop_ids=())]
    assert [len(a) for a in answers] == [r.max_new_tokens for r in asked]
    assert len({tuple(a) for a in answers}) > len(WHO), "all answers alike would prove nothing"
    for request, answer in zip(asked, answers, strict=True):
        assert teacher(adapters, request, answer) == answer, request.adapter
        assert generate(adapters, [request], stop_ids=())[0].ids == answer, request.adapter
    for size in (1, 5):
        assert [c.ids for c in generate(adapters, asked, stop_ids=(), batch_size=size)] == answers


def test_greedy_in_exact_mode_and_with_checkpointing() -> None:
    model = kit.make_model("llama")
    asked, found = requests(), []
    for options in ({"exact": True}, {"checkpointing": True}):
        adapters = kit.open_with_all(model, dropout=True, **options)
        found.append([c.ids for c in generate(adapters, asked, stop_ids=())])
        adapters.close()
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_stopping_early_changes_no_neighbour(kind: str) -> None:
    """Rows leave the batch at different times; the cache is thinned under those that stay."""
    adapters = kit.open_with_all(kit.make_model(kind, torch.float64))
    asked = requests(3, new=9)
    free = [c.ids for c in generate(adapters, asked, stop_ids=())]
    stops = {free[i][i % 9] for i in range(0, len(free), 9)}  # few, so that some go on
    told: dict[int, list[int]] = {i: [] for i in range(len(asked))}
    stopped = generate(adapters, asked, stop_ids=stops, on_token=lambda i, token: told[i].append(token))
    for index, (whole, cut) in enumerate(zip(free, stopped, strict=True)):
        end = next((i for i, token in enumerate(whole) if token in stops), None)
        assert cut.ids == whole[:end]
        assert cut.finish_reason == ("length" if end is None else "stop")
        assert told[index] == cut.ids
    assert {c.finish_reason for c in stopped} == {"length", "stop"}


def test_sampling_does_not_depend_on_neighbours() -> None:
    adapters = kit.open_with_all(kit.make_model("llama", torch.float64))
    asked = requests(temperature=1.3, top_k=40, top_p=0.95)
    together = [c.ids for c in generate(adapters, asked, stop_ids=())]
    torch.manual_seed(5)  # the global generator plays no part
    assert [generate(adapters, [r], stop_ids=())[0].ids for r in asked] == together
    assert [c.ids for c in generate(adapters, asked[::-1], stop_ids=())][::-1] == together
    other = [Request(r.prompt, r.adapter, r.max_new_tokens, sampling=Sampling(1.3, 40, 0.95, seed=999)) for r in asked]
    assert [c.ids for c in generate(adapters, other, stop_ids=())] != together


def test_learned_positions_up_to_the_last_one() -> None:
    """GPT-2 has 64 positions: a text that ends there is answered as teacher forcing says, one more is refused."""
    adapters = kit.open_with_all(kit.make_model("gpt2", torch.float64))
    limit = adapters.architecture.max_length
    assert limit == 64
    asked = []
    for index, name in enumerate(WHO):
        learned = adapters[name].num_virtual_tokens + adapters[name].num_prefix_tokens if name else 0
        # Short and long prompts in one batch: a long one ends at once while the short ones go on.
        for new in (3, 30):
            (ids,) = kit.texts(1, limit - learned - new, limit - learned - new, seed=index)
            asked.append(Request(ids, name, new))
    answers = generate(adapters, asked, stop_ids=())
    for request, answer in zip(asked, answers, strict=True):
        assert len(answer.ids) == request.max_new_tokens
        assert teacher(adapters, request, answer.ids) == answer.ids
        with pytest.raises(UserError, match="exceed the model's limit of 64"):
            generate(adapters, [Request([*request.prompt, 5], request.adapter, request.max_new_tokens)], stop_ids=())


def test_what_cannot_be_answered_is_refused() -> None:
    adapters = kit.open_with_all(kit.make_model("gpt2"))
    for request, message in {
        Request((), None): "without a single token",
        Request((3,), "nobody"): "no adapter named 'nobody'",
        Request((3,), None, 0): "max_new_tokens is 0",
    }.items():
        with pytest.raises(UserError, match=message):
            generate(adapters, [request], stop_ids=())
    assert generate(adapters, [], stop_ids=()) == []


def test_sampling_follows_the_distribution() -> None:
    """Many draws against softmax, cut to top-k and top-p."""
    logits = torch.tensor([[2.0, 1.0, 0.5, 0.0, -1.0]])
    cases = {
        Sampling(temperature=0.7): [0, 1, 2, 3, 4],
        Sampling(temperature=0.7, top_k=2): [0, 1],
        Sampling(temperature=1.0, top_p=0.6): [0, 1],  # 0.56 is not yet 0.6, so the second stays
        Sampling(temperature=1.0, top_p=1e-9): [0],
    }
    for sampling, kept in cases.items():
        drawing = Drawing(sampling)
        count = 3000
        drawn = torch.tensor([token for _ in range(count) for token in choose(logits, [drawing]).tokens])
        wanted = torch.zeros(5)
        wanted[kept] = (logits[0, kept] / sampling.temperature).softmax(-1)
        found = torch.bincount(drawn, minlength=5) / count
        assert set(drawn.tolist()) <= set(kept)
        assert float((found - wanted).abs().max()) < 0.04
    assert choose(logits, [Drawing(Sampling())]).tokens == [0]
