"""Exact match: greedy answers to held-out questions, compared with the reference after folding white space."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.core.adapters import Adapters
from weft.data import Conversation, Message, Record, Renderer, to_example
from weft.data.pipeline import read_all
from weft.errors import UserError
from weft.generation import Request
from weft.generation.limits import limits_for
from weft.generation.target import open_engine


@dataclass(frozen=True)
class Question:
    """A conversation up to the user's last turn, and the reference answer."""

    messages: tuple[Message, ...]
    reference: str
    source: str
    task: str = ""


@dataclass(frozen=True)
class Answer:
    """The answer of one adapter, and whether it is the reference."""

    question: Question
    text: str
    correct: bool


def read_questions(path: str | Path, *, limit: int | None = None) -> list[Question]:
    """Questions with references from a data file: the last assistant turn of each record is the reference."""
    return read_all(path, _question, limit=limit)


def _question(record: Record) -> Question:
    example = to_example(record)
    if not isinstance(example, Conversation) or example.messages[-1].role != "assistant":
        raise UserError(f"{record.source}: an exact-match question needs an answer as its last turn.")
    *before, last = example.messages
    return Question(tuple(before), last.content, record.source, str(record.fields.get("task", "")))


def answer_questions(
    adapters: Adapters,
    renderer: Renderer,
    questions: Sequence[Question],
    names: Sequence[str | None],
    *,
    max_new_tokens: int = 32,
    batch_size: int = 256,
) -> dict[str | None, list[Answer]]:
    """Let every adapter in ``names`` (None: the base) answer every question, all in the same batches, greedily."""
    prompts = [renderer.prompt(question.messages, task=adapters.architecture.task) for question in questions]
    requests = [Request(prompt.ids, name, max_new_tokens, slots=prompt.slots) for name in names for prompt in prompts]
    with open_engine(adapters, renderer, limits_for(adapters, requests, batch_size)) as engine:
        completions = engine.generate(requests)
    answers: dict[str | None, list[Answer]] = {}
    for number, name in enumerate(names):
        own = completions[number * len(prompts) : (number + 1) * len(prompts)]
        texts = [completion.text.strip() for completion in own]
        answers[name] = [
            Answer(question, text, fold(text) == fold(question.reference))
            for question, text in zip(questions, texts, strict=True)
        ]
    return answers


def fold(text: str) -> str:
    """The text with folded white space, which does not count in an exact match."""
    return " ".join(text.split())


def exact_match(answers: Sequence[Answer]) -> float:
    """The share of correct answers, 0 to 1."""
    return sum(answer.correct for answer in answers) / len(answers)
