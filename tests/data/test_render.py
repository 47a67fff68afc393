"""Rendering: what is learned, what it is learned after, and which tokens may be control tokens."""

from __future__ import annotations

from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.tokenizers import CHATML, FORGETFUL, LLAMA2, byte_tokenizer, learned, space_tokenizer, talk
from transformers import AutoTokenizer

from weft.data import (
    PLAIN_TEMPLATE,
    Conversation,
    EmptyAnswerError,
    Message,
    PlainText,
    Renderer,
    load_samples,
    read_records,
    split_holdout,
    to_example,
)
from weft.errors import UserError

# ------------------------------------------------------------------------------------------------------ what is learned


def test_answers_are_learned_with_their_end_and_nothing_after_it() -> None:
    tokenizer = byte_tokenizer("<|im_end|>", template=CHATML)
    sample = Renderer(tokenizer).sample(talk("q", "an answer", "r", "b"))
    assert learned(tokenizer, sample) == ["an answer<|im_end|>", "b<|im_end|>"]
    assert tokenizer.decode(sample.input_ids).endswith("<|im_start|>assistant\nb<|im_end|>\n")
    assert sample.weights[-1] == 0.0


def test_train_on() -> None:
    tokenizer = byte_tokenizer("<|im_end|>", template=CHATML)
    last = Renderer(tokenizer, train_on="last_answer").sample(talk("q", "a", "r", "b"))
    assert learned(tokenizer, last) == ["b<|im_end|>"]
    everything = Renderer(tokenizer, train_on="all").sample(talk("q", "a", "r", "b"))
    assert everything.weights == [0.0] + [1.0] * (len(everything.input_ids) - 1)
    assert everything.input_ids == Renderer(tokenizer).sample(talk("q", "a", "r", "b")).input_ids


def test_a_message_may_be_switched_on_or_off() -> None:
    tokenizer = byte_tokenizer("<|im_end|>", template=CHATML)
    messages = [Message("user", "q"), Message("assistant", "a", False), Message("user", "r"), Message("assistant", "b")]
    off = Conversation(tuple(messages), "d:1")
    assert learned(tokenizer, Renderer(tokenizer).sample(off)) == ["b<|im_end|>"]
    whole = Renderer(tokenizer, train_on="all").sample(off)
    skipped = [token for token, weight in zip(whole.input_ids, whole.weights, strict=True) if not weight]
    assert tokenizer.decode(skipped) == "<|im_start|>a<|im_end|>\n"
    messages[1] = Message("assistant", "a", True)
    on = Conversation(tuple(messages), "d:1")
    assert learned(tokenizer, Renderer(tokenizer, train_on="last_answer").sample(on)) == ["a<|im_end|>", "b<|im_end|>"]
    asks = Conversation((Message("user", "q", True), Message("assistant", "a")), "d:1")
    with pytest.raises(UserError, match=r"d:1: turn 1 \(user\)"):
        Renderer(tokenizer).sample(asks)


@pytest.mark.parametrize("suffix", ["", "\n", " [end]\n\n"])
def test_the_end_is_learned_even_if_the_template_has_none(suffix: str) -> None:
    template = "{% for message in messages %}{{ message.role + ':' + message.content + '" + suffix + "' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ 'assistant:' }}{% endif %}"
    tokenizer = byte_tokenizer("</s>")
    renderer = Renderer(tokenizer, chat_template=template.replace("\n", "\\n"))
    sample = renderer.sample(talk("q", "a", "r", "b"))
    assert learned(tokenizer, sample) == [f"{answer}{suffix.rstrip()}</s>" for answer in "ab"]
    tail = suffix[len(suffix.rstrip()) :]
    assert tokenizer.decode(sample.input_ids).endswith(f"b{suffix.rstrip()}</s>{tail}")
    prompt = renderer.prompt_ids(talk("q", "a", "r").messages)
    assert sample.input_ids[: len(prompt)] == prompt


def test_plain_text() -> None:
    tokenizer = byte_tokenizer(adds_bos=True)
    sample = Renderer(tokenizer).sample(PlainText("ab</s>", "t:1"))
    assert tokenizer.decode(sample.input_ids) == "<s>ab</s></s>"
    assert sample.input_ids[-1] == tokenizer.eos_token_id
    assert sample.input_ids.count(tokenizer.eos_token_id) == 1
    assert sample.weights == [0.0] + [1.0] * (len(sample.input_ids) - 1)
    assert Renderer(byte_tokenizer()).sample(PlainText("ab", "t:1")).weights == [0.0, 1.0, 1.0]


