"""Log-probabilities of continuations and of texts, beside what transformers' own forward says of them."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from typing import Any

import pytest
import torch
from tests import kit
from tests.contracts import test_seq2seq as seq2seq

from weft.api import Adapters
from weft.core.stream import Part, Stream
from weft.errors import UserError
from weft.evaluate.scoring import Continuation, Scored, fit, room, score, score_texts, windows
from weft.layouts.encoder_decoder import EncoderDecoder, Memory
from weft.methods import METHODS
from weft.models import describe

# In float32, of sums of up to twenty log-probabilities: that of ``tests/contracts/test_log_probabilities`` for each.
LIMIT = 2e-4


def opened(kind: str, padded: bool | None = None) -> Adapters:
    """A base with one adapter of every method."""
    if kind in seq2seq.KINDS:
        adapters = Adapters(model := seq2seq.make_model(kind), describe(model))
        for index, method in enumerate(m for m, config in METHODS.items() if "seq2seq" in config.tasks):
            kit.randomize(adapters.add(method, kit.method_config(method), seed=index), index)
        return adapters
    return kit.open_with_all(kit.make_model(kind), padded=padded)


def questions(seed: int = 0, count: int = 4) -> list[Continuation]:
    """Questions with choices: one token, several, some that begin alike, and some that are asked twice."""
    rng = random.Random(seed)
    found: list[Continuation] = []
    for index, context in enumerate(kit.texts(count, 2, 12, seed)):
        choices = kit.texts(3, 1, 5, seed + index + 1)
        choices += [[9], [rng.randrange(3, 90)], choices[0], [*choices[1], 7], choices[1][:1]]
        rng.shuffle(choices)
        found += [Continuation(context, ids) for ids in choices]
    rng.shuffle(found)
    return found


def by_hand(model: Any, one: Continuation) -> Scored:
    """What transformers' own forward says of a continuation."""
    with torch.no_grad():
        if model.config.is_encoder_decoder:
            begin = torch.tensor([[model.config.decoder_start_token_id, *one.ids[:-1]]])
            logits = model(input_ids=torch.tensor([list(one.context)]), decoder_input_ids=begin).logits[0]
        else:
            logits = model(input_ids=torch.tensor([[*one.context, *one.ids[:-1]]])).logits[0, len(one.context) - 1 :]
    ids = torch.tensor(one.ids)
    logps = logits.double().log_softmax(-1)[torch.arange(len(ids)), ids]
    return Scored(float(logps.sum()), bool((logits.argmax(-1) == ids).all()))


def distance(found: Sequence[Scored], wanted: Sequence[Scored]) -> float:
    """The largest difference of log-probabilities; what is greedy has to be the same."""
    assert [one.greedy for one in found] == [one.greedy for one in wanted]
    return max(abs(a.logprob - b.logprob) for a, b in zip(found, wanted, strict=True))


BASES = [("llama", None), ("gpt2", None), ("bloom", None), ("llama", True), ("t5", None)]


@pytest.mark.parametrize(("kind", "padded"), BASES)
def test_the_base_says_what_transformers_says(kind: str, padded: bool | None) -> None:
    adapters, asked = opened(kind, padded), questions()
    found = score(adapters, {None: asked})[None]
    greedy = Continuation(asked[0].context, [likeliest(adapters, asked[0].context)])
    (best,) = score(adapters, {None: [greedy]})[None]
    adapters.close()
    kit.measured(f"scores, {kind}", distance(found, [by_hand(adapters.model, one) for one in asked]), LIMIT)
    assert best.greedy
    assert not all(one.greedy for one in found)


def likeliest(adapters: Adapters, context: Sequence[int]) -> int:
    """The token that the base would write next."""
    every = [Continuation(context, [token]) for token in range(kit.VOCABULARY)]
    scores = [one.logprob for one in score(adapters, {None: every})[None]]
    assert sum(torch.tensor(scores).exp()) == pytest.approx(1, abs=1e-4)
    return scores.index(max(scores))


