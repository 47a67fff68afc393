"""Names of the user's own: renaming, paths, templates, constants; other spellings; what is ambiguous or unread."""

from __future__ import annotations

from typing import Any

import pytest

from weft.data import Conversation, PlainText, Record, format_of, to_example
from weft.errors import UserError


def said(fields: dict[str, Any], columns: dict[str, str] | None = None, **options: Any) -> list[str]:
    example = to_example(Record(fields, "d.json:7"), columns=columns, **options)
    assert isinstance(example, Conversation)
    return [message.content for message in example.messages]


NESTED = {"data": {"question": "q", "answers": ["x", "y"], "n": 3, "none": None}, "a.b": "dot", "{c}": "brace"}


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("data.question", "q"),
        ("data.answers.1", "y"),
        ("a.b", "dot"),
        ("{c}", "brace"),
        ("Q: {data.question}!", "Q: q!"),
        ("{data.question}\n{data.answers}", "q\nx\ny"),
        ("{data.n}{{}}", "3{}"),
        ("=Say it.", "Say it."),
    ],
)
def test_columns(prompt: str, expected: str) -> None:
    assert said(NESTED, {"prompt": prompt, "completion": "data.answers.0"}) == [expected, "x"]


@pytest.mark.parametrize(
    ("prompt", "part"),
    [
        ("data.questoin", "no field 'questoin' in 'data'. Did you mean 'question'?"),
        ("data.answers.2", "no field '2' in 'data.answers'"),
        ("data.answers.x", "no field 'x' in 'data.answers'"),
        ("data.answers.-1", "no field '-1'"),
        ("{dat.question}", "no field 'dat'. Did you mean 'data'?"),
        ("{data}", "'data' must hold text, a number or a list of them, found dict"),
        ("{data.none}", "'data.none' must hold text"),
        ("{data.question", "single '{'"),
        ("data.none", "d.json:7"),
        ("", "no field ''"),
    ],
)
def test_columns_that_cannot_be_made(prompt: str, part: str) -> None:
    with pytest.raises(UserError) as error:
        said(NESTED, {"prompt": prompt, "completion": "data.answers.0"})
    assert part in str(error.value)


def test_a_constant_system_text() -> None:
    assert said({"question": "q", "answer": "a"}, {"system": "=Be brief."}) == ["Be brief.", "q", "a"]


def test_the_mapped_fields_choose_the_format() -> None:
    fields = {"instruction": "i", "output": "o", "q1": "q", "a1": "a"}
    assert said(fields, {"prompt": "q1", "completion": "a1"}) == ["q", "a"]
    assert said({"question": "q", "answer": "a", "response": "r"}, {"answer": "response"}) == ["q", "r"]
    article = Record({"title": "t", "content": "c"}, "d:1")
    assert to_example(article, columns={"text": "{title}\n{content}"}) == PlainText("t\nc", "d:1")


def test_errors_name_the_fields_as_they_stand_in_the_data() -> None:
    with pytest.raises(UserError, match=r"'answer' must be a string.*'回答' is read as 'answer'"):
        said({"问题": "q", "回答": 3})
    with pytest.raises(UserError, match=r"'completion' must.*'reply' is read as 'completion'"):
        said({"prompt": "q", "reply": 3}, {"completion": "reply"})


@pytest.mark.parametrize(
    ("fields", "expected"),
    [
        ({"问题": "q", "回答": "a"}, ["q", "a"]),
        ({"问": "q", "答": "a"}, ["q", "a"]),
        ({"指令": "i", "输入": "j", "输出": "o"}, ["i\nj", "o"]),
        ({"内容": "c", "摘要": "s"}, ["c", "s"]),
        ({"Question": "q", " Response ": "a", "Complex_CoT": "?"}, ["q", "a"]),
        ({"query": "q", "response": "a", "history": [["o", "p"]], "system": "s"}, ["s", "o", "p", "q", "a"]),
        ({"kind": "NLI", "input": "q", "target": "a"}, ["q", "a"]),  # Firefly
        ({"instruction": "i", "input": "j", "target": "a"}, ["i\nj", "a"]),
        ({"id": 1, "system_prompt": "s", "question": "q", "response": "a"}, ["s", "q", "a"]),  # OpenOrca
        ({"department": "d", "title": "t", "ask": "q", "answer": "a"}, ["q", "a"]),  # cMedQA
        ({"conversation": [{"human": "q", "assistant": "a"}, {"human": "r", "assistant": "b"}]}, ["q", "a", "r", "b"]),
        ({"conversation": [{"system": "s", "input": "q", "output": "a"}]}, ["s", "q", "a"]),  # XTuner
        ({"conversations": ["q", "a", "r", "b"], "source": "x"}, ["q", "a", "r", "b"]),  # LIMA
        ({"conversations": '[{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]'}, ["q", "a"]),
        ({"conversations": [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]}, ["q", "a"]),
        ({"instruction": "i", "input": "", "output": "o", "prompt": "rendered", "text": "rendered"}, ["i", "o"]),
        ({"instruction": "i", "context": "c", "response": "o", "category": "x"}, ["i\nc", "o"]),  # Dolly
        ({"instruction": "i", "response": "o"}, ["i", "o"]),  # torchtune
        ({"instruction": "i", "input": "j", "response": "o"}, ["i\nj", "o"]),
        ({"messages": [{"role": "user", "content": [{"type": "text", "text": "q"}]},
                       {"role": "assistant", "content": "a"}]}, ["q", "a"]),
    ],
)  # fmt: skip
def test_records_as_data_sets_have_them(fields: dict[str, Any], expected: list[str]) -> None:
    assert said(fields) == expected