def test_nothing_to_learn_is_an_error() -> None:
    renderer = Renderer(byte_tokenizer())
    off = Conversation((Message("user", "q"), Message("assistant", "a", False)), "d:1")
    for example in (
        off,
        Conversation((Message("assistant", "hello"), Message("user", "q")), "d:1"),
        PlainText("", "d:1"),
    ):
        with pytest.raises(UserError, match="d:1: nothing of this record"):
            renderer.sample(example)
    greeting = Conversation((Message("assistant", "hello"), *talk("q", "a").messages), "d:1")
    assert learned(renderer.tokenizer, renderer.sample(greeting)) == ["a</s>"]


# --------------------------------------------------------------------------------------------- prompts equal training's


PIECES = [*"atqh \n:#", "é", "好", "<s>", "</s>", "<|im_end|>", "\ufdd0", "\ufdd0" + "0" + "\ufdd1"]
TEXT = st.lists(st.sampled_from(PIECES), max_size=6).map("".join)
ANSWER = TEXT.map(lambda text: text + "a")
TURNS = st.lists(
    st.tuples(st.sampled_from(["user", "user", "tool"]), TEXT, ANSWER, st.sampled_from([None, None, True, False])),
    min_size=1,
    max_size=4,
)
TOKENIZERS = {
    "bytes": byte_tokenizer(),
    "bytes, bos": byte_tokenizer(adds_bos=True),
    "chatml": byte_tokenizer("<|im_end|>", template=CHATML),
    "spaces": space_tokenizer(),
}


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    system=st.none() | TEXT,
    rounds=TURNS,
    train_on=st.sampled_from(["answers", "last_answer", "all"]),
)
def test_property_prompts_masks_and_control_tokens(name: str, system: str | None, rounds: list, train_on: Any) -> None:
    tokenizer = TOKENIZERS[name]
    messages = [] if system is None else [Message("system", system)]
    for role, question, answer, train in rounds:
        messages += [Message(role, question), Message("assistant", answer, train)]
    renderer = Renderer(tokenizer, train_on=train_on)
    answers = [index for index, message in enumerate(messages) if message.role == "assistant"]
    default = {"answers": answers, "last_answer": answers[-1:], "all": answers}[train_on]
    trained = [i for i in answers if messages[i].train or (messages[i].train is None and i in default)]
    conversation = Conversation(tuple(messages), "d:1")
    if not trained and train_on != "all":
        with pytest.raises(UserError):
            renderer.sample(conversation)
        return
    sample = renderer.sample(conversation)
    ids, weights = sample.input_ids, sample.weights
    eos = tokenizer.eos_token_id
    # the only control tokens are those that the template writes
    assert ids.count(eos) == (len(messages) if name == "chatml" else len(answers))
    if tokenizer.bos_token_id is not None:
        assert ids.count(tokenizer.bos_token_id) == 1
        assert ids[0] == tokenizer.bos_token_id
    for index in trained:
        prompt = renderer.prompt_ids(messages[:index])
        assert ids[: len(prompt)] == prompt
        end = ids.index(eos, len(prompt))
        assert weights[len(prompt) : end + 1] == [1.0] * (end + 1 - len(prompt))
        if train_on != "all":
            assert weights[len(prompt) - 1] == 0.0
            assert weights[end + 1 : end + 2] in ([], [0.0])
        if name != "spaces":
            assert tokenizer.decode(ids[len(prompt) : end]) == messages[index].content
    if train_on != "all":
        assert sum(left < right for left, right in pairwise(weights)) == len(trained)


def test_the_seam_between_prompt_and_answer_is_not_merged() -> None:
    tokenizer = byte_tokenizer()
    renderer = Renderer(tokenizer)
    sample = renderer.sample(talk("q", "a"))
    assert len(tokenizer("\na")["input_ids"]) == 1
    prompt = renderer.prompt_ids(talk("q").messages)
    assert tokenizer.decode(prompt) == "### Instruction:\nq\n\n### Response:\n"
    assert sample.input_ids == [*prompt, *tokenizer("a")["input_ids"], tokenizer.eos_token_id]


