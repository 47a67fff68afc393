"""The question of a record: all that training reads before the last answer, or the fields of a prompt without one."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping

from weft.data.formats.answers import history
from weft.data.formats.columns import map_columns
from weft.data.formats.detect import field_names, our_name, to_example
from weft.data.formats.examples import (
    ClassifiedText,
    Conversation,
    Message,
    PlainText,
    Segments,
    TokenisedText,
)
from weft.data.formats.registry import FORMATS, PAIRS
from weft.data.formats.turns import tools, turns, with_system
from weft.data.reading.records import Record
from weft.errors import UserError

Question = Conversation | Segments | TokenisedText
_LISTS = ("prompt", "messages", "conversations", "conversation")
_MORE = ("context", "input")  # of an instruction


def question_of(record: Record, *, format: str | None = None, columns: Mapping[str, str] | None = None) -> Question:
    """The conversation up to the last answer. Token ids and segments, which hold no turns, stay whole.

    ``format`` and ``columns`` are those of training. A file of another kind, or of prompts alone, need not fit them.

    Raises:
        UserError: There is no question in the record.
    """
    present = _present(record, columns or {})
    for named in dict.fromkeys((format, None)):
        try:
            example = to_example(record, format=named, columns=present, purpose="any")
        except UserError:
            continue
        if isinstance(example, (Segments, TokenisedText)):
            return example
        if isinstance(example, Conversation):
            return _asked(record, example.messages, example.tools)
        if not isinstance(example, (PlainText, ClassifiedText)):
            return _asked(record, example.prompt, tools(record))
    record = map_columns(record, present, field_names())
    return _asked(
        record, _prompt(Record({our_name(key): value for key, value in record.fields.items()}, record.source))
    )


def _present(record: Record, columns: Mapping[str, str]) -> dict[str, str]:
    """The ``columns`` that the record has. Answers may be absent, and so may all: then it is a file of another kind.

    Raises:
        UserError: The record has some of the columns and lacks one of the question.
    """
    found: dict[str, str] = {}
    missing: list[UserError] = []
    for ours, theirs in columns.items():
        try:
            map_columns(record, {ours: theirs}, field_names())
            found[ours] = theirs
        except UserError as error:
            missing += [error] * (ours in (*_names(), *_LISTS, *_MORE))
    if missing and any(not theirs.startswith("=") for theirs in found.values()):
        raise missing[0]
    return {} if missing else found


def _names() -> tuple[str, ...]:
    """The fields that hold the question of a pair, those of which a prompt alone is usual first."""
    usual = ("prompt", "instruction", "question", "text")
    pairs = (shape[0] for entry in FORMATS.values() if entry.tier == PAIRS for shape in entry.shapes)
    return tuple(dict.fromkeys((*usual, *pairs)))


def _asked(record: Record, messages: Iterable[Message], schemas: tuple[dict[str, object], ...] = ()) -> Conversation:
    """The messages without the answers at their end."""
    kept = list(messages)
    while kept and kept[-1].role == "assistant":
        kept.pop()
    if not kept:
        raise UserError(f"{record.source}: there is no turn before an answer, so nothing is asked.")
    return Conversation(tuple(kept), record.source, schemas)


def _prompt(record: Record) -> list[Message]:
    """The turns of a record without an answer."""
    fields, found = record.fields, next((name for name in _names() if isinstance(record.fields.get(name), str)), None)
    listed = next((name for name in _LISTS if isinstance(fields.get(name), list)), None)
    if listed is not None:
        return list(with_system(record, turns(record, listed)))
    if found is not None:
        more = [fields.get(name) for name in _MORE] if found == "instruction" else []
        text = "\n".join([str(fields[found]), *(part for part in more if isinstance(part, str) and part)])
        before = history(record) if fields.get("history") else []
        return list(with_system(record, [*before, Message("user", text)]))
    other = next((name for name in _names() if fields.get(name) is not None), None)
    if other is not None:
        value = json.dumps(fields[other], ensure_ascii=False, default=str)
        raise UserError(f"{record.source}: {other} is {value[:80]}; expected text, in quotes.")
    raise UserError(
        f"{record.source}: no prompt in this record. It needs a field prompt, instruction, question, text or messages; "
        f"it has {', '.join(map(repr, fields)) or 'none'}."
    )