@pytest.mark.parametrize(("kind", "padded"), BASES)
def test_all_methods_together_score_as_each_alone(kind: str, padded: bool | None) -> None:
    adapters = opened(kind, padded)
    asked: dict[str | None, list[Continuation]] = {
        name: questions(index % 2) for index, name in enumerate(adapters.names)
    }
    asked[None] = questions()
    together = score(adapters, asked, max_tokens=400)
    assert list(together) == list(asked)
    worst = 0.0
    for name, own in asked.items():
        alone = [score(adapters, {name: [one]})[name][0] for one in own]
        worst = max(worst, distance(together[name], alone))
    kit.measured(f"together and alone, {kind}", worst, LIMIT)
    base = [one.logprob for one in together[None]]
    changed = [name for name in adapters.names if [one.logprob for one in together[name]] != base]
    assert changed == adapters.names


def test_choices_read_their_context_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """And one that only differs in its last token reads nothing more."""
    adapters = opened("llama")
    rows: list[int] = []
    run = adapters.run

    def counted(parts: Sequence[Part]) -> Any:
        stream, hidden = run(parts)
        rows.append(len(stream.input_ids))
        return stream, hidden

    monkeypatch.setattr(adapters, "run", counted)
    context = list(range(5, 45))
    score(adapters, {None: [Continuation(context, [token]) for token in (3, 4, 5, 6)]})
    score(adapters, {"lora": [Continuation(context, [token, 8, token]) for token in (3, 4, 5, 6)]})
    choices = [Continuation(context, [8, token]) for token in (3, 4)] + [Continuation(context, [8])]
    score(adapters, {"prompt_tuning": choices})
    assert rows == [40, 40 + 4 * 2, 40 + 5 + 1]