@pytest.mark.parametrize(
    ("fields", "parts"),
    [
        ({"question": "q", "answer": "a", "response": "r"},
         ["more than one format", "{prompt: question, completion: answer}"]),
        ({"instruction": "i", "output": "o", "question": "q", "answer": "a"},
         ["more than one", "`data_format: alpaca`"]),
        ({"messages": [], "conversations": []}, ["more than one", "`data_format: messages`"]),
        ({"sentence": "s", "review": "r", "label": "x"}, ["more than one", "`text_columns`"]),
        ({"question": "q", "问题": "q", "answer": "a"}, ["'question' and '问题' could each be 'question'"]),
        ({"question": "q", "context": "c", "answer": "a"},
         ['`columns: {prompt: "{context}\\n{question}", completion: answer}`', "`data_format: question_answer`"]),
        ({"Question": "q", "choices": ["c"], "Answer": "a"},
         ['{prompt: "{Question}\\n{choices}", completion: Answer}']),
        ({"question": "q", "A": "1", "B": "2", "answer": "A"}, ['"{question}\\nA. {A}\\nB. {B}"']),
        ({"instruction": "i", "input": "j", "answer": "a"}, ["'instruction' is not read", '"{instruction}\\n{input}"']),
        ({"messages": [], "images": ["x.png"]}, ["'images' is not read", "text only"]),
        ({"messages": [], "chat_template_kwargs": {"x": 1}}, ["'chat_template_kwargs' is not read"]),
        ({"question": "q", "answer": "a", "rejected": "b"},
         ["'rejected' is not read", "`data_format: question_answer`"]),
        ({"question": "q", "answer": "a", "label": 0}, ["'label' is not read", "KTO"]),
        ({"text": "t", "label": 1}, ["text with the label of its class", "`data_format: text`"]),
        ({"sentence1": "s", "sentence2": "t", "label": "x"}, ["task: sequence_classification"]),
        ({"问诊": "q", "回复内容": "a"}, ["`columns: {prompt: 问诊, completion: 回复内容}`"]),
        ({"user query": "q", "model-answer": "a"}, ['`columns: {prompt: "user query", completion: "model-answer"}`']),
        ({"content": "c"}, ["`columns: {text: content}`"]),
        ({"a long sentence that is really the first row of a table": "x", "0": "1"}, ["lacks a header row"]),
    ],
)  # fmt: skip
def test_refusals_say_what_to_add(fields: dict[str, Any], parts: list[str]) -> None:
    with pytest.raises(UserError) as error:
        said(fields)
    assert str(error.value).startswith("d.json:7: ")
    assert len(str(error.value)) < 1500
    for part in parts:
        assert part in str(error.value)


def test_what_a_refusal_says_to_add_works() -> None:
    fields = {"question": "q", "context": "c", "answer": "a", "choices": ["x", "y"]}
    assert said(fields, {"prompt": "{context}\n{question}\n{choices}", "completion": "answer"}) == ["c\nq\nx\ny", "a"]
    assert said(fields, format="question_answer") == ["q", "a"]
    empty = {**fields, "context": "", "choices": []}
    assert said(empty) == ["q", "a"]


def test_two_spellings_are_told_apart_by_columns() -> None:
    fields = {"question": "q", "问题": "问", "answer": "a"}
    assert said(fields, {"question": "question"}) == ["q", "a"]
    assert said(fields, {"question": "问题"}) == ["问", "a"]


def test_a_column_of_another_format() -> None:
    with pytest.raises(UserError, match=r"d\.json:7: columns: the format 'alpaca' has no field 'messages'"):
        said({"instruction": "i", "output": "o", "m": "x"}, {"messages": "m"}, format="alpaca")


def test_metadata_is_no_class() -> None:
    assert format_of(Record({"text": "t", "category": "news"}, "d:1")) == "text"
    assert format_of(Record({"instruction": "i", "output": "o", "label": "brainstorming"}, "d:1")) == "alpaca"
    assert format_of(Record({"text": "t", "label": None}, "d:1")) == "text"
