"""The outcomes of records as an audit and a preview look at them: with their texts, lengths and findings."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import replace

from weft.data.auditing.base import Item, Split, short
from weft.data.formats.examples import SFT, Conversation, Message, PlainText, Segments, TokenisedText
from weft.data.pipeline import BEHIND, Acceptance, Omission, Outcome, Refusal
from weft.data.problems import Problem
from weft.data.rendering.render import Renderer, Task
from weft.errors import UserError


def collect(
    found: Iterable[Outcome],
    renderer: Renderer,
    *,
    unlimited: Renderer | None = None,
    split: Split = "train",
    task: Task = "causal_lm",
    classes: Sequence[str] = (),
) -> tuple[list[Item], Counter[str]]:
    """The records of a ``watched`` recipe as Items, and why how many were left out.

    A record that training refuses is an Item with a ``problem``. ``unlimited`` is the renderer without a
    ``max_length``: it tells how long a record is before it is cut. ``classes`` are those that labels are numbers of.
    """
    items: list[Item] = []
    left_out = Counter[str]()
    long: list[tuple[Item, SFT]] = []
    for one in found:
        if isinstance(one, Omission):
            left_out[one.why] += one.why != BEHIND
            continue
        item = make_item(one.example, split) if one.example else Item(split, one.source, label=one.label)
        items.append(item)
        if isinstance(one, Refusal):
            item.problem = _code(one, item), _told(one.problem)
            if one.fields is not None and not one.example:
                item.shown = short(json.dumps(one.fields, ensure_ascii=False, default=str))
        elif isinstance(one, Acceptance):
            item.samples, item.length = one.samples, sum(len(sample.input_ids) for sample in one.samples)
        if isinstance(one.example, TokenisedText) and (
            item.samples or (item.problem and item.problem[0] == "too-long")
        ):
            item.text = str(renderer.tokenizer.decode(list(one.example.input_ids)))
        if one.example and (item.problem or len(item.samples) > 1 or any(sample.cut for sample in item.samples)):
            long.append((item, one.example))
    if unlimited is not None:
        _measure(long, unlimited, task)
    _classify([item for item in items if item.label is not None], renderer, classes)
    return items, +left_out


def _code(refused: Refusal, item: Item) -> str:
    """The check that finds the record."""
    if refused.too_long:
        return "too-long"
    if refused.problem.kind == "render":
        return "nothing-to-learn" if item.messages and not item.answer else "not-rendered"
    return "empty-answer" if refused.problem.kind == "empty_answer" else "not-read"


def _told(problem: Problem) -> str:
    """The message without what else the record could be."""
    text = problem.what.lstrip(": ").split(" Known formats:")[0]
    return text if len(text) <= 400 else text[:397] + "…"


def _measure(long: Sequence[tuple[Item, SFT]], unlimited: Renderer, task: Task) -> None:
    """Fill in how long records were before they were cut or refused."""
    for (item, _), whole in zip(long, unlimited.outcomes((example for _, example in long), task), strict=True):
        if isinstance(whole, UserError):
            continue
        item.length = sum(len(sample.input_ids) for sample in whole)
        if item.problem and item.problem[0] == "not-rendered":  # of a cut record nothing was left to learn
            item.problem = "nothing-to-learn", item.problem[1]


def _classify(items: Sequence[Item], renderer: Renderer, classes: Sequence[str]) -> None:
    """Fill in the numbers of classes, and as texts what the tokens decode to."""
    number = {name: index for index, name in enumerate(classes)}
    ids = [item.samples[0].input_ids for item in items]
    texts = renderer.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []  # of nothing it gives one
    for item, text in zip(items, texts, strict=True):
        item.text, item.samples = text, (replace(item.samples[0], label=number[item.label or ""]),)


def make_item(example: SFT, split: Split = "train") -> Item:
    """An example with its texts; not rendered yet."""
    item = Item(split, example.source, example)
    if isinstance(example, PlainText):
        item.text = example.text
    elif isinstance(example, Segments):
        item.text = "".join(text for text, _ in example.segments)
        item.answer = "".join(text for text, learned in example.segments if learned)
    if not isinstance(example, Conversation):
        return item
    messages = example.messages
    item.text = "\n".join(map(_said, messages))
    learned = [i for i, turn in enumerate(messages) if i and turn.role == "assistant" and turn.train is not False]
    if learned:
        item.answer = messages[learned[-1]].content
        item.question = messages[learned[-1] - 1].content
        item.prompt = "\n".join(message.content for message in messages[: learned[-1]])
    return item


def _said(message: Message) -> str:
    calls = json.dumps([call["function"] for call in message.tool_calls], ensure_ascii=False)
    return message.content if not message.tool_calls else f"{message.content}\n{calls}".lstrip()
