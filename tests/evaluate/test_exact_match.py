"""Exact match: questions from files, every adapter's answers beside their own questions, white space aside."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests import kit
from tests.kit.tokenizers import CHATML, byte_tokenizer

from weft.api import Adapters, LoraConfig
from weft.data import Message, Renderer
from weft.errors import UserError
from weft.evaluate.exact_match import Answer, Question, answer_questions, exact_match, fold, read_questions
from weft.generation import Completion, Engine
from weft.models import describe

ROWS: list[dict[str, Any]] = [
    {"instruction": "one?", "output": "two", "task": "count"},
    {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "hi"},
                  {"role": "assistant", "content": "ho"}, {"role": "user", "content": "and?"},
                  {"role": "assistant", "content": "so\nlong"}]},
]  # fmt: skip


def write(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_the_last_answer_is_the_reference(tmp_path: Path) -> None:
    first, second = read_questions(write(tmp_path / "q.jsonl", ROWS))
    assert (first.messages[-1].content, first.reference, first.task) == ("one?", "two", "count")
    assert [m.role for m in second.messages] == ["system", "user", "assistant", "user"]
    assert (second.reference, second.task) == ("so\nlong", "")
    assert second.source.endswith("q.jsonl:2")
    assert len(read_questions(tmp_path / "q.jsonl", limit=1)) == 1


@pytest.mark.parametrize("row", [{"text": "no question"}, {"messages": ROWS[1]["messages"][:2]}])
def test_a_record_without_an_answer_is_refused_by_its_line(row: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"q\.jsonl:2.*answer"):
        read_questions(write(tmp_path / "q.jsonl", [ROWS[0], row]))


def test_white_space_does_not_count_and_everything_else_does() -> None:
    assert fold("  so\n long ") == fold("so long")
    assert fold("So long") != fold("so long") != fold("so long.")


def test_a_share_of_the_answers() -> None:
    question = Question((Message("user", "a"),), "b", "s")
    assert exact_match([Answer(question, "b", True), Answer(question, "c", False)]) == 0.5


def test_each_adapter_answers_each_question(monkeypatch: pytest.MonkeyPatch) -> None:
    """All in one call of the engine; an answer stands beside the question and the adapter that were asked."""
    tokenizer = byte_tokenizer(eos="<|im_end|>", template=CHATML)
    renderer = Renderer(tokenizer)
    adapters = Adapters(model := kit.make_model("llama"), describe(model))
    adapters.add("mine", LoraConfig())
    questions = [Question((Message("user", text),), f"{text} said", f"q:{i}") for i, text in enumerate("xyz")]
    calls: list[Any] = []

    def echo(engine: Engine, requests: Any) -> list[Completion]:
        """The base repeats the question; any adapter also says who it is."""
        calls.append((requests, engine))
        found = []
        for request in requests:
            asked = tokenizer.decode(request.prompt).partition("user\n")[2][0]
            text = f" {asked}  said\n" if request.adapter else asked
            found.append(Completion(tokenizer(text)["input_ids"], text=text))
        return found

    monkeypatch.setattr(Engine, "generate", echo)
    answers = answer_questions(adapters, renderer, questions, [None, "mine"], max_new_tokens=9, batch_size=4)
    ((requests, engine),) = calls
    assert [r.adapter for r in requests] == [None] * 3 + ["mine"] * 3
    assert {r.max_new_tokens for r in requests} == {9}
    assert engine.limits.max_rows == 4
    assert tokenizer.eos_token_id in engine.stop_ids
    assert [a.question for a in answers["mine"]] == [a.question for a in answers[None]] == questions
    assert [a.text for a in answers[None]] == ["x", "y", "z"]
    assert (exact_match(answers[None]), exact_match(answers["mine"])) == (0.0, 1.0)
