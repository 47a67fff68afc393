"""Records longer than ``max_length``: refused, left out, cut, windowed, joined."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.tokenizers import CHATML, byte_tokenizer, learned, space_tokenizer, t5_tokenizer, talk

from weft.data import (
    SOFT,
    Conversation,
    Message,
    PlainText,
    Renderer,
    Sample,
    TooLongError,
    load_labelled,
    load_samples,
)
from weft.data.rendering.sample import Draft
from weft.errors import UserError

TOKENIZERS: dict[str, Any] = {
    "bytes": byte_tokenizer(),
    "bos": byte_tokenizer(adds_bos=True),
    "chatml": byte_tokenizer("<|im_end|>", template=CHATML),
    "spaces": space_tokenizer(),
    "llama-2": byte_tokenizer(adds_bos=True),
}
TEMPLATE = {"llama-2": "llama-2"}
TEXT = st.lists(st.sampled_from([*"ab \n:", "</s>", "好"]), max_size=8).map("".join)
ROUNDS = st.lists(st.tuples(TEXT, TEXT.map(lambda text: text + "a")), min_size=1, max_size=4)


def conversation(system: str | None, rounds: Sequence[tuple[str, str]]) -> Conversation:
    messages = [] if system is None else [Message("system", system)]
    for question, answer in rounds:
        messages += [Message("user", question), Message("assistant", answer)]
    return Conversation(tuple(messages), "d:1")


@settings(max_examples=200, deadline=None)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    policy=st.sampled_from(["left", "right", "middle", "drop", "refuse"]),
    system=st.none() | TEXT,
    rounds=ROUNDS,
    train_on=st.sampled_from(["answers", "last_answer", "all"]),
    share=st.floats(0.1, 1.1),
)
def test_property_cuts(
    name: str, policy: Any, system: str | None, rounds: list[tuple[str, str]], train_on: Any, share: float
) -> None:
    tokenizer, options = TOKENIZERS[name], {"train_on": train_on, "chat_template": TEMPLATE.get(name)}
    example = conversation(system, rounds)
    whole = Renderer(tokenizer, **options).sample(example)
    limit = max(2, round(len(whole.input_ids) * share))
    renderer = Renderer(tokenizer, max_length=limit, truncation=policy, **options)
    (outcome,) = renderer.outcomes([example])
    if len(whole.input_ids) <= limit:
        assert outcome == (whole,)
        return
    if policy == "refuse":
        assert isinstance(outcome, TooLongError)
        return
    if policy == "drop":
        assert outcome == ()
        with pytest.raises(TooLongError):
            renderer.sample(example)
        return
    last = whole.answer
    assert last is not None
    tail = whole.input_ids[last:]
    if isinstance(outcome, UserError):
        if policy != "right":  # nothing of the prompt would be left but what always stays
            head = 1 + len(tokenizer("system\n" + (system or ""))["input_ids"]) + 8
            assert len(tail) + head + 8 >= limit
        return
    (cut,) = outcome
    assert renderer.sample(example) == cut
    assert len(cut.input_ids) == len(cut.weights) <= limit
    assert cut.cut == len(whole.input_ids) - len(cut.input_ids) > 0
    assert cut.weights[0] == 0.0
    assert any(cut.weights)
    if policy == "right":
        assert (cut.input_ids, cut.weights) == (whole.input_ids[:limit], whole.weights[:limit])
        return
    assert cut.answer == len(cut.input_ids) - len(tail) > 0
    assert cut.input_ids[cut.answer :] == tail  # the answer whole, with its end
    assert cut.weights[cut.answer :] == whole.weights[last:]
    if renderer.encoder.bos:
        assert cut.input_ids[:1] == renderer.encoder.bos
    if policy == "middle":
        assert len(cut.input_ids) == limit
        # one gap in the middle of the prompt, or behind what always stays
        half = cut.answer // 2
        starts = range(half, half + 1 if system is None and not renderer.encoder.bos else cut.answer)
        assert any(whole.input_ids[:i] + whole.input_ids[i + cut.cut :] == cut.input_ids for i in starts)


def test_left_drops_the_oldest_rounds_and_keeps_the_system_message() -> None:
    tokenizer = TOKENIZERS["chatml"]
    rounds = [("first", "a"), ("second", "b"), ("third", "c")]
    lengths = [len(Renderer(tokenizer).sample(conversation("S", rounds[i:])).input_ids) for i in range(3)]
    for dropped, length in enumerate(lengths):
        for limit in range(length, lengths[dropped - 1] if dropped else length + 1):
            renderer = Renderer(tokenizer, max_length=limit, truncation="left")
            expected = Renderer(tokenizer).sample(conversation("S", rounds[dropped:]))
            found = renderer.sample(conversation("S", rounds))
            assert (found.input_ids, found.weights) == (expected.input_ids, expected.weights)
            assert found.cut == lengths[0] - length
    # one round left: tokens go, from behind the system message
    limit = lengths[2] - 3
    short = Renderer(tokenizer, max_length=limit, truncation="left").sample(conversation("S", rounds))
    system = "<|im_start|>system\nS<|im_end|>\n"
    text = tokenizer.decode(short.input_ids)
    assert text == system + "er\nthird<|im_end|>\n<|im_start|>assistant\nc<|im_end|>\n"
    assert learned(tokenizer, short) == ["c<|im_end|>"]
    assert (len(short.input_ids), short.cut) == (limit, lengths[0] - limit)


def test_left_where_the_template_does_not_let_turns_go() -> None:
    strict = "{% if messages | length < 4 %}{{ raise_exception('short') if messages[0].content == 'r' }}{% endif %}"
    tokenizer = byte_tokenizer("<|im_end|>", template=strict + CHATML)
    whole = Renderer(tokenizer).sample(talk("q", "a", "r", "b"))
    n = len(whole.input_ids)
    cut = Renderer(tokenizer, max_length=n - 4, truncation="left").sample(talk("q", "a", "r", "b"))
    assert cut.input_ids == whole.input_ids[4:]
    assert cut.weights == [0.0, *whole.weights[5:]]


def test_an_answer_too_long_to_be_kept_whole() -> None:
    for policy in ("left", "middle"):
        renderer = Renderer(byte_tokenizer(), max_length=10, truncation=policy)
        with pytest.raises(TooLongError, match=r"d\.json:7: the last answer, .* takes 21 tokens"):
            renderer.sample(talk("q", "a" * 20))


def test_what_is_torn_is_not_learned() -> None:
    tokenizer = TOKENIZERS["chatml"]
    example = talk("q", "abcdefgh", "r", "b")
    whole = Renderer(tokenizer).sample(example)
    first = whole.weights.index(1.0)
    assert whole.answer is not None
    for gap in range(1, whole.answer - 2):
        limit = len(whole.input_ids) - gap
        cut = Renderer(tokenizer, max_length=limit, truncation="middle").sample(example)
        start = (whole.answer - gap) // 2
        expected = whole.weights[:start] + whole.weights[start + gap :]
        if first < start + gap:  # the rest of the first answer stands behind the gap
            end = min(first + 9, len(whole.weights)) - gap
            expected[start : max(end, start)] = [0.0] * max(end - start, 0)
        assert cut.weights == expected
    everything = Renderer(tokenizer, max_length=len(whole.input_ids) - 5, truncation="middle", train_on="all")
    weights = everything.sample(Conversation((Message("user", "q" * 30), Message("assistant", "a")), "d:1"))
    assert weights.weights.count(0.0) == 2  # the first token, and the one behind the gap


def test_text_without_answers() -> None:
    tokenizer = TOKENIZERS["bos"]
    whole = Renderer(tokenizer).sample(PlainText("abcdefgh", "t:1"))
    cuts = {p: Renderer(tokenizer, max_length=6, truncation=p).sample(PlainText("abcdefgh", "t:1")) for p in
            ("left", "right", "middle")}  # fmt: skip
    decoded = {policy: tokenizer.decode(cut.input_ids) for policy, cut in cuts.items()}
    assert decoded == {"left": "<s>efgh</s>", "right": "<s>abcde", "middle": "<s>abgh</s>"}
    assert [cuts[p].weights for p in cuts] == [[0, 0, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 1, 1, 0, 1, 1]]
    assert {cut.cut for cut in cuts.values()} == {len(whole.input_ids) - 6}
    assert [cut.answer for cut in cuts.values()] == [None] * 3


# --------------------------------------------------------------------------------------------------------------- slots


PLACES = st.lists(st.integers(0, 12), max_size=5).map(sorted)


@given(
    slots=PLACES,
    answers=st.lists(st.tuples(st.integers(0, 11), st.integers(1, 5)), max_size=2),
    start=st.integers(0, 12),
    gap=st.integers(0, 12),
)
def test_property_removing_tokens(slots: list[int], answers: list[tuple[int, int]], start: int, gap: int) -> None:
    ids, stop = list(range(100, 112)), min(start + gap, 12)
    start = min(start, stop)
    spans = sorted({first: min(first + size, 12) for first, size in answers}.items())
    spans = [span for number, span in enumerate(spans) if not number or spans[number - 1][1] <= span[0]]
    draft = Draft()
    for low, high in ((0, 5), (5, 12)):
        draft.add(ids[low:high], 1.0, (), (low, high, 0))
    draft.slots, draft.answers = list(slots), list(spans)
    draft.remove(start, stop)
    kept = [index for index in range(12) if not start <= index < stop]
    assert draft.ids == [ids[index] for index in kept]
    assert sum(origin.count for origin in draft.origins) == len(draft.ids)
    origins = [origin.start + origin.skip + i for origin in draft.origins for i in range(origin.count)]
    assert origins == kept
    assert draft.cut == stop - start
    if start == stop:
        assert draft.slots == slots
        return
    torn = {i for first, end in spans if first < stop < end for i in range(stop, end)} | ({stop} & set(kept))
    assert draft.weights == [0.0 if index in torn else 1.0 for index in kept]
    # a slot still stands before the token that it stood before, or right where the gap is
    for slot in draft.slots:
        assert 0 <= slot <= len(kept)
    expected = [slot for slot in slots if (slot < start or slot > stop or slot in (start, stop)) and
                not (stop == 12 and slot >= start)]  # fmt: skip
    assert draft.slots == [slot if slot <= start else slot - (stop - start) for slot in expected]
    survivors = [first for first, _ in spans if first in kept]
    assert [draft.ids[first] for first, end in draft.answers] == [ids[first] for first in survivors]
    assert all(first < end for first, end in draft.answers)


@pytest.mark.parametrize("policy", ["left", "middle"])
def test_slots_stay_at_their_tokens(policy: Any) -> None:
    template = (
        f"{{{{ '{SOFT}' }}}}{{% for m in messages %}}"
        f"{{{{ m.content + (eos_token if m.role == 'assistant' else '{SOFT}') }}}}{{% endfor %}}"
    )
    tokenizer = byte_tokenizer(adds_bos=True)
    whole = Renderer(tokenizer, chat_template=template).sample(talk("abcdefgh", "xy"))
    assert (whole.slots, whole.answer) == ((1, 9), 9)
    for limit in range(5, 12):
        renderer = Renderer(tokenizer, chat_template=template, max_length=limit, truncation=policy)
        cut = renderer.sample(talk("abcdefgh", "xy"))
        assert (cut.slots, cut.answer) == ((1, limit - 3), limit - 3)
        assert tokenizer.decode(cut.input_ids[limit - 3 :]) == "xy</s>"


# ------------------------------------------------------------------------------------------------ windows and documents


@settings(deadline=None)
@given(texts=st.lists(TEXT.map(lambda t: t + "z"), min_size=1, max_size=6), limit=st.integers(2, 12), data=st.data())
def test_property_windows_lose_nothing(texts: list[str], limit: int, data: Any) -> None:
    overlap = data.draw(st.integers(0, limit - 1))
    bos = data.draw(st.booleans())
    tokenizer = TOKENIZERS["bos" if bos else "bytes"]
    examples = [PlainText(text, f"t:{number}") for number, text in enumerate(texts)]
    whole = Renderer(tokenizer).samples(examples)
    options = {"max_length": limit, "window_overlap": overlap}

    renderer = Renderer(tokenizer, documents="windows", **options)
    for example, sample in zip(examples, whole, strict=True):
        found = renderer.samples([example])
        _check_windows(found, sample.input_ids, sample.weights, limit, overlap)
        assert {window.source for window in found} == {example.source}

    renderer = Renderer(tokenizer, documents="joined", **options)
    found = list(renderer.join(renderer.samples(examples)))
    ids = [token for sample in whole for token in sample.input_ids]
    weights = [weight for sample in whole for weight in sample.weights]
    begins = [sum(len(sample.input_ids) for sample in whole[:number]) for number in range(len(whole))]
    if not bos:  # the first token of a text follows the end of the one before
        weights = [1.0 if place and place in begins else weight for place, weight in enumerate(weights)]
    _check_windows(found, ids, weights, limit, overlap)
    assert all(len(window.input_ids) == limit for window in found[:-1])
    at = 0
    for window in found:
        assert window.source == examples[max(n for n, place in enumerate(begins) if place <= at)].source
        at += limit - overlap


def _check_windows(found: list[Sample], ids: list[int], weights: list[float], limit: int, overlap: int) -> None:
    told, told_weights = list(found[0].input_ids), list(found[0].weights)
    for window in found:
        assert len(window.input_ids) == len(window.weights) <= limit
        assert window.weights[0] == 0.0
    for window in found[1:]:
        assert window.input_ids[:overlap] == told[len(told) - overlap :]
        assert not any(window.weights[:overlap])
        told += window.input_ids[overlap:]
        told_weights += window.weights[overlap:]
    if overlap:  # every token is learned exactly once
        assert (told, told_weights) == (ids, weights)
    else:  # but for the first of a window, which nothing predicts
        assert told == ids[: len(told)]
        assert len(ids) - len(told) <= 1
        lost = [w for w, t in zip(weights, told_weights, strict=False) if w != t]
        assert len(lost) <= len(found)


def test_windows_are_for_text_only_and_need_a_length() -> None:
    renderer = Renderer(byte_tokenizer(), documents="windows", max_length=8)
    with pytest.raises(TooLongError):
        renderer.sample(talk("q", "a"))
    with pytest.raises(TooLongError, match="becomes 2 windows"):
        renderer.sample(PlainText("abcdefghij", "t:1"))
    assert renderer.sample(PlainText("abc", "t:1")).weights == [0.0, 1.0, 1.0, 1.0]
    with pytest.raises(UserError, match="documents: joined cuts text into windows of `max_length`"):
        Renderer(byte_tokenizer(), documents="joined")
    with pytest.raises(UserError, match="window_overlap is 8"):
        Renderer(byte_tokenizer(), documents="joined", max_length=8, window_overlap=8)
    with pytest.raises(UserError, match=r"truncation is 'rigth'.*Did you mean 'right'"):
        Renderer(byte_tokenizer(), truncation="rigth")  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"documents is 'join'.*Did you mean 'joined'"):
        Renderer(byte_tokenizer(), documents="join")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="truncate is an older word"):
        Renderer(byte_tokenizer(), truncation="left", truncate=True)


def test_conversations_pass_through_between_joined_texts() -> None:
    renderer = Renderer(byte_tokenizer(), documents="joined", max_length=60)
    examples = [PlainText("ab", "t:1"), talk("q", "a"), PlainText("cd", "t:2")]
    chat, text = renderer.join(renderer.samples(examples))
    assert chat == renderer.sample(talk("q", "a"))
    assert renderer.tokenizer.decode(text.input_ids) == "ab</s>cd</s>"
    assert text.weights == [0, 1, 1, 1, 1, 1]


# ----------------------------------------------------------------------------------------------------------- from files


def test_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text("".join(f'{{"prompt": "{"q" * n}", "completion": "a"}}\n' for n in (1, 40, 2)))
    drop = Renderer(byte_tokenizer(), max_length=50, truncation="drop")
    assert [sample.source for sample in load_samples(path, drop)] == [f"{path}:1", f"{path}:3"]
    assert "left out 1 of 3 records" in caplog.text
    caplog.clear()
    left = load_samples(path, Renderer(byte_tokenizer(), max_length=50, truncation="left"))
    assert [sample.cut > 0 for sample in left] == [False, True, False]
    assert "1 of 3 records cut to max_length 50 (left)" in caplog.text
    with pytest.raises(UserError, match="every record is longer than max_length 5"):
        load_samples(path, Renderer(byte_tokenizer(), max_length=5, truncation="drop"))
    text = tmp_path / "t.txt"
    text.write_text("abc\ndef\n")
    joined = load_samples(text, Renderer(byte_tokenizer(), max_length=5, documents="joined"), text_unit="line")
    assert [renderer_text(sample) for sample in joined] == ["abc</s>d", "def</s>"]


def renderer_text(sample: Sample) -> str:
    return byte_tokenizer().decode(sample.input_ids)


def test_labelled_files(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "d.tsv"
    path.write_text("text\tlabel\nab\tyes\nabcdefgh\tno\n")
    kept, labels = load_labelled(path, Renderer(byte_tokenizer(), max_length=4, truncation="drop"))
    assert ([sample.label for sample in kept], labels) == ([1], ("no", "yes"))
    assert "left out 1 records" in caplog.text
    left, _ = load_labelled(path, Renderer(TOKENIZERS["bos"], max_length=4, truncation="left"))
    assert [renderer_text(sample) for sample in left] == ["<s>ab", "<s>fgh"]
    assert [sample.cut for sample in left] == [0, 5]


def test_sequence_to_sequence() -> None:
    t5 = t5_tokenizer()
    left = Renderer(t5, max_length=4, truncation="left").seq2seq(talk("bcdef", "ab"))
    assert (t5.decode(left.input_ids), t5.decode(left.target_ids), left.cut) == ("def</s>", "ab</s>", 2)
    middle = Renderer(t5, max_length=5, truncation="middle").seq2seq(talk("bcdefg", "ab"))
    assert t5.decode(middle.input_ids) == "bcfg</s>"
    with pytest.raises(TooLongError, match="keeps answers whole"):
        Renderer(t5, max_length=4, truncation="left").seq2seq(talk("b", "abcdef"))
    drop = Renderer(t5, max_length=4, truncation="drop")
    assert drop.samples([talk("b", "abcdef"), talk("b", "a")], "seq2seq") == [drop.seq2seq(talk("b", "a"))]
    assert list(drop.outcomes([talk("bcdefg", "ab")], "seq2seq")) == [()]
