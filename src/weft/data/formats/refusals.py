"""Messages about records that fit no format, several formats, or a format for another purpose."""

from __future__ import annotations

import json
from collections.abc import Collection, Iterable, Sequence
from typing import NoReturn

from weft.data.formats.registry import FORMATS, TRAINING, UNREAD, Purpose
from weft.data.reading.records import Record
from weft.errors import UserError, nearest

_NOUNS = {
    "sft": "an example to learn from, without answers that were judged or a class",
    "preference": "a preference pair",
    "kto": "an answer that a field marks as good or bad",
    "ranked": "a ranked list of answers",
    "steps": "an answer whose steps are marked as right or wrong",
    "classification": "a text with the label of its class",
}
_LONG = 40  # a longer name is a row of data
# In data of no known format, fields with these words in their names are guessed to hold a question or an answer.
_ASKS = ("question", "query", "prompt", "instruction", "input", "ask", "problem", "source", "title", "q")
_SAYS = ("answer", "response", "reply", "completion", "output", "solution", "target", "content", "summary", "text", "a")


def wrong_purpose(record: Record, name: str, purpose: Purpose) -> NoReturn:
    """Refuse a record that is for another kind of training.

    Raises:
        UserError: Always.
    """
    made_for = FORMATS[name].purpose
    raise UserError(
        f"{record.source}: this is {_NOUNS[made_for]} ({', '.join(_telling(record, name))}), which is for "
        f"{TRAINING[made_for]}; {TRAINING[purpose]} does not read it.{_instead(record, name, purpose)}"
    )


def _telling(record: Record, name: str) -> Iterable[str]:
    """The fields by which the format was told."""
    present = {field for field, value in record.fields.items() if value is not None}
    shape = max(FORMATS[name].shapes, key=lambda fields: present.issuperset(fields) * len(fields))
    return (f"'{field}'" for field in shape)


def _instead(record: Record, name: str, purpose: Purpose) -> str:
    """Advice to a user who wants supervised training all the same."""
    if purpose != "sft":
        return ""
    fields = record.fields
    if name == "preference" and isinstance(fields["chosen"], list):
        return " To learn the better answers alone: `columns: {messages: chosen}`."
    if name == "preference" and isinstance(fields["chosen"], str) and isinstance(fields.get("prompt"), str):
        return " To learn the better answers alone: `columns: {prompt: prompt, completion: chosen}`."
    if name == "rejected_response":
        return " To learn the better answers alone, name the format without the worse ones: `data_format: messages`."
    if name == "two_responses":
        return " To learn the better answers alone: `columns: {question: question, answer: response_j}`."
    if name == "ranked":
        return " To learn the best answers alone: `columns: {output: output.0}`."
    if name == "kto":
        return " To learn the good answers alone, remove the others, and the mark."
    if name == "classification" and isinstance(fields.get("text"), str):
        return " To learn to write the text: `data_format: text`."
    return ""


def ambiguous(fits: Sequence[tuple[str, tuple[str, ...]]]) -> str:
    """The reason why a record that several formats read cannot be used as it stands."""
    listed = " and ".join(f"{name} ({', '.join(shape)})" for name, shape in fits)
    name, shape = fits[0]
    if any(other != name for other, _ in fits):
        advice = f"name the format, e.g. `data_format: {name}`"
    elif name == "classification":
        advice = "for classes, name them in `text_columns` and `label_column`"
    else:
        advice = f"name the fields, e.g. `columns: {{prompt: {shape[0]}, completion: {shape[-1]}}}`"
    return f"the record fits more than one format: {listed}. Say which is meant: {advice}."


def lacking(format: str, names: Iterable[str], mapped: Collection[str]) -> str:
    """The reason why a record is not of the format that the user named. ``mapped``: the fields named in `columns`."""
    known = FORMATS[format].names()
    foreign = next((name for name in mapped if name not in known), None)
    if foreign is not None and not FORMATS[format].judge:
        return f"columns: the format '{format}' has no field '{foreign}', it reads {', '.join(known)}."
    present = set(names)
    shape = max(FORMATS[format].shapes, key=lambda fields: len(present.intersection(fields)) / len(fields))
    missing = next((field for field in shape if field not in present), None)
    if missing is None:  # a mark whose conversation is of no known format
        return f"the format '{format}' marks a conversation, and the other fields are of none. {_rest(present)}"
    return f"the format '{format}' needs the field '{missing}'.{nearest(missing, present)} {_rest(present)}"


def no_format(present: Sequence[str]) -> str:
    """The reason why a record with these fields cannot be used, and what to write."""
    known = [field for entry in FORMATS.values() for field in entry.names()]
    unfamiliar = [name for name in present if name not in known]

    def share(shape: tuple[str, ...]) -> float:
        return len({*present}.intersection(shape)) / len(shape)

    name, shape = max(
        ((name, shape) for name, entry in FORMATS.items() for shape in entry.shapes if not entry.judge),
        key=lambda pair: (share(pair[1]) < 1) * share(pair[1]),
    )
    if 0 < share(shape) < 1:
        missing = next(field for field in shape if field not in present)
        hint = f" The closest is '{name}', which lacks '{missing}'.{nearest(missing, unfamiliar)}"
    else:
        guesses = (nearest(field, unfamiliar) for field in known)
        hint = next((text for text in guesses if text), "")
    return f"the record fits no known format.{hint} {_rest(present)}"


def _rest(present: Iterable[str]) -> str:
    names = list(present)
    found = ", ".join(repr(name if len(name) <= _LONG else name[:_LONG] + "…") for name in names)
    known = ", ".join(f"{name} ({entry.fields or ', '.join(entry.required)})" for name, entry in FORMATS.items())
    if any(len(name) > _LONG or name.isdecimal() for name in names):
        advice = "If these are no names, the file lacks a header row: add one."
    else:
        advice = f"Fields of other names can be mapped, e.g. `{_columns(names)}`."
    return f"Fields found: {found or 'none'}. {advice} Known formats: {known}; docs/data.md tells more."


def _columns(names: Sequence[str]) -> str:
    """A mapping ready to paste: question and answer by their likely names, else the first two fields, else text."""
    asks, says = _guess(names, _ASKS), _guess(names, _SAYS)
    if len(names) < 2:
        return f"columns: {{text: {yaml_name(names[0] if names else 'body')}}}"
    rest = [name for name in names if name not in (asks, says)]
    asks = asks or rest.pop(0)
    says = says or rest.pop(0)
    return f"columns: {{prompt: {yaml_name(asks)}, completion: {yaml_name(says)}}}"


def _guess(names: Sequence[str], usual: Sequence[str]) -> str | None:
    return next((name for word in usual for name in names if word in name.lower().replace("-", "_").split("_")), None)


def yaml_name(name: str) -> str:
    """A field's name as it is written in YAML."""
    return name if name.replace("_", "").isalnum() and not name.isdecimal() else json.dumps(name, ensure_ascii=False)


def unread(record: Record, name: str, format: str, question: str, answer: str) -> NoReturn:
    """Refuse a record that says something in the field ``name`` which the format that fits does not read.

    Raises:
        UserError: Always.
    """
    advice = UNREAD[name].format(name=name, question=question, answer=yaml_name(answer), format=format)
    raise UserError(f"{record.source}: the field '{name}' is not read by the format '{format}'. {advice}")