def test_no_space_is_made_up_in_mid_text() -> None:
    tokenizer = space_tokenizer()
    sample = Renderer(tokenizer, chat_template=LLAMA2).sample(talk("ab", "a", "c", "d"))
    text = "".join(tokenizer.convert_ids_to_tokens(sample.input_ids))
    assert text == "<s>[INST]▁ab▁[/INST]▁a▁</s><s>[INST]▁c▁[/INST]▁d▁</s>"
    assert tokenizer.convert_ids_to_tokens([i for i, w in zip(sample.input_ids, sample.weights, strict=True) if w]) == [
        *["▁a", "▁", "</s>"],
        *["▁", "d", "▁", "</s>"],
    ]


def test_no_space_is_made_up_where_an_answer_begins() -> None:
    tokenizer = space_tokenizer()
    renderer = Renderer(tokenizer)
    sample = renderer.sample(talk("ab", "dc", "e", "f"))
    tokens = tokenizer.convert_ids_to_tokens(sample.input_ids)
    supervised = [token for token, weight in zip(tokens, sample.weights, strict=True) if weight]
    assert supervised == ["d", "c", "</s>", "f", "</s>"]
    # a typed "</s>" is cut out of its surroundings: still only the spaces at the start and in the two headings
    assert tokenizer.convert_ids_to_tokens(renderer.prompt_ids(talk("</s>").messages)).count("▁") == 3


def test_one_bos_whoever_writes_it() -> None:
    for template in (PLAIN_TEMPLATE, "{{ bos_token }}" + PLAIN_TEMPLATE):
        tokenizer = byte_tokenizer(adds_bos=True, template=template)
        renderer = Renderer(tokenizer)
        for ids in (renderer.sample(talk("q", "a")).input_ids, renderer.prompt_ids(talk("q").messages)):
            assert ids[0] == tokenizer.bos_token_id
            assert ids.count(tokenizer.bos_token_id) == 1


def test_a_template_that_rewrites_the_past_is_refused_by_turn() -> None:
    tokenizer = byte_tokenizer("<|im_end|>", template=FORGETFUL)
    with pytest.raises(UserError, match=r"d\.json:7: .*not prefix-preserving at turn 2 of 4"):
        Renderer(tokenizer).sample(talk("q", "a", "r", "b"))
    sample = Renderer(tokenizer, train_on="last_answer").sample(talk("q", "a", "r", "b"))
    assert learned(tokenizer, sample) == ["(thought)b<|im_end|>"]


def test_a_template_that_refuses_is_reported() -> None:
    renderer = Renderer(byte_tokenizer(), chat_template="{{ raise_exception('roles must alternate') }}")
    with pytest.raises(UserError, match=r"d\.json:7: .*roles must alternate"):
        renderer.sample(talk("q", "a"))


def test_tools_and_calls_reach_the_template() -> None:
    tokenizer = byte_tokenizer()
    call = {"type": "function", "function": {"name": "find", "arguments": {"x": "</s>"}}}
    messages = (
        Message("user", "q"),
        Message("assistant", "", None, tool_calls=(call,)),
        Message("tool", "r"),
        Message("assistant", "a"),
    )
    sample = Renderer(tokenizer).sample(Conversation(messages, "d:1", ({"name": "find"},)))
    assert learned(tokenizer, sample) == ['### Call:\n{"name": "find", "arguments": {"x": "</s>"}}</s>', "a</s>"]
    assert sample.input_ids.count(tokenizer.eos_token_id) == 2
    assert tokenizer.decode(sample.input_ids).startswith('### Tools:\n{"name": "find"}\n\n### Instruction:\nq\n\n')
    with pytest.raises(UserError, match="does not render the tool call of turn 2"):
        Renderer(tokenizer, chat_template=CHATML).sample(Conversation(messages, "d:1"))


# -------------------------------------------------------------------------------------------------- options and lengths


