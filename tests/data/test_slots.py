"""Soft-prompt slots: where a template's markers leave their places, and that data cannot make one."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tests.kit.tokenizers import CHATML, byte_tokenizer, space_tokenizer, talk

from weft.data import SOFT, Conversation, Message, PlainText, Prompt, Renderer
from weft.errors import UserError


def template(head: str = "", user: str = "", answer: str = "", end: str = "", *, eos: bool = True) -> str:
    """Markers at the head, around a user's message, right before an answer and after its end."""
    after = "eos_token + " if eos else ""
    return (
        f"{{{{ '{head}' }}}}{{% for m in messages %}}{{% if m.role == 'assistant' %}}"
        f"{{{{ ':{answer}' + m.content + {after}'{end}\\n' }}}}"
        f"{{% else %}}{{{{ m.role + '{user}' + m.content + '{user}\\n' }}}}{{% endif %}}{{% endfor %}}"
        f"{{% if add_generation_prompt %}}{{{{ ':{answer}' }}}}{{% endif %}}"
    )


def test_markers_are_places_and_no_tokens() -> None:
    tokenizer = byte_tokenizer()
    marked = Renderer(tokenizer, chat_template=template(SOFT, SOFT, SOFT * 2))
    sample = marked.sample(talk("q", "a"))
    assert tokenizer.decode(sample.input_ids) == "userq\n:a</s>\n"
    assert sample.slots == (0, 4, 5, 7, 7)
    assert sample.answer == 7
    assert [index for index, weight in enumerate(sample.weights) if weight] == [7, 8]
    assert marked.prompt(talk("q").messages) == Prompt(sample.input_ids[:7], (0, 4, 5, 7, 7))
    assert marked.prompt_ids(talk("q").messages) == sample.input_ids[:7]


def test_nothing_is_merged_across_a_slot() -> None:
    tokenizer = byte_tokenizer()  # merges ":\n" and "\na"
    assert len(tokenizer(":\na")["input_ids"]) == 2
    renderer = Renderer(tokenizer, chat_template="{{ ':" + SOFT + "\n" + SOFT + "a' }}")
    assert renderer.prompt(talk("q").messages) == Prompt([tokenizer.convert_tokens_to_ids(t) for t in ":Ċa"], (1, 2))


@pytest.mark.parametrize("head", ["", "{{ bos_token }}"])
def test_a_slot_at_the_head_follows_bos_and_changes_no_ids(head: str) -> None:
    for tokenizer in (byte_tokenizer(adds_bos=True), space_tokenizer()):
        plain = Renderer(tokenizer, chat_template=head + template()).sample(talk("ab", "c"))
        marked = Renderer(tokenizer, chat_template=head + SOFT + template()).sample(talk("ab", "c"))
        assert marked.slots == (1,)
        assert (marked.input_ids, marked.weights, marked.answer) == (plain.input_ids, plain.weights, plain.answer)


def test_only_the_template_makes_slots() -> None:
    tokenizer = byte_tokenizer("<|im_end|>", template=CHATML)
    typed = (Message("system", SOFT), Message("user", f"a{SOFT}b"), Message("assistant", SOFT))
    sample = Renderer(tokenizer).sample(Conversation(typed, "d:1"))
    assert sample.slots == ()
    assert tokenizer.decode(sample.input_ids).count(SOFT) == 3
    assert Renderer(tokenizer).sample(PlainText(SOFT, "t:1")).slots == ()
    kept = Renderer(tokenizer, chat_template="{{ system }}" + CHATML, template_kwargs={"system": f"x{SOFT}"})
    assert kept.prompt(typed[:2]).slots == (1,)  # settings are the user's own, like the template


def test_a_slot_inside_an_answer_is_refused() -> None:
    tokenizer = byte_tokenizer()
    only_in_training = template(answer=SOFT).replace(f"{{{{ ':{SOFT}' }}}}", "{{ ':' }}")
    inside = template().replace("m.content + eos_token", f"m.content + '{SOFT}' + eos_token")
    for wrong in (only_in_training, inside):
        with pytest.raises(UserError, match=r"d\.json:7: the chat template puts .* inside the answer of turn 2 of 2"):
            Renderer(tokenizer, chat_template=wrong).sample(talk("q", "a"))


