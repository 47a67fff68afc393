"""The outcomes of records as items of an audit and a preview, with their texts, lengths and problems."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

from weft.data.auditing.base import Item, Split, short
from weft.data.formats import refusals
from weft.data.formats.examples import (
    SFT,
    Conversation,
    Judged,
    Message,
    PlainText,
    Segments,
    TokenisedText,
)
from weft.data.pipeline import BEHIND, Acceptance, Omission, Outcome, Refusal
from weft.data.problems import Problem
from weft.data.rendering.render import Renderer, Task
from weft.data.rendering.sample import Sample
from weft.data.rendering.transcript import learned_turns
from weft.errors import UserError


def collect(
    found: Iterable[Outcome],
    renderer: Renderer,
    *,
    unlimited: Renderer | None = None,
    split: Split = "train",
    task: Task = "causal_lm",
    classes: Sequence[str] = (),
    first: int = 1,
) -> tuple[list[Item], Counter[str]]:
    """The records of a ``watched`` recipe as Items, and how many were left out, by reason.

    A record that training refuses is an Item with a ``problem``. ``unlimited`` is the renderer without a
    ``max_length``; it gives the length of a record before it is cut. The labels of samples are numbers of ``classes``.
    ``first`` is the number of the first record.
    """
    items: list[Item] = []
    left_out = Counter[str]()
    long: list[tuple[int, SFT]] = []  # judged answers are measured as they are
    for number, one in enumerate(found, start=first):
        if isinstance(one, Omission):
            left_out[one.why] += one.why != BEHIND
            continue
        item = replace(_item(one, split, renderer.tokenizer), number=number)
        whole = not item.problem and len(item.samples) == 1 and not any(sample.cut for sample in item.samples)
        if one.example and not isinstance(one.example, Judged) and not whole:
            long.append((len(items), one.example))
        items.append(item)
    if unlimited is not None:
        _measure(items, long, unlimited, task)
    return _with_classes(items, renderer.tokenizer, classes), +left_out


def _item(outcome: Outcome, split: Split, tokenizer: Any) -> Item:
    example, texts, problem, shown = outcome.example, _Texts(), None, ""
    samples: tuple[Sample, ...] = ()
    if isinstance(outcome, Acceptance):
        samples, texts = outcome.samples, _texts_of(example, tokenizer)
    elif isinstance(outcome, Refusal):
        # Only of token ids that are too many is it known that they can be decoded.
        texts = _texts_of(example, tokenizer if outcome.too_long else None)
        problem = _code(outcome, texts), _message(outcome.problem)
        if outcome.fields is not None and not example:
            shown = short(json.dumps(outcome.fields, ensure_ascii=False, default=str))
    return Item(
        split,
        outcome.source,
        example,
        samples=samples,
        length=tokens_in(samples),
        label=outcome.label,
        problem=problem,
        text=texts.text,
        prompt=texts.prompt,
        question=texts.question,
        answer=texts.answer,
        shown=shown,
    )


def tokens_in(samples: Iterable[Sample]) -> int:
    """The number of ``input_ids`` of all samples; of judged answers those of the longest, with its prompt."""
    return sum(max(len(one.input_ids) for one in sample.each) for sample in samples)


def _code(refused: Refusal, texts: _Texts) -> str:
    """The check that finds the record."""
    if refused.too_long:
        return "too-long"
    if refused.problem.kind == "no_row":
        return "no-row"
    if refused.problem.kind == "render":
        return "nothing-to-learn" if isinstance(refused.example, Conversation) and not texts.answer else "not-rendered"
    return "empty-answer" if refused.problem.kind == "empty_answer" else "not-read"


def _message(problem: Problem) -> str:
    """The message without a list of other formats."""
    text = f"{problem.what.lstrip(': ')} {problem.advice}".split(refusals.KNOWN)[0].rstrip()
    return text if len(text) <= 400 else text[:397] + "…"


def _measure(items: list[Item], long: Sequence[tuple[int, SFT]], unlimited: Renderer, task: Task) -> None:
    """Put in the length of records before they were cut or refused."""
    rendered = unlimited.outcomes((example for _, example in long), task)
    for (place, _), whole in zip(long, rendered, strict=True):
        if isinstance(whole, UserError):
            continue
        problem = items[place].problem
        if problem and problem[0] == "not-rendered":  # without the cut there is something to learn
            problem = "nothing-to-learn", problem[1]
        items[place] = replace(items[place], length=tokens_in(whole), problem=problem)


def _with_classes(items: list[Item], tokenizer: Any, classes: Sequence[str]) -> list[Item]:
    """The items; those with a label get the number of its class, and the text of their tokens."""
    number = {name: index for index, name in enumerate(classes)}
    found = []
    for item in items:
        if item.label is not None:
            (sample,) = item.samples
            text = str(tokenizer.decode(sample.input_ids, skip_special_tokens=True))
            item = replace(item, text=text, samples=(replace(sample, label=number[item.label]),))
        found.append(item)
    return found


class _Texts(NamedTuple):
    """The texts of an ``Item``."""

    text: str = ""
    prompt: str = ""
    question: str = ""
    answer: str = ""


def _texts_of(example: SFT | Judged | None, tokenizer: Any) -> _Texts:
    """The texts of an example. Token ids need the tokenizer."""
    if isinstance(example, PlainText):
        return _Texts(example.text)
    if isinstance(example, Segments):
        answer = "".join(text for text, learned in example.segments if learned)
        return _Texts("".join(text for text, _ in example.segments), answer=answer)
    if isinstance(example, TokenisedText) and tokenizer is not None:
        return _Texts(str(tokenizer.decode(list(example.input_ids))))
    if isinstance(example, Judged):
        return _judged_texts(example)
    if not isinstance(example, Conversation):
        return _Texts()
    messages = example.messages
    whole = "\n".join(map(_said, messages))
    learned = learned_turns(messages)
    if not learned:
        return _Texts(whole)
    *before, question, answer = (message.content for message in messages[: learned[-1] + 1])
    return _Texts(whole, "\n".join([*before, question]), question, answer)


def _judged_texts(example: Judged) -> _Texts:
    """The texts of judged answers, of which the first is the best."""
    prompt, answers = "\n".join(map(_said, example.prompt)), ["\n".join(map(_said, one)) for one in example.each]
    question = example.prompt[-1].content if example.prompt else ""
    return _Texts("\n".join([prompt, *answers]), prompt, question, answers[0])


def _said(message: Message) -> str:
    calls = json.dumps([call["function"] for call in message.tool_calls], ensure_ascii=False)
    return message.content if not message.tool_calls else f"{message.content}\n{calls}".lstrip()
