"""Turns: marks and weights; what is in a turn and not read; round trips; nothing but UserError, whatever comes."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from weft.data import FORMATS, Conversation, Message, Record, describe, format_of, to_example
from weft.data.formats.registry import SPELLINGS, UNREAD
from weft.errors import UserError


def answer(**marks: Any) -> Message:
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a", **marks}]
    example = to_example(Record({"messages": turns}, "d:1"))
    assert isinstance(example, Conversation)
    return example.messages[1]


@pytest.mark.parametrize(
    ("marks", "train", "weight"),
    [
        ({}, None, 1.0),
        ({"weight": None}, None, 1.0),
        ({"weight": 0}, False, 1.0),
        ({"weight": 1}, True, 1.0),
        ({"weight": 0.25}, True, 0.25),
        ({"weight": 2}, True, 2.0),
        ({"loss_scale": 0.5}, True, 0.5),
        ({"loss_scale": 0.0}, False, 1.0),
        ({"loss": True, "loss_scale": 0.5}, True, 0.5),
        ({"loss": False, "weight": 0}, False, 1.0),
        ({"training": False}, False, 1.0),
    ],
)
def test_weights(marks: dict[str, Any], train: bool | None, weight: float) -> None:
    message = answer(**marks)
    assert (message.train, message.loss_weight) == (train, weight)


@pytest.mark.parametrize(
    ("marks", "part"),
    [
        ({"weight": -1}, "'weight' must be a number, 0 or more"),
        ({"weight": float("nan")}, "'weight' must be a number"),
        ({"loss_scale": float("inf")}, "'loss_scale' must be a number"),
        ({"weight": 10**400}, "'weight' must be a number"),
        ({"weight": "1"}, "'weight' must be a number"),
        ({"train": 0.5}, "'train' must be true or false"),
        ({"loss": []}, "'loss' must be true or false"),
        ({"weight": 0.5, "loss_scale": 0.25}, "contradict"),
        ({"loss": False, "loss_scale": 0.5}, "contradict"),
        ({"train_detail": [{"begin_offset": 0}]}, "'train_detail' is not read"),
        ({"reasoning_content": "hm"}, "'reasoning_content' is not read"),
        ({"content": [{"type": "image_url"}]}, "'content' must be a string"),
        ({"tool_calls": [{"name": "f", "arguments": "[" * 100_000}]}, "nested too deeply"),
        ({"tool_calls": [{"name": "f", "arguments": "NaN"}]}, "NaN"),
    ],
)
def test_what_is_wrong_with_a_turn(marks: dict[str, Any], part: str) -> None:
    with pytest.raises(UserError) as error:
        answer(**marks)
    assert part in str(error.value)
    assert "d:1: turn 2 of 'messages'" in str(error.value)


def test_fields_in_a_turn_that_say_nothing() -> None:
    assert answer(name="bob", reasoning_content="", train_detail=None, refusal=None) == Message("assistant", "a")


# ----------------------------------------------------------------------------------------------------------- properties

TEXT = st.text(st.characters(exclude_categories=("Cs",)), max_size=12)
ARGUMENTS = st.dictionaries(TEXT, st.integers() | TEXT | st.booleans() | st.none(), max_size=3)
CALL = st.builds(
    lambda name, arguments: {"type": "function", "function": {"name": name, "arguments": arguments}}, TEXT, ARGUMENTS
)


@st.composite
def messages(draw: st.DrawFn) -> Message:
    role = draw(st.sampled_from(["user", "assistant", "tool"]))
    content = draw(TEXT.filter(str.strip))
    if role != "assistant":
        return Message(role, content)
    train = draw(st.sampled_from([None, True, False]))
    weight = draw(st.floats(min_value=0, exclude_min=True, allow_infinity=False)) if train else 1.0
    return Message(role, content, train, tool_calls=tuple(draw(st.lists(CALL, max_size=2))), loss_weight=weight)


def as_openai(message: Message) -> dict[str, Any]:
    turn: dict[str, Any] = {"role": message.role, "content": message.content}
    if message.train is not None:
        turn["train"] = message.train
    if message.loss_weight != 1.0:
        turn["weight"] = message.loss_weight
    if message.tool_calls:
        calls = [{**call, "function": {**call["function"]}} for call in message.tool_calls]
        for call in calls:
            call["function"]["arguments"] = json.dumps(call["function"]["arguments"])
        turn["tool_calls"] = calls
    return turn


@settings(max_examples=200, deadline=None)
@given(st.lists(messages(), max_size=5), TEXT.filter(str.strip))
def test_conversations_round_trip(turns: list[Message], system: str) -> None:
    turns = [Message("system", system), *turns, Message("assistant", "a")]
    example = to_example(Record({"messages": json.loads(json.dumps([as_openai(turn) for turn in turns]))}, "d:1"))
    assert example == Conversation(tuple(turns), "d:1")
    shown = describe(example)
    assert all(f"{turn.role}" in shown for turn in turns)


_OURS = {name for entry in FORMATS.values() for name in entry.names()}
_NAMES = sorted({*_OURS, *UNREAD, *SPELLINGS, "Text", "x"})
_KEYS = (
    "role", "content", "from", "value", "human", "assistant", "input", "output", "text", "label", "train", "weight",
    "loss_scale", "tool_calls", "name", "arguments", "function", "type", "system",
)  # fmt: skip
_LEAF = (
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT
    | st.sampled_from(["user", "assistant", "gpt", "human", "function_call", "[", "{}", "[1]", "text", "\n\nHuman: q"])
    | st.sampled_from([0, 1, -100, 10**400])
)  # fmt: skip
_VALUE = st.recursive(
    _LEAF, lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.sampled_from(_KEYS), inner, max_size=5),
    max_leaves=12,
)  # fmt: skip


@pytest.mark.long
@settings(max_examples=300)
@given(
    st.sampled_from([()] + [shape for entry in FORMATS.values() for shape in entry.shapes]),
    st.lists(st.sampled_from(_NAMES), max_size=4),
    st.data(),
)
def test_any_record_is_read_or_refused(shape: tuple[str, ...], more: list[str], data: st.DataObject) -> None:
    record = Record({name: data.draw(_VALUE) for name in dict.fromkeys((*shape, *more))}, "d.json:7")
    format = data.draw(st.none() | st.sampled_from(sorted(FORMATS)))
    refusal = None
    try:
        example = to_example(record, format=format, purpose="any")
    except UserError as error:
        refusal = str(error)
    if refusal is not None:
        assert refusal.startswith("d.json:7: ")
        assert len(refusal) < 4000
    else:
        assert example.source == "d.json:7"
        assert describe(example, limit=50)
        assert format_of(record, format=format) in FORMATS


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(st.sampled_from(_NAMES), st.text("{}=.ab0", max_size=8), min_size=1, max_size=3), _VALUE)
def test_any_columns_are_read_or_refused(columns: dict[str, str], value: Any) -> None:
    with contextlib.suppress(UserError):
        to_example(Record({"a": value, "b": "x", "0": {"a": [value]}}, "d.json:7"), columns=columns, purpose="any")


def test_deeply_nested_values_are_refused() -> None:
    deep: Any = []
    for _ in range(5000):
        deep = [deep]
    for name in ("text", "messages", "input_ids", "segments"):
        with pytest.raises(UserError):
            to_example(Record({name: deep, "labels": deep}, "d:1"))


def test_a_preview_does_not_obey_the_data() -> None:
    shown = describe(to_example(Record({"text": "a\x1b[2Jb\r\nc\x9b"}, "d:1")))
    assert shown == "PlainText from d:1\ntext: a\\x1b[2Jb\\x0d\n  c\\x9b"
    assert describe(to_example(Record({"text": "x" * 2000}, "d:1")), limit=3).endswith("text: xxx… (2,000 characters)")


def test_describe_shows_roles_marks_calls_and_tools() -> None:
    call = {"name": "f", "arguments": {"x": "é"}}
    turns = [
        {"role": "user", "content": "q"},
        {"role": "assistant", "content": "", "tool_calls": [call], "weight": 0.5},
        {"role": "tool", "content": "r"},
        {"role": "assistant", "content": "a", "loss": False},
    ]
    tools = [{"type": "function", "function": {"name": "f"}}, {"name": "g"}]
    assert describe(to_example(Record({"messages": turns, "tools": tools}, "d:1"))).splitlines() == [
        "Conversation from d:1",
        "user: q",
        'assistant (learned, weight 0.5) calls: f {"x": "é"}',
        "tool: r",
        "assistant (not learned): a",
        "tools: f, g",
    ]
