"""Many samples at once equal one at a time; weights per turn; what tokens are; the renderer's fingerprint."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.data import golden
from tests.kit.tokenizers import CHATML, byte_tokenizer, space_tokenizer, t5_tokenizer, talk
from transformers import AutoTokenizer

from weft.data import SOFT, TEMPLATES, Conversation, Message, PlainText, Renderer, Sample
from weft.errors import UserError

SLOTTED = f"{{{{ '{SOFT}' }}}}" + CHATML.replace("message.role + '\n'", f"message.role + '{SOFT}\n'")
PIECES = [
    *"atqh \n:#",
    "é",
    "好",
    "🙂",
    "<s>",
    "</s>",
    "<|im_end|>",
    "<|end|>",
    SOFT,
    "\ufdd0",
    "\ufdd00\ufdd1",
    "\ufdd2",
]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
MESSAGES = st.lists(
    st.builds(
        Message,
        st.sampled_from(["user", "user", "assistant", "assistant", "system", "tool"]),
        TEXT,
        st.sampled_from([None, None, None, False]),
        loss_weight=st.sampled_from([1.0, 1.0, 0.5, 0.0]),
    ).map(lambda m: m if m.role == "assistant" else Message(m.role, m.content)),
    max_size=5,
)
EXAMPLES = st.lists(
    st.one_of(
        MESSAGES.map(lambda turns: Conversation(tuple(turns), "d:1")),
        st.lists(TEXT, min_size=2, max_size=6).map(lambda texts: talk(*texts)),
        TEXT.map(lambda text: PlainText(text, "t:1")),
    ),
    max_size=6,
)
CUSTOM: dict[str, Any] = {
    "": (byte_tokenizer(), None),
    "own chatml": (byte_tokenizer("<|im_end|>", template=CHATML), None),
    "slots": (byte_tokenizer(adds_bos=True), SLOTTED),
    "spaces": (space_tokenizer(), None),
    "spaces, llama-2": (space_tokenizer(), "llama-2"),
    "t5": (t5_tokenizer(), None),
}


def _renderer(name: str, **options: Any) -> Renderer:
    tokenizer, template = CUSTOM[name] if name in CUSTOM else (golden.tokenizer("tiny", name, None), name)
    return Renderer(tokenizer, chat_template=template, **options)


@pytest.mark.long
@settings(max_examples=250, deadline=None)
@given(
    name=st.sampled_from([*CUSTOM, *TEMPLATES]),
    examples=EXAMPLES,
    train_on=st.sampled_from(["answers", "last_answer", "all"]),
    truncation=st.sampled_from(["refuse", "left", "right", "middle"]),
    max_length=st.none() | st.integers(5, 80),
)
def test_property_many_at_once_are_what_each_is_alone(
    name: str, examples: list[Any], train_on: Any, truncation: Any, max_length: int | None
) -> None:
    renderer = _renderer(name, train_on=train_on, truncation=truncation, max_length=max_length)
    expected: list[Sample | str] = []
    for example in examples:
        try:
            expected.append(renderer.sample(example))
        except UserError as error:
            expected.append(str(error))
    outcomes = list(renderer.outcomes(examples))
    assert [str(found) if isinstance(found, UserError) else found[0] for found in outcomes] == expected
    errors = [text for text in expected if isinstance(text, str)]
    if errors:
        with pytest.raises(UserError) as raised:
            renderer.samples(examples)
        assert str(raised.value) == errors[0]
    else:
        assert renderer.samples(examples) == expected


@pytest.mark.parametrize("name", ["own chatml", "spaces", ""])
def test_a_batch_is_one_call_of_the_tokenizer(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    renderer = _renderer(name)
    examples = [talk(f"question {number}", f"answer {number}") for number in range(20)]
    expected = [renderer.sample(example) for example in examples]
    calls: list[Any] = []
    real = renderer.encoder.tokenizer

    def counted(*arguments: Any, **options: Any) -> Any:
        calls.append(arguments)
        return real(*arguments, **options)

    monkeypatch.setattr(renderer.encoder, "tokenizer", counted)
    monkeypatch.setattr(renderer.encoder, "_backend", None)
    assert renderer.samples(examples) == expected
    assert len(calls) == 1


def test_what_an_earlier_call_set_does_not_matter() -> None:
    tokenizer = byte_tokenizer("<|im_end|>", template=CHATML)
    renderer, example = Renderer(tokenizer), talk("q <s>", "an answer")
    expected = renderer.sample(example)
    tokenizer.pad_token = "<s>"
    tokenizer("abcdef", truncation=True, max_length=2, padding="max_length", split_special_tokens=True)
    assert renderer.samples([example]) == [expected]


# ----------------------------------------------------------------------------------------------------- weights per turn


@given(
    weights=st.lists(st.sampled_from([0.25, 1.0, 3.0]), min_size=1, max_size=4),
    train_on=st.sampled_from(["answers", "last_answer", "all"]),
    end=st.sampled_from(["<|im_end|>", "</s>"]),  # the template's, and one that it lacks
)
def test_property_weights_scale_their_turn(weights: list[float], train_on: Any, end: str) -> None:
    renderer = Renderer(byte_tokenizer(end, template=CHATML), train_on=train_on)
    turns = [
        message
        for number, weight in enumerate(weights)
        for message in (Message("user", f"q{number}"), Message("assistant", f"a{number}", loss_weight=weight))
    ]
    plain = Conversation(tuple(Message(m.role, m.content) for m in turns), "d:1")
    learned = [w for n, w in enumerate(weights) if train_on != "last_answer" or n + 1 == len(weights)]
    base, sample = renderer.sample(plain), renderer.sample(Conversation(tuple(turns), "d:1"))
    assert sample.input_ids == base.input_ids
    per_turn = len("a0") + 1 + (end == "</s>")  # with its end
    expected = sum(base.weights) + per_turn * sum(weight - 1 for weight in learned)
    assert sum(sample.weights) == pytest.approx(expected)
    assert {w for w in sample.weights if w} <= {*learned, 1.0}


def test_weight_nought_is_a_turn_switched_off() -> None:
    for train_on in ("answers", "all"):
        renderer = Renderer(byte_tokenizer("<|im_end|>", template=CHATML), train_on=train_on)  # type: ignore[arg-type]
        rest = talk("q", "a", "r").messages
        none, off = Message("assistant", "b", loss_weight=0.0), Message("assistant", "b", False)
        found = renderer.sample(Conversation((*rest, none), "d:1"))
        assert found == renderer.sample(Conversation((*rest, off), "d:1"))
        assert found != renderer.sample(talk("q", "a", "r", "b"))
    with pytest.raises(UserError, match="nothing of this record"):
        Renderer(byte_tokenizer()).sample(Conversation((*rest[:1], none), "d:1"))


def test_weights_that_cannot_be() -> None:
    renderer = Renderer(byte_tokenizer())
    for weight in (-1.0, float("nan"), float("inf")):
        wrong = Conversation((Message("user", "q"), Message("assistant", "a", loss_weight=weight)), "d:1")
        with pytest.raises(UserError, match="d:1: turn 2 has the loss weight"):
            renderer.sample(wrong)
    asked = Conversation((Message("user", "q", loss_weight=0.5), Message("assistant", "a")), "d:1")
    with pytest.raises(UserError, match=r"d:1: turn 1 \(user\) asks for the loss weight 0.5"):
        renderer.sample(asked)
    half = Conversation((Message("user", "q"), Message("assistant", "a", loss_weight=0.5)), "d:1")
    with pytest.raises(UserError, match="seq2seq learns answers at weight 1"):
        Renderer(t5_tokenizer()).seq2seq(half)


# -------------------------------------------------------------------------------------------------- what the tokens are


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from([*CUSTOM, *TEMPLATES]),
    texts=st.lists(TEXT, min_size=2, max_size=6),
    truncation=st.sampled_from(["left", "right", "middle"]),
    max_length=st.none() | st.integers(20, 80),
)
def test_property_explained(name: str, texts: list[str], truncation: Any, max_length: int | None) -> None:
    renderer = _renderer(name, truncation=truncation, max_length=max_length)
    for example in (talk(*texts), PlainText("".join(texts) + "a", "t:1")):
        try:
            sample = renderer.sample(example)
        except UserError:
            continue
        explained = renderer.explain(example)
        assert explained.sample == sample
        assert [token.id for token in explained.tokens] == sample.input_ids
        assert [token.weight for token in explained.tokens] == sample.weights
        pieces = explained.pieces()
        assert [piece.start for piece in pieces] == [0, *(piece.stop for piece in pieces[:-1])]
        if sample.cut:
            continue
        # All texts are the rendering, but for the ends and the BOS that it lacks.
        ends = (renderer.tokenizer.eos_token, renderer.tokenizer.bos_token or "")
        rendering = "".join(piece or "" for piece, _ in renderer.encoder._pieces(renderer.script(example).text))
        shown = "".join(token.text for token in explained.tokens)
        for end in filter(None, ends):
            rendering, shown = rendering.replace(end, ""), shown.replace(end, "")
        assert shown == rendering
        if isinstance(example, PlainText):
            assert {token.kind for token in explained.tokens} <= {"bos", "text", "eos"}
            continue
        answers = sum(piece.kind == "eos" for piece in pieces)
        assert answers == len(texts) // 2


def test_kinds() -> None:
    tokenizer = byte_tokenizer("</s>", adds_bos=True, template=None)
    turns = (Message("system", "sys"), Message("user", " 你 "), Message("assistant", "yes"), Message("user", "q"))
    renderer = Renderer(tokenizer, train_on="all")
    found = [(p.kind, p.text, p.weight) for p in renderer.explain(Conversation(turns, "d:1")).pieces()]
    assert found == [
        ("bos", "<s>", 0.0),
        ("prompt", "sys", 1.0),
        ("template", "\n\n### Instruction:\n ", 1.0),
        ("prompt", "你", 1.0),
        ("template", " \n\n### Response:\n", 1.0),
        ("answer", "yes", 1.0),
        ("eos", "</s>", 1.0),
        ("template", "\n\n### Instruction:\n", 1.0),
        ("prompt", "q", 1.0),
    ]
    text = Renderer(tokenizer).explain(PlainText("ab", "t:1")).pieces()
    assert [(p.kind, p.text) for p in text] == [("bos", "<s>"), ("text", "ab"), ("eos", "</s>")]


# --------------------------------------------------------------------------------------------------------- fingerprints


def test_the_fingerprint_tells_what_changes_samples() -> None:
    base: dict[str, Any] = {"tokenizer": byte_tokenizer("<|im_end|>"), "chat_template": "chatml"}
    first = Renderer(**base).fingerprint()
    assert json.loads(json.dumps(first)) == first == Renderer(**base).fingerprint()
    assert first["template"]["name"] == "chatml"
    others = [
        {"chat_template": "alpaca"},
        {"chat_template": CHATML},
        {"template_kwargs": {"enable_thinking": False}},
        {"train_on": "all"},
        {"max_length": 9},
        {"max_length": 9, "truncation": "left"},
        {"max_length": 9, "documents": "windows"},
        {"max_length": 9, "window_overlap": 2},
        {"tokenizer": byte_tokenizer("</s>")},
        {"tokenizer": byte_tokenizer("<|im_end|>", adds_bos=True)},
    ]
    sums = {Renderer(**{**base, **other}).fingerprint()["sha256"] for other in others}
    assert len(sums | {first["sha256"]}) == len(others) + 1


@pytest.mark.parametrize("name", ["tiny-llama", "tiny-bloom"])
def test_the_fingerprint_lasts(name: str, tmp_path: Path) -> None:
    from weft.assets import model_path

    tokenizer = AutoTokenizer.from_pretrained(model_path(name))
    renderer = Renderer(tokenizer)
    before = renderer.fingerprint()
    tokenizer("a", truncation=True, max_length=3, padding="max_length")  # leaves traces in the backend
    assert renderer.fingerprint() == before
    tokenizer.save_pretrained(tmp_path)
    assert Renderer(AutoTokenizer.from_pretrained(tmp_path)).fingerprint() == before


@pytest.mark.long
@pytest.mark.parametrize("name", ["llama2", "minimind", "gpt2"])
def test_the_fingerprint_of_real_tokenizers_lasts(shared: Path, name: str, tmp_path: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / "tokenizers" / name)
    before = Renderer(tokenizer).fingerprint()
    tokenizer.save_pretrained(tmp_path)
    assert Renderer(AutoTokenizer.from_pretrained(tmp_path)).fingerprint() == before
