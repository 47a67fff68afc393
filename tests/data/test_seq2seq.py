"""Sequence-to-sequence data: the tokenizer's own special tokens around the input, the answer with its end as target."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.tokenizers import CHATML, byte_tokenizer, t5_tokenizer, talk

from weft.data import SOFT, Conversation, Message, PlainText, Renderer, load_samples
from weft.errors import UserError

T5, BART = t5_tokenizer(), t5_tokenizer(adds_bos=True)


def test_input_and_target_of_a_tokenizer_without_a_template() -> None:
    sample = Renderer(T5).seq2seq(talk("q", "a"))
    assert T5.decode(sample.input_ids) == "q</s>"
    assert T5.decode(sample.target_ids) == "a</s>"
    assert sample.weights == [0.0, 0.0]
    assert (sample.source, sample.slots, sample.answer, sample.label) == ("d.json:7", (), None, None)
    turns = (*talk("q", "a", "r").messages, Message("system", "s"), Message("assistant", "b"))
    sample = Renderer(BART).seq2seq(Conversation(turns, "d:1"))
    assert BART.decode(sample.input_ids) == "<s>s\nq\na\nr</s>"
    assert BART.decode(sample.target_ids) == "<s>b</s>"


def test_the_end_is_learned_by_a_tokenizer_that_puts_none() -> None:
    tokenizer = byte_tokenizer()
    sample = Renderer(tokenizer).seq2seq(talk("q", "a"))
    assert tokenizer.decode(sample.input_ids) == "q"
    assert tokenizer.decode(sample.target_ids) == "a</s>"


def test_with_a_template_and_slots() -> None:
    renderer = Renderer(BART, chat_template=SOFT + "{{ '<s>' }}" + CHATML + SOFT)
    sample = renderer.seq2seq(talk("q<s>", "a"))
    assert BART.decode(sample.input_ids) == "<s><|im_start|>user\nq<s><|im_end|>\n<|im_start|>assistant\n</s>"
    assert sample.input_ids.count(BART.bos_token_id) == 1
    assert sample.slots == (0, len(sample.input_ids) - 1)
    prompt = renderer.prompt(talk("q<s>").messages, task="seq2seq")
    assert (prompt.ids, prompt.slots) == (sample.input_ids, sample.slots)


TEXT = st.lists(st.sampled_from([*"ab \n:", "<s>", "</s>", SOFT, "<|im_end|>", "好"]), max_size=6).map("".join)


@settings(max_examples=100, deadline=None)
@given(
    name=st.sampled_from(["T5", "BART"]),
    texts=st.lists(TEXT.map(lambda text: text + "a"), min_size=1, max_size=3).map(lambda texts: (texts * 2)[:4]),
)
def test_property_prompts_equal_inputs_and_data_commands_nothing(name: str, texts: list[str]) -> None:
    tokenizer = {"T5": T5, "BART": BART}[name]
    conversation = talk(*texts)
    sample = Renderer(tokenizer).seq2seq(conversation)
    assert sample.input_ids == Renderer(tokenizer).prompt(conversation.messages[:-1], task="seq2seq").ids
    for ids, text in ((sample.input_ids, "\n".join(texts[:-1])), (sample.target_ids, texts[-1])):
        assert tokenizer.decode(ids).removeprefix("<s>" if name == "BART" else "") == text + "</s>"
        assert list(ids).count(tokenizer.eos_token_id) == 1
        assert ids[-1] == tokenizer.eos_token_id
    if not any("<" in text for text in texts):
        assert sample.input_ids == tokenizer("\n".join(texts[:-1]))["input_ids"]


def test_too_long() -> None:
    with pytest.raises(UserError, match=r"d\.json:7: the input is 5 tokens long, max_length is 4"):
        Renderer(T5, max_length=4).seq2seq(talk("bcde", "a"))
    with pytest.raises(UserError, match=r"d\.json:7: the answer is 5 tokens long, max_length is 4"):
        Renderer(T5, max_length=4).seq2seq(talk("q", "bcde"))
    cut = Renderer(T5, max_length=4, truncate=True).seq2seq(talk("bcde", "bcde"))
    assert T5.decode(cut.input_ids) == "bcd</s>"  # the input keeps its form
    assert T5.decode(cut.target_ids) == "bcde"  # a text that was cut does not end here
    assert cut.weights == [0.0] * 4
    marked = "{{ 'b' }}" + SOFT + "{{ 'cde' }}" + SOFT
    assert Renderer(T5, max_length=4, truncate=True, chat_template=marked).seq2seq(talk("q", "a")).slots == (1,)


CALL: Any = {"type": "function", "function": {"name": "f", "arguments": {}}}


@pytest.mark.parametrize(
    ("example", "message"),
    [
        (PlainText("a", "d:1"), "d:1: plain text has no answer"),
        (Conversation((Message("assistant", "a"),), "d:1"), "d:1: no assistant turn after another turn"),
        (Conversation((Message("user", "q"), Message("assistant", "a", False)), "d:1"), "d:1: no assistant turn"),
        (
            Conversation((Message("user", "q"), Message("assistant", "", None, tool_calls=(CALL,))), "d:1"),
            "d:1: .*a tool call",
        ),
        (Conversation(talk("q", "a").messages, "d:1", ({"name": "f"},)), "d:1: tools need a `chat_template`"),
    ],
)
def test_what_cannot_be_written(example: Any, message: str) -> None:
    with pytest.raises(UserError, match=message):
        Renderer(T5).seq2seq(example)


def test_load_samples(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_text('{"question": "q", "answer": "a"}\n')
    (sample,) = load_samples(path, Renderer(T5), task="seq2seq")
    assert T5.decode(sample.target_ids) == "a</s>"
    assert load_samples(path, Renderer(T5))[0].target_ids == ()
    with pytest.raises(UserError, match="Did you mean 'seq2seq'"):
        load_samples(path, Renderer(T5), task="seq2sec")  # type: ignore[arg-type]
