"""Records to conversations: each format, and what is wrong with records that fit none."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from weft.data import Conversation, EmptyAnswerError, Message, PlainText, Record, read_records, to_example
from weft.errors import UserError

S, U, A, T = "system", "user", "assistant", "tool"


def read(fields: dict[str, Any], **options: Any) -> Conversation | PlainText:
    return to_example(Record(fields, "d.json:7"), **options)


def turns(fields: dict[str, Any], **options: Any) -> list[tuple[str, str]]:
    example = read(fields, **options)
    assert isinstance(example, Conversation)
    assert example.source == "d.json:7"
    return [(message.role, message.content) for message in example.messages]


def message(role: str, content: str, **more: Any) -> dict[str, Any]:
    return {"role": role, "content": content, **more}


def test_alpaca() -> None:
    assert turns({"instruction": "i", "input": "", "output": "o"}) == [(U, "i"), (A, "o")]
    full = {"instruction": "i", "input": "x", "output": "o", "system": "s", "history": [["q", "a"]], "text": "rendered"}
    assert turns(full) == [(S, "s"), (U, "q"), (A, "a"), (U, "i\nx"), (A, "o")]
    assert turns({"instruction": "i", "output": "o", "input": None, "history": None, "system": None}) == [
        (U, "i"),
        (A, "o"),
    ]


def test_sharegpt_with_tools() -> None:
    schema = {"name": "f", "parameters": {}}
    rows = [
        ("human", "h"),
        ("function_call", '{"name": "f", "arguments": {"x": 1}}'),
        ("observation", "r"),
        ("gpt", "g"),
    ]
    fields = {
        "conversations": [{"from": who, "value": what} for who, what in rows],
        "system": "s",
        "tools": json.dumps([schema]),
    }
    example = read(fields)
    assert isinstance(example, Conversation)
    assert turns(fields) == [(S, "s"), (U, "h"), (A, ""), (T, "r"), (A, "g")]
    assert example.tools == (schema,)
    assert example.messages[2].tool_calls == ({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},)


def test_messages_with_train_marks() -> None:
    rows = [
        message(U, "q"),
        message(A, "a", loss=False),
        message(U, "r"),
        message(A, "b", train=True),
        message(A, "c", weight=0),
    ]
    example = read({"messages": rows})
    assert isinstance(example, Conversation)
    assert [item.train for item in example.messages] == [None, False, None, True, False]


def test_openai_tool_calls() -> None:
    call = {"id": "1", "type": "function", "function": {"name": "f", "arguments": '{"x": 1}'}}
    example = read({"messages": [message(U, "q"), {"role": A, "content": None, "tool_calls": [call]}, message(T, "r")]})
    assert isinstance(example, Conversation)
    assert example.messages[1] == Message(
        A, "", None, tool_calls=({"type": "function", "function": {"name": "f", "arguments": {"x": 1}}},)
    )


def test_prompt_completion() -> None:
    assert turns({"prompt": "p", "completion": "c"}) == [(U, "p"), (A, "c")]
    fields = {"prompt": [message(U, "p"), message(A, "shot"), message(U, "q")], "completion": [message(A, "c")]}
    example = read(fields)
    assert isinstance(example, Conversation)
    assert turns(fields) == [(U, "p"), (A, "shot"), (U, "q"), (A, "c")]
    assert [item.train for item in example.messages] == [None, False, None, None]


def test_question_answer_and_text() -> None:
    assert turns({"question": "q", "answer": "a"}) == [(U, "q"), (A, "a")]
    assert read({"text": "t", "meta": 1}) == PlainText("t", "d.json:7")


def test_columns_and_explicit_format() -> None:
    fields = {"question": "q", "answer": "a", "text": "t"}
    assert turns(fields, columns={"prompt": "question", "completion": "answer"}) == [(U, "q"), (A, "a")]
    assert turns(
        {"instruction": "i", "context": "x", "response": "o"}, columns={"input": "context", "output": "response"}
    ) == [
        (U, "i\nx"),
        (A, "o"),
    ]
    assert turns({"prompt": "a", "completion": "q"}, columns={"prompt": "completion", "completion": "prompt"})[0] == (
        U,
        "q",
    )
    assert read(fields, format="text") == PlainText("t", "d.json:7")
    assert turns(fields, format="gsm8k") == [(U, "q"), (A, "a")]


@pytest.mark.parametrize(
    ("fields", "options", "parts"),
    [
        (
            {"instruction": "i", "outptu": "o"},
            {},
            ["'instruction', 'outptu'", "lacks 'output'", "Did you mean 'outptu'?"],
        ),
        ({"foo": 1}, {}, ["no known format", "'foo'", "alpaca (instruction, output", "text (text)", "columns"]),
        ({}, {}, ["Fields found: none"]),
        ({"mesages": []}, {}, ["'mesages' is no field of a format. Did you mean 'messages'?"]),
        ({"text": 3}, {}, ["'text' must be a string", "int 3"]),
        ({"text": " "}, {}, ["'text' is empty"]),
        ({"instruction": "i", "output": 3}, {}, ["'output' must be a string", "int 3"]),
        ({"instruction": "i", "output": "o", "history": ["q", "a"]}, {}, ["entry 1 of 'history'", "pair"]),
        ({"instruction": " ", "output": "o"}, {}, ["'instruction' is empty"]),
        ({"prompt": "p", "completion": [message(A, "c")]}, {}, ["both be strings"]),
        ({"prompt": [message(U, "p")], "completion": [message(U, "c")]}, {}, ["'completion' holds no assistant"]),
        ({"messages": "hi"}, {}, ["'messages' must be a list"]),
        ({"messages": []}, {}, ["no assistant turn"]),
        ({"messages": [message(U, "q")]}, {}, ["no assistant turn"]),
        ({"messages": [message(U, "q"), "a"]}, {}, ["turn 2", "object"]),
        ({"messages": [{"rol": U, "content": "q"}]}, {}, ["turn 1", "no 'role'", "Did you mean 'rol'?"]),
        ({"messages": [{"role": U, "contents": "q"}]}, {}, ["turn 1", "no 'content'", "Did you mean 'contents'?"]),
        ({"messages": [message("asistant", "q")]}, {}, ["unknown role 'asistant'", "Did you mean 'assistant'?"]),
        ({"messages": [message(U, [{"type": "image"}])]}, {}, ["'content' must be a string"]),  # type: ignore[arg-type]
        ({"messages": [message(U, "q"), message(A, "a", loss="yes")]}, {}, ["turn 2", "'loss' must be true or false"]),
        ({"messages": [message(A, "a", loss=True, train=False)]}, {}, ["contradict"]),
        ({"messages": [message(A, "a", loss_scale=-0.5)]}, {}, ["'loss_scale' must be a number, 0 or more"]),
        ({"messages": [message(S, "s"), message(A, "a")], "system": "z"}, {}, ["system", "differ"]),
        ({"conversations": [{"from": "function_call", "value": "f(x)"}]}, {}, ["function call", "JSON"]),
        ({"conversations": [{"from": "gpt", "value": "g"}], "tools": "{"}, {}, ["'tools'", "not JSON"]),
        ({"conversations": [], "chosen": {}, "rejected": {}}, {}, ["preference pair"]),
        ({"messages": [message(A, "a")], "label": True}, {}, ["'label'", "good or bad"]),
        ({"question": "q"}, {"format": "gsm8k"}, ["'question_answer' needs the field 'answer'"]),
        ({"text": "q"}, {"format": "sharegtp"}, ["'sharegtp' is unknown", "Did you mean 'sharegpt'?"]),
        ({"text": "q"}, {"columns": {"txt": "text"}}, ["'txt'", "Did you mean 'text'?"]),
        ({"reply": "q"}, {"columns": {"text": "replay"}}, ["no field 'replay'", "Did you mean 'reply'?"]),
    ],
)
def test_errors(fields: dict[str, Any], options: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        read(fields, **options)
    for part in parts:
        assert part in str(error.value)
    if "is a field of no format" not in str(error.value) and "is unknown." not in str(error.value):
        assert "d.json:7" in str(error.value)


@pytest.mark.parametrize(
    ("fields", "parts", "never"),
    [
        # A question without an answer: nothing is offered as its answer.
        ({"instruction": "q", "input": "x"}, ["closest is 'alpaca', which lacks 'output'", "add it to"], "columns"),
        ({"指令": "q", "输入": "x"}, ["closest is 'alpaca', which lacks 'output'", "add it to"], "columns"),
        ({"instruction": "q", "inputs": "x"}, ["lacks 'output'", "add it to the records"], "columns"),
        ({"question": "q", "context": "c"}, ["lacks 'answer'", "add it to the records"], "columns"),
        ({"prompt": "q", "system": "s"}, ["'prompt_completion', which lacks 'completion'", "add it to"], "columns"),
        ({"query": "q"}, ["'question_answer', which lacks", "add it to the records"], "columns"),
        ({"user_input": "q", "chat_history": "h"}, ["no known format", "add it to the records"], "columns"),
        ({"question_text": "q", "id": "7", "context": "c"}, ["no known format"], "completion: context"),
        # The field that is meant is named, and the format that shares most fields.
        ({"instruction": "q", "input": "x", "result": "a"}, ["`columns: {output: result}`"], "prompt:"),
        ({"instruction": "q", "input": "x", "outptu": "a"}, ["Did you mean 'outptu'?", "{output: outptu}"], "prompt:"),
        ({"frage": "q", "answer": "a"}, ["lacks 'question'", "`columns: {question: frage}`"], "completion"),
        ({"context": "c", "instruction": "q", "reply": "a"}, ["'dolly', which lacks 'response'"], "completion"),
        ({"chosen": "a", "prompt": "q"}, ["'preference', which lacks 'rejected'"], "rejected: prompt"),
        ({"title": "q", "body": "a"}, ["{prompt: title, completion: body}"], "completion: title"),
    ],
)
def test_advice_teaches_no_question(fields: dict[str, Any], parts: list[str], never: str) -> None:
    with pytest.raises(UserError) as error:
        read(fields)
    said = str(error.value).split("Known formats:")[0]
    for part in parts:
        assert part in said
    assert never not in said


def test_a_named_format_offers_no_question_as_an_answer() -> None:
    with pytest.raises(UserError, match="needs the field 'output'") as error:
        read({"instruction": "q", "input": "x"}, format="alpaca")
    assert "Did you mean" not in str(error.value)


def test_a_record_is_shown_short() -> None:
    with pytest.raises(UserError) as error:
        read({f"field {number} {'long ' * 50}": "text " * 5000 for number in range(500)})
    assert len(str(error.value)) < 2500
    assert "and 488 more" in str(error.value)


@pytest.mark.parametrize("value", [4, 3.14, True])
@pytest.mark.parametrize("name", ["output", "输出"])
def test_numbers_are_read_as_text_if_the_user_says_so(value: object, name: str) -> None:
    fields = {"instruction": "q", name: value}
    with pytest.raises(UserError, match="must be a string") as error:
        read(fields)
    assert f'`columns: {{output: "{{{name}}}"}}`' in str(error.value)
    assert turns(fields, columns={"output": f"{{{name}}}"})[1] == (A, str(value) if value is not True else "true")


@pytest.mark.parametrize(
    "fields",
    [
        {"instruction": "i", "output": " \n"},
        {"question": "q", "answer": ""},
        {"messages": [message(U, "q"), message(A, ""), message(U, "q"), message(A, "a")]},
    ],
)
def test_empty_answers(fields: dict[str, Any]) -> None:
    with pytest.raises(EmptyAnswerError, match=r"d\.json:7: the answer \(turn 2 of \d\) is empty"):
        read(fields)


def test_empty_answer_that_is_not_trained_is_allowed() -> None:
    rows = [message(U, "q"), message(A, "", loss=False), message(U, "q"), message(A, "a")]
    assert turns({"messages": rows})[1] == (A, "")


def test_real_records(shared: Path) -> None:
    seen: dict[str, int] = {}
    empty: list[str] = []
    for path in sorted((shared / "sft").iterdir()):
        for record in read_records(path, limit=300):
            try:
                example = to_example(record)
            except EmptyAnswerError:
                empty.append(record.source.rsplit("/", 1)[1])
                continue
            assert isinstance(example, Conversation)
            assert example.messages[-1].role == A
            seen[path.stem] = max(seen.get(path.stem, 0), len(example.messages))
    assert empty == ["alpaca_en.json:1422"]
    assert seen["alpaca_en"] == 2
    assert seen["oasst_zh"] > 2
    assert seen["toolcall_en_sharegpt"] > 4


def test_real_preference_data_is_refused(shared: Path) -> None:
    for name in ("dpo_en.json", "kto_en.json", "oasst_zh.json"):
        with pytest.raises(UserError, match=f"{name}:2: "):
            to_example(read_records(shared / "preference" / name, limit=1)[0])