@pytest.mark.parametrize("eos", [True, False])
def test_slots_after_an_answer_stand_behind_its_end(eos: bool) -> None:
    tokenizer = byte_tokenizer()
    renderer = Renderer(tokenizer, chat_template=template(end=SOFT, eos=eos))
    sample = renderer.sample(talk("q", "a", "r", "b"))
    first, second = (index for index, token in enumerate(sample.input_ids) if token == tokenizer.eos_token_id)
    assert sample.slots == (first + 1, second + 1)
    assert sample.weights[first] == sample.weights[second] == 1.0
    assert sample.answer == second - 1


def test_truncation_keeps_what_stands_before_a_token() -> None:
    marked = template(SOFT, SOFT, SOFT, SOFT)
    whole = Renderer(byte_tokenizer(), chat_template=marked).sample(talk("q", "a", "r", "b"))
    assert whole.answer == whole.slots[-2]
    for limit in range(9, len(whole.input_ids) + 1):
        renderer = Renderer(byte_tokenizer(), chat_template=marked, max_length=limit, truncate=True)
        cut = renderer.sample(talk("q", "a", "r", "b"))
        assert cut.slots == tuple(slot for slot in whole.slots if slot < limit)
        assert cut.answer == (whole.answer if limit > whole.answer else 7)
        assert cut.weights[cut.answer] == 1.0


def test_where_there_is_no_answer() -> None:
    tokenizer = byte_tokenizer()
    assert Renderer(tokenizer).sample(PlainText("ab", "t:1")).answer is None
    everything = Renderer(tokenizer, train_on="all", chat_template=template(SOFT))
    off = Conversation((Message("user", "q"), Message("assistant", "a", False)), "d:1")
    assert everything.sample(off).answer is None
    assert everything.sample(talk("q", "a")).answer == 7
    at_the_end = Renderer(tokenizer, train_on="all", chat_template="{{ 'ab" + SOFT + "' }}")
    assert at_the_end.sample(Conversation((Message("user", "q"),), "d:1")).slots == ()


MARKS = st.sampled_from(["", "", SOFT, SOFT * 2, f"x{SOFT} ", f"\\n{SOFT}a"])
TEXT = st.lists(st.sampled_from([*"ab \n:", "</s>", SOFT, SOFT[:4], "好"]), max_size=5).map("".join)
TOKENIZERS = {"bytes": byte_tokenizer(), "bos": byte_tokenizer(adds_bos=True), "spaces": space_tokenizer()}


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(sorted(TOKENIZERS)),
    marks=st.fixed_dictionaries({"head": MARKS, "user": MARKS, "answer": MARKS, "end": MARKS}),
    rounds=st.lists(st.tuples(TEXT, TEXT.map(lambda text: text + "a")), min_size=1, max_size=3),
    train_on=st.sampled_from(["answers", "last_answer", "all"]),
)
def test_property_training_and_generation_see_the_same_slots(
    name: str, marks: dict[str, str], rounds: list[tuple[str, str]], train_on: Any
) -> None:
    renderer = Renderer(TOKENIZERS[name], train_on=train_on, chat_template=template(**marks))
    conversation = talk(*(text for pair in rounds for text in pair))
    sample = renderer.sample(conversation)
    prompt = renderer.prompt(conversation.messages[:-1])
    assert sample.answer == len(prompt.ids)
    assert sample.input_ids[: sample.answer] == prompt.ids
    assert tuple(slot for slot in sample.slots if slot <= sample.answer) == prompt.slots
    assert all(left <= right for left, right in pairwise(sample.slots))
    assert all(slot < len(sample.input_ids) for slot in sample.slots)
    counts = {key: text.count(SOFT) for key, text in marks.items()}
    turns = len(rounds)
    assert (
        len(prompt.slots)
        == counts["head"] + turns * (2 * counts["user"] + counts["answer"] + counts["end"]) - (counts["end"])
    )
    if name != "spaces":
        text = TOKENIZERS[name].decode(prompt.ids).removeprefix("<s>")
        assert text == renderer.turns._render(  # the marker itself leaves nothing behind
            [{"role": m.role, "content": m.content.replace(SOFT, "\ufdd5")} for m in conversation.messages[:-1]],
            [], True, "d",
        ).replace(SOFT, "").replace("\ufdd5", SOFT)  # fmt: skip
