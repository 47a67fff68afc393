"""The question of a record is what training reads before the last answer, or the prompt that stands alone."""

from __future__ import annotations

from typing import Any

import pytest

from weft.data import FORMATS, Conversation, Record, Renderer
from weft.data.formats.questions import question_of
from weft.data.queries import Query, QueryRecipe, reading_of, settings_of
from weft.errors import UserError
from weft.models.load import load_tokenizer


def said(fields: dict[str, Any], **how: Any) -> list[tuple[str, str]]:
    found = question_of(Record(fields, "f:1"), **how)
    assert isinstance(found, Conversation)
    return [(message.role, message.content) for message in found.messages]


USER, ANSWER = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}


@pytest.mark.parametrize(
    "fields",
    [
        {"prompt": "q"},
        {"text": "q"},
        {"text": "q", "label": "1"},
        {"question": "q", "answer": ""},
        {"prompt": "q", "text": "other"},
        {"messages": [USER]},
        {"messages": [USER, ANSWER]},
        {"prompt": [USER], "completion": [ANSWER]},
        {"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]},
        {"prompt": "q", "chosen": "a", "rejected": "b"},
        {"prompt": "q", "completion": "a", "label": True},
        {"instruction": "q", "output": ["a", "b"]},
        {"问题": "q"},
    ],
)
def test_a_question_of_any_kind(fields: dict[str, Any]) -> None:
    assert said(fields) == [("user", "q")]


def test_all_before_the_last_answer_counts() -> None:
    turns = [USER, ANSWER, {"role": "user", "content": "more"}, ANSWER]
    assert said({"system": "s", "messages": turns}) == [
        ("system", "s"), ("user", "q"), ("assistant", "a"), ("user", "more")
    ]  # fmt: skip
    assert said({"instruction": "i", "context": "c", "response": "r"}) == [("user", "i\nc")]
    assert said({"instruction": "i", "context": "c"}) == [("user", "i\nc")]
    assert said({"prompt": "q", "history": [["1", "2"]]}) == [("user", "1"), ("assistant", "2"), ("user", "q")]


def test_every_format_of_training_has_a_question() -> None:
    for name, entry in FORMATS.items():
        if entry.purpose == "classification":  # whose texts are not asked but classified
            continue
        assert question_of(Record(dict(entry.example), "f:1")) is not None, name


def test_columns_of_training() -> None:
    columns = {"prompt": "{t}: {q}", "completion": "a", "system": "=be brief"}
    asked = [("system", "be brief"), ("user", "T: Q")]
    assert said({"t": "T", "q": "Q", "a": "A"}, columns=columns) == asked
    assert said({"t": "T", "q": "Q"}, columns=columns) == asked
    assert said({"question": "other"}, columns={"prompt": "q"}) == [("user", "other")]
    with pytest.raises(UserError, match="no field 't'"):
        said({"q": "Q", "a": "A"}, columns=columns)


def test_a_file_is_read_as_the_one_of_its_name() -> None:
    data = [{"path": "a.jsonl", "columns": {"prompt": "x"}}, {"path": "b.jsonl", "format": "alpaca"}]
    settings = settings_of({"data": data, "eval_data": "c.jsonl", "data_format": "messages", "of_tomorrow": 1})
    read = {name: reading_of(f"/else/{name}.jsonl", settings) for name in "abcd"}
    assert read["a"].columns == {"prompt": "x"}
    assert [read[name].data_format for name in "abcd"] == ["messages", "alpaca", "messages", "messages"]
    alike = settings_of({"data": [{"path": "a.jsonl", "format": "alpaca"}]})
    assert reading_of("d.jsonl", alike).data_format == "alpaca"
    with pytest.raises(UserError, match="settings of data: columns"):
        settings_of({"columns": 5})


def test_tokens_and_segments_are_asked_up_to_the_last_answer() -> None:
    renderer = Renderer(load_tokenizer("tiny-llama"))
    recipe = QueryRecipe(renderer=renderer, settings=settings_of({}))
    pieces = [("1+1?", False), ("2", True), (" And 2+2?", False), ("4", True)]
    record = Record({"segments": [{"text": text, "label": label} for text, label in pieces]}, "f:1")
    tokens = Record({"input_ids": [5, 6, 7, 8, 9], "labels": [-100, 6, -100, 8, 9]}, "f:2")
    written, given = (one for one in recipe.make([record, tokens]) if isinstance(one, Query))
    assert str(renderer.tokenizer.decode(written.prompt.input_ids)).endswith("1+1?2 And 2+2?")
    assert given.prompt.input_ids[-3:] == [5, 6, 7]
