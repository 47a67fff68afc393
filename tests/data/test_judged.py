"""Pairs, verdicts, rankings and steps: every way in which data sets write them, and what is wrong with some."""

from __future__ import annotations

from typing import Any

import pytest

from weft.data import EmptyAnswerError, LabelledAnswer, Message, Preference, Ranking, Record, StepLabels, to_example
from weft.errors import UserError


def u(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def a(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def s(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def read(fields: dict[str, Any], **options: Any) -> Any:
    return to_example(Record(fields, "d.json:7"), **{"purpose": "any", **options})


def said(messages: tuple[Message, ...]) -> str:
    return " ".join(f"{message.role[0]}:{message.content}" for message in messages)


TOOL = {"type": "function", "function": {"name": "f"}}
HUMAN = {"from": "human", "value": "q"}
PAIRS: list[tuple[dict[str, Any], str]] = [  # prompt | chosen | rejected
    ({"prompt": "q", "chosen": "x", "rejected": "y"}, "u:q | a:x | a:y"),
    ({"prompt": "q", "chosen": [a("x")], "rejected": [a("y")]}, "u:q | a:x | a:y"),
    ({"prompt": [s("t"), u("q")], "chosen": [a("x")], "rejected": [a("y")]}, "s:t u:q | a:x | a:y"),
    ({"prompt": "q", "chosen": [u("q"), a("x")], "rejected": [u("q"), a("y")], "messages": [u("q"), a("x")]},
     "u:q | a:x | a:y"),  # UltraFeedback
    ({"prompt": "q", "chosen": [s("t"), u("q"), a("x")], "rejected": [s("t"), u("q"), a("y")]}, "s:t u:q | a:x | a:y"),
    ({"prompt": [s("t"), u("q")], "chosen": [u("q"), a("x")], "rejected": [a("y")]}, "s:t u:q | a:x | a:y"),
    ({"chosen": [u("q"), a("x")], "rejected": [u("q"), a("y")]}, "u:q | a:x | a:y"),  # torchtune, TRL's implicit
    ({"chosen": [u("q"), a("o"), u("r"), a("x")], "rejected": [u("q"), a("o"), u("r"), a("y")]},
     "u:q a:o u:r | a:x | a:y"),
    ({"chosen": [u("q"), a("x"), u("r"), a("z")], "rejected": [u("q"), a("y")]}, "u:q | a:x u:r a:z | a:y"),
    ({"chosen": "\n\nHuman: q\n\nAssistant: x", "rejected": "\n\nHuman: q\n\nAssistant: y"}, "u:q | a:x | a:y"),
    ({"conversations": [HUMAN], "chosen": {"from": "gpt", "value": "x"}, "rejected": {"from": "gpt", "value": "y"},
      "system": "t"}, "s:t u:q | a:x | a:y"),  # LLaMA-Factory
    ({"instruction": "i", "input": "j", "chosen": "x", "rejected": "y"}, "u:i\nj | a:x | a:y"),
    ({"question": "q", "system": "t", "chosen": "x", "rejected": "y"}, "s:t u:q | a:x | a:y"),  # orca_dpo_pairs
    ({"input": "q", "chosen": "x", "rejected": "y"}, "u:q | a:x | a:y"),
    ({"prompt": "r", "history": [["q", "o"]], "chosen": "x", "rejected": "y"}, "u:q a:o u:r | a:x | a:y"),
    ({"messages": [u("q"), a("x")], "rejected_response": "y"}, "u:q | a:x | a:y"),  # ms-swift
    ({"messages": [u("q"), a("x")], "rejected_messages": [u("q"), a("y")]}, "u:q | a:x | a:y"),
    ({"query": "q", "response": "x", "rejected_response": "y", "system": "t"}, "s:t u:q | a:x | a:y"),
    ({"question": "q", "response_j": "x", "response_k": "y"}, "u:q | a:x | a:y"),
]  # fmt: skip


@pytest.mark.parametrize(("fields", "expected"), PAIRS)
def test_pairs(fields: dict[str, Any], expected: str) -> None:
    example = read({**fields, "tools": [TOOL]})
    assert isinstance(example, Preference)
    assert " | ".join(map(said, (example.prompt, example.chosen, example.rejected))) == expected
    assert example.source == "d.json:7"
    assert example.tools == (TOOL,)
    with pytest.raises(UserError, match=r"d\.json:7: this is a preference pair .* supervised training does not read"):
        to_example(Record(fields, "d.json:7"))


@pytest.mark.parametrize(
    ("fields", "columns", "expected"),
    [
        ({"chosen": [u("q"), a("x")], "rejected": [u("q"), a("y")]}, {"messages": "chosen"}, "u:q a:x"),
        ({"prompt": "q", "chosen": "x", "rejected": "y"}, {"prompt": "prompt", "completion": "chosen"}, "u:q a:x"),
        ({"question": "q", "response_j": "x", "response_k": "y"}, {"question": "question", "answer": "response_j"},
         "u:q a:x"),
        ({"instruction": "q", "output": ["x", "y"]}, {"output": "output.0"}, "u:q a:x"),
    ],
)  # fmt: skip
def test_the_better_answers_alone_as_the_refusal_says(
    fields: dict[str, Any], columns: dict[str, str], expected: str
) -> None:
    written = "{" + ", ".join(f"{ours}: {theirs}" for ours, theirs in columns.items()) + "}"
    with pytest.raises(UserError, match=f"answers alone: `columns: {written}`"):
        to_example(Record(fields, "d:1"))
    assert said(to_example(Record(fields, "d:1"), columns=columns).messages) == expected  # type: ignore[union-attr]


def test_the_better_answers_of_swift() -> None:
    fields = {"messages": [u("q"), a("x")], "rejected_response": "y"}
    with pytest.raises(UserError, match="`data_format: messages`"):
        to_example(Record(fields, "d:1"))
    assert said(to_example(Record(fields, "d:1"), format="messages").messages) == "u:q a:x"  # type: ignore[union-attr]


@pytest.mark.parametrize(
    ("fields", "part"),
    [
        ({"prompt": "q", "chosen": "x", "rejected": "x"}, "are the same"),
        ({"chosen": "x", "rejected": "y"}, "no prompt in common"),
        ({"chosen": [u("q"), a("x")], "rejected": [u("r"), a("y")]}, "no prompt in common"),
        ({"prompt": "z", "chosen": [u("q"), a("x")], "rejected": [u("q"), a("y")]}, "neither begins with the prompt"),
        ({"chosen": [u("q"), a("x")], "rejected": [u("q"), a("x"), u("r"), a("z")]}, "one is the beginning"),
        ({"chosen": [u("q"), u("x")], "rejected": [u("q"), a("y")]}, "a turn of the user"),
        ({"prompt": "q", "question": "r", "query": "s", "chosen": 3, "rejected": "y"}, "'chosen' must be a list"),
        ({"question": "r", "query": "s", "chosen": "x", "rejected": "y"}, "could each be the prompt"),
        ({"messages": [u("q")], "rejected_response": "y"}, "must end with the good answer"),
        ({"prompt": "q", "completions": ["a", "b"], "labels": [True]}, "for each of the 2 steps, found 1"),
        ({"prompt": "q", "completions": ["a"], "labels": [1]}, "true or false"),
        ({"prompt": "q", "completions": [], "labels": []}, "must list the steps"),
        ({"instruction": "q", "output": ["x"]}, "two different answers"),
        ({"instruction": "q", "output": ["x", 3]}, "answer 2 of 'output' must be a string"),
        ({"prompt": "q", "completion": "x", "kto_tag": "good"}, "'kto_tag' must be true or false"),
        ({"prompt": [s("t")], "completion": [a("x")], "label": True}, "after a user turn"),
    ],
)
def test_what_is_wrong(fields: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError, match=part) as error:
        read(fields)
    assert str(error.value).startswith("d.json:7: ")


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "chosen": "", "rejected": "y"},
        {"prompt": "q", "chosen": "x", "rejected": [a(" ")]},
        {"prompt": "q", "chosen": [], "rejected": "y"},
        {"instruction": "q", "output": ["x", ""]},
    ],
)
def test_empty_answers(fields: dict[str, Any]) -> None:
    with pytest.raises(EmptyAnswerError, match=r"d\.json:7"):
        read(fields)


