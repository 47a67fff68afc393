"""Records as an audit and a preview need them: read and rendered as in training, but going on where that would stop."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from weft.data.auditing.base import Item, Split, short
from weft.data.formats.detect import EmptyAnswerError, to_example
from weft.data.formats.examples import SFT, Conversation, Message, PlainText, Segments, Tokenised
from weft.data.labelled import given_labels, in_order, iter_labelled
from weft.data.problems import Problem, about_record
from weft.data.reading.records import Record, iter_items
from weft.data.rendering.render import Renderer, Task
from weft.data.rendering.sample import TooLongError
from weft.data.settings import ReadSettings
from weft.errors import UserError

EMPTY, TOO_LONG = "left out for an empty answer", "left out for their length"


def read_items(
    path: str | os.PathLike[str],
    renderer: Renderer,
    settings: ReadSettings | None = None,
    *,
    unlimited: Renderer | None = None,
    split: Split = "train",
    task: Task = "causal_lm",
) -> tuple[list[Item], Counter[str]]:
    """Every record of a file as an Item, and why how many were left out (``empty_answers``, ``truncation: drop``).

    A record that training refuses is an Item with a ``problem``.
    ``unlimited`` is the same renderer without a ``max_length``: it tells how long a record is before it is cut.
    Raises UserError for a file that cannot be read, and if ``format`` or ``columns`` name what is not there.
    """
    settings = settings or ReadSettings()
    items, left_out = [], Counter[str]()
    for record in iter_items(path, limit=settings.limit):
        if isinstance(record, Problem):
            items.append(Item(split, record.place, problem=("not-read", record.what)))
            continue
        try:
            example = to_example(record, format=settings.data_format, columns=settings.columns)
        except EmptyAnswerError as error:
            if settings.empty_answers == "skip":
                left_out[EMPTY] += 1
            else:
                items.append(_refused(record, split, "empty-answer", error))
            continue
        except UserError as error:
            if not str(error).startswith(record.source):
                raise  # about the settings, not about this record
            items.append(_refused(record, split, "not-read", error))
            continue
        items.append(make_item(example, split))
    dropped = _render(items, renderer, unlimited or renderer, task)
    if dropped:
        left_out[TOO_LONG] += len(dropped)
        gone = set(map(id, dropped))
        items = [item for item in items if id(item) not in gone]
    return items, left_out


def _refused(record: Record, split: Split, code: str, error: UserError) -> Item:
    return Item(split, record.source, problem=(code, _without(record.source, error)), shown=_fields(record.fields))


def _fields(fields: Mapping[str, Any]) -> str:
    return short(json.dumps(fields, ensure_ascii=False, default=str))


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


def read_labelled_items(
    path: str | os.PathLike[str],
    renderer: Renderer,
    *,
    split: Split = "train",
    labels: Sequence[str] | None = None,
    **options: Any,
) -> tuple[list[Item], int, tuple[str, ...]]:
    """Every record of classification data as an Item, how many were left out for their length, and the classes.

    ``options`` are those of ``iter_labelled``; an Item's text is what its tokens decode to. A record that training
    refuses is an Item with a ``problem``. Raises UserError as ``iter_labelled`` does.
    """
    items: list[Item] = []
    names: set[str] = set()
    dropped = 0
    for one in iter_labelled(path, renderer, labels=labels, **options):
        if one.problem is not None:
            code = "too-long" if one.too_long else "not-rendered" if one.problem.kind == "render" else "not-read"
            item = Item(split, one.problem.place, problem=(code, one.problem.what))
            item.shown = _fields(one.fields) if one.fields is not None else ""
            items.append(item)
            continue
        names.add(one.name)
        dropped += one.dropped
        if one.sample is not None:
            items.append(Item(split, one.source, None, (one.sample,), len(one.sample.input_ids), label=one.name))
    good = [item for item in items if item.samples]
    ids = [item.samples[0].input_ids for item in good]
    texts = renderer.tokenizer.batch_decode(ids, skip_special_tokens=True) if ids else []  # of nothing it gives one
    classes = given_labels(labels) or in_order(names)
    number = {name: index for index, name in enumerate(classes)}
    for item, text in zip(good, texts, strict=True):
        item.text, item.samples = text, (replace(item.samples[0], label=number[item.label or ""]),)
    return items, dropped, classes


def _render(items: Sequence[Item], renderer: Renderer, unlimited: Renderer, task: Task) -> list[Item]:
    """Fill in samples and lengths, or problems; returns the records that ``truncation: drop`` leaves out."""
    read = [item for item in items if item.example is not None]
    long, limit = [], renderer.max_length
    for item, whole in zip(read, unlimited.outcomes((_example(item) for item in read), task), strict=True):
        if isinstance(whole, UserError):
            if about_record(whole, item.source, "render") is None:
                raise whole  # about the settings or the tokenizer, not about this record
            nothing = isinstance(item.example, Conversation) and not item.answer
            item.problem = ("nothing-to-learn" if nothing else "not-rendered", _without(item.source, whole))
            continue
        item.length = sum(len(sample.input_ids) for sample in whole)
        item.samples = whole
        if isinstance(item.example, Tokenised):
            item.text = str(renderer.tokenizer.decode(list(item.example.input_ids)))
        longest = max(max(len(sample.input_ids), len(sample.target_ids)) for sample in whole)
        if unlimited is not renderer and limit is not None and longest > limit:
            long.append(item)
    dropped = []
    for item, cut in zip(long, renderer.outcomes((_example(item) for item in long), task), strict=True):
        if isinstance(cut, UserError):
            item.samples = ()
            code = "too-long" if isinstance(cut, TooLongError) else "nothing-to-learn"
            item.problem = (code, _without(item.source, cut))
        elif cut:
            item.samples = cut
        else:
            dropped.append(item)
    return dropped


def _example(item: Item) -> SFT:
    assert item.example is not None
    return item.example


def _without(source: str, error: UserError) -> str:
    """The message without the place, which the finding names itself, and without what else it could be."""
    text = str(error).removeprefix(source).lstrip(": ").split(" Known formats:")[0]
    return text if len(text) <= 400 else text[:397] + "…"