def test_an_encoder_reads_a_context_once(monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = opened("t5")
    read: list[int] = []
    encode = EncoderDecoder.encode

    def counted(layout: EncoderDecoder, stream: Stream) -> Memory:
        read.append(len(stream.lengths))
        return encode(layout, stream)

    monkeypatch.setattr(EncoderDecoder, "encode", counted)
    asked = [Continuation(context, ids) for context in ([5, 6, 7], [8, 9]) for ids in ([3, 4], [5, 6, 7], [8, 4, 4])]
    score(adapters, {None: asked, "lora": asked})
    assert read == [4]


@pytest.mark.parametrize(("kind", "more"), [("llama", {}), ("bloom", {}), ("mistral", {"sliding_window": 16})])
def test_examples_before_questions_are_read_once(
    kind: str, more: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Contexts that begin alike read that beginning once, with one choice or several, and all methods agree."""
    adapters, rng = kit.open_with_all(kit.make_model(kind, **more)), random.Random(3)
    (examples,) = kit.texts(1, 60, 60, 8)
    asked = [
        Continuation([*examples, *own], ids)
        for own in kit.texts(5, 1, 9, 9)
        for ids in kit.texts(3, 1, 1 + 3 * rng.randrange(2), rng.randrange(99))
    ]
    asked += [
        *(Continuation([*examples[:45], *own], [5, 6]) for own in kit.texts(3, 2, 9, 10)),
        Continuation(examples, [5]),
        Continuation(examples[:50], [6, 7]),
        Continuation(kit.texts(1, 9, 9)[0], [4]),
    ]
    rows: list[int] = []
    run = adapters.run

    def counted(parts: Sequence[Part]) -> Any:
        stream, hidden = run(parts)
        rows.append(len(stream.input_ids))
        return stream, hidden

    monkeypatch.setattr(adapters, "run", counted)
    names: list[str | None] = [None, *(adapters.names if kind == "llama" else ("lora", "p_tuning", "prefix_tuning"))]
    together = score(adapters, dict.fromkeys(names, asked), max_tokens=1000)
    read = sum(rows)
    worst = 0.0
    for name in names:
        alone = [score(adapters, {name: [one]})[name][0] for one in asked]
        worst = max(worst, distance(together[name], alone))
    kit.measured(f"examples shared, {kind}", worst, LIMIT)
    assert read < (sum(rows) - read) / 4


def test_exact_mode_gives_every_bit_that_an_adapter_has_alone() -> None:
    adapters = kit.open_with_all(kit.make_model("llama"), exact=True)
    asked = questions(0, 2)
    names: list[str | None] = [None, "lora", "bottleneck", "prefix_tuning"]
    together = score(adapters, dict.fromkeys(names, asked))
    assert all(score(adapters, {name: asked})[name] == together[name] for name in names)


def test_many_choices_go_through_several_passes() -> None:
    adapters, context = opened("llama"), list(range(5, 25))
    many = [Continuation(context, [3 + token, 7, 5]) for token in range(60)]
    whole, cut = score(adapters, {None: many})[None], score(adapters, {None: many}, max_tokens=40)[None]
    kit.measured("several passes", distance(cut, whole), LIMIT)


def test_virtual_tokens_stand_where_the_template_names_them() -> None:
    adapters = opened("llama")
    for place in ("slots", "after"):
        name = f"at_{place}"
        kit.randomize(adapters.add(name, kit.method_config("prompt_tuning", virtual_position=place)), 3)
        asked = [Continuation([5, 6, 7, 8], ids, (2,)) for ids in ([9], [10, 11], [12, 13, 14])]
        before = [Continuation([5, 6, 7, 8], one.ids) for one in asked]
        alone = [score(adapters, {name: [one]})[name][0] for one in asked]
        kit.measured(place, distance(score(adapters, {name: asked})[name], alone), LIMIT)
        assert score(adapters, {"prompt_tuning": before})["prompt_tuning"] != alone


def test_texts_in_windows_are_predicted_once_each() -> None:
    ids = list(range(10, 23))
    for length in (1, 2, 4, 5, 13, 20, None):
        found = windows(ids, 2, length)
        assert [token for one in found for token in one.ids] == ids
        assert all(length is None or len(one.context) + len(one.ids) - 1 <= length for one in found)
        assert found[0].context == [2]
    # As lm_eval's: the last one reads a whole window, though it predicts less.
    assert windows(ids, 2, 5)[1:] == [Continuation([14], ids[5:10]), Continuation(ids[7:10], ids[10:])]
    assert windows([], 2, 5) == []


@pytest.mark.parametrize("kind", ["llama", "gpt2", "t5"])
def test_texts_of_several_adapters(kind: str) -> None:
    adapters = opened(kind)
    texts = [*kit.texts(3, 1, 30, 5), []]
    names: Sequence[str | None] = [None, *adapters.names]
    found = score_texts(adapters, dict.fromkeys(names, texts), 2, max_length=12, max_tokens=200)
    for name in ("lora", "prompt_tuning", "prefix_tuning"):
        alone = score_texts(adapters, {name: texts}, 2, max_length=12)[name]
        assert found[name] == pytest.approx(alone, abs=LIMIT)
    adapters.close()
    wanted = [sum(by_hand(adapters.model, one).logprob for one in windows(ids, 2, 12)) for ids in texts]
    assert found[None] == pytest.approx(wanted, abs=LIMIT)
    assert found[None][-1] == 0


def test_a_text_that_is_too_long_is_refused_and_can_be_cut() -> None:
    adapters = opened("gpt2")  # of 64 positions
    long = Continuation(list(range(3, 73)), [5, 6, 7], (1, 40))
    for name, limit in ((None, 64), ("prompt_tuning", 59), ("prefix_tuning", 60)):
        assert room(adapters, name) == limit
        with pytest.raises(UserError, match=f"72 tokens are to be read, and it reads {limit} at once"):
            score(adapters, {name: [long]})
        cut = fit(adapters, name, long)
        assert [*cut.context, *cut.ids] == [*long.context, *long.ids][-limit - 1 :]
        assert cut.slots == (0, 40 - (73 - limit - 1))
        score(adapters, {name: [cut]})
    assert fit(adapters, None, Continuation([5], [6])) == Continuation([5], [6])
    with pytest.raises(UserError, match="no room for its context"):
        fit(adapters, None, Continuation([5], [6] * 65))
    texts = {None: [list(range(3, 90))], "prompt_tuning": [list(range(3, 90))]}
    assert score_texts(adapters, texts, 2)[None] != score_texts(adapters, texts, 2, max_length=59)[None]


@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({None: [Continuation([], [5])]}, "the context is empty"),
        (
            {"lora": [Continuation([5], [6]), Continuation([5], [])]},
            "continuation 1 of adapter 'lora': the continuation",
        ),
        ({"nobody": [Continuation([5], [6])]}, "no adapter named 'nobody'"),
        ({None: [Continuation([5], [500])]}, "500 at place 0 is no token id"),
    ],
)
def test_what_cannot_be_scored_is_named(asked: Mapping[str | None, Sequence[Continuation]], message: str) -> None:
    with pytest.raises(UserError, match=message):
        score(opened("llama"), asked)