@pytest.mark.parametrize("label", [True, False])
@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q", "completion": "x"},
        {"prompt": [u("q")], "completion": [a("x")]},
        {"messages": [u("q"), a("x")]},
        {"conversations": [HUMAN, {"from": "gpt", "value": "x"}]},
        {"conversation": [{"human": "q", "assistant": "x"}]},
        {"instruction": "q", "input": "", "output": "x"},
        {"query": "q", "response": "x"},
    ],
)
def test_verdicts(fields: dict[str, Any], label: bool) -> None:
    for mark in ({"label": label}, {"kto_tag": label}, {"label": str(label)}):
        example = read({**fields, **mark}, purpose="kto")
        assert isinstance(example, LabelledAnswer)
        assert (said(example.prompt), said(example.completion), example.label) == ("u:q", "a:x", label)
        with pytest.raises(UserError, match="marks as good or bad"):
            to_example(Record({**fields, **mark}, "d:1"))


def test_a_verdict_is_on_what_follows_the_last_user_turn() -> None:
    turns = [u("q"), a("o"), u("r"), a("x")]
    example = read({"messages": turns, "label": True})
    assert (said(example.prompt), said(example.completion)) == ("u:q a:o u:r", "a:x")


def test_a_bad_answer_is_not_taught_even_if_its_format_is_named() -> None:
    record = Record({"messages": [u("q"), a("x")], "label": False}, "d:1")
    with pytest.raises(UserError, match="marks this answer as bad"):
        to_example(record, format="messages")
    to_example(Record({**record.fields, "label": True}, "d:1"), format="messages")


def test_ranked() -> None:
    example = read({"instruction": "i", "input": "j", "output": ["x", "y", "y"], "history": [["q", "o"]]})
    assert isinstance(example, Ranking)
    assert said(example.prompt) == "u:q a:o u:i\nj"
    assert [answer.content for answer in example.answers] == ["x", "y", "y"]
    pairs = example.pairs()
    assert [(said(pair.chosen), said(pair.rejected)) for pair in pairs] == [("a:x", "a:y"), ("a:x", "a:y")]
    assert to_example(Record({"instruction": "i", "output": ["x", "y"]}, "d:1"), purpose="preference").source == "d:1"


def test_steps() -> None:
    example = read({"prompt": "q", "completions": ["a", "b"], "labels": [True, False]})
    assert example == StepLabels((Message("user", "q"),), ("a", "b"), (True, False), "d.json:7")