def test_options_are_checked() -> None:
    endless = Renderer(byte_tokenizer(None))  # classification needs no end
    with pytest.raises(UserError, match="no end-of-sequence token"):
        endless.sample(talk("q", "a"))
    with pytest.raises(UserError, match="no end-of-sequence token"):
        endless.sample(PlainText("a", "t:1"))
    with pytest.raises(UserError, match="Did you mean 'answers'"):
        Renderer(byte_tokenizer(), train_on="answer")  # type: ignore[arg-type]
    with pytest.raises(UserError, match="max_length is 1"):
        Renderer(byte_tokenizer(), max_length=1)


def test_too_long() -> None:
    tokenizer = byte_tokenizer()
    whole = Renderer(tokenizer).sample(talk("q", "abc"))
    n = len(whole.input_ids)
    assert Renderer(tokenizer, max_length=n).sample(talk("q", "abc")) == whole
    with pytest.raises(UserError, match=rf"d\.json:7: the record is {n} tokens long, max_length is {n - 1}.*truncate"):
        Renderer(tokenizer, max_length=n - 1).sample(talk("q", "abc"))
    cut = Renderer(tokenizer, max_length=n - 2, truncate=True).sample(talk("q", "abc"))
    assert (cut.input_ids, cut.weights) == (whole.input_ids[:-2], whole.weights[:-2])
    with pytest.raises(UserError, match=r"d\.json:7: cut to max_length .*no token to learn"):
        Renderer(tokenizer, max_length=n - 4, truncate=True).sample(talk("q", "abc"))


def test_load_samples_and_holdout(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "d.csv"
    path.write_text("ask,reply\nq,a\nr,\ns,c\n")
    renderer = Renderer(byte_tokenizer())
    columns = {"prompt": "ask", "completion": "reply"}
    with pytest.raises(EmptyAnswerError, match=r"d\.csv:3: "):
        load_samples(path, renderer, columns=columns)
    samples = load_samples(path, renderer, columns=columns, empty_answers="skip")
    assert [sample.source for sample in samples] == [f"{path}:2", f"{path}:4"]
    assert "left out 1 records" in caplog.text
    assert len(load_samples(path, renderer, columns=columns, limit=1)) == 1

    numbers = list(range(100))
    train, held = split_holdout(numbers, 10, seed=3)
    assert (train, held, len(held)) == (sorted(train), sorted(held), 10)
    assert sorted(train + held) == numbers
    assert split_holdout(numbers, 10, seed=3) == (train, held)
    assert split_holdout(numbers, 10, seed=4) != (train, held)
    assert split_holdout(numbers, 0, seed=3) == (numbers, [])
    for n_eval in (-1, 100):
        with pytest.raises(UserError, match="cannot hold out"):
            split_holdout(numbers, n_eval, seed=3)


# -------------------------------------------------------------------------------------------------- the real tokenizers


@pytest.mark.long
@pytest.mark.parametrize("name", ["tokenizers/llama2", "tokenizers/minimind", "tokenizers/gpt2", "models/stories260K"])
def test_real_tokenizers_on_real_records(shared: Path, name: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(shared / name)
    if tokenizer.eos_token is None:  # the folder of GPT-2 has no tokenizer_config.json
        with pytest.raises(UserError, match="end-of-sequence"):
            Renderer(tokenizer).sample(talk("q", "a"))
        tokenizer.eos_token = "<|endoftext|>"
    renderer = Renderer(tokenizer)
    template = renderer.chat_template
    for path in sorted((shared / "sft").iterdir()):
        for record in read_records(path, limit=30):
            example = to_example(record)
            assert isinstance(example, Conversation)
            sample = renderer.sample(example)
            first = next(i for i, message in enumerate(example.messages) if message.role == "assistant")
            answers = [message.content for message in example.messages if message.role == "assistant"]
            prompt = renderer.prompt_ids(example.messages[:first], tools=example.tools)
            assert sample.input_ids[: len(prompt)] == prompt
            assert len(learned(tokenizer, sample)) == len(answers)
            ends = [
                i for i, token in enumerate(sample.input_ids) if token == tokenizer.eos_token_id and sample.weights[i]
            ]
            assert len(ends) == len(answers)
            # what transformers itself makes of the same messages, BOS aside
            turns = [{"role": message.role, "content": message.content} for message in example.messages[:first]]
            text = tokenizer.apply_chat_template(
                turns,
                tools=list(example.tools) or None,
                chat_template=template,
                add_generation_prompt=True,
                tokenize=False,
            )
            assert prompt == tokenizer(text)["input_ids"]
