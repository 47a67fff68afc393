"""Messages about records that fit no format, several formats, or a format for another purpose."""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NoReturn

from weft.data.formats.guesses import ASKS, SAYS, by_words, candidates, yaml_name
from weft.data.formats.registry import FORMATS, TRAINING, UNREAD, Purpose
from weft.data.reading.records import Record
from weft.data.reading.rows import listed
from weft.errors import UserError, nearest

_NOUNS = {
    "sft": "an example to learn from, without answers that were judged or a class",
    "preference": "a preference pair",
    "kto": "an answer that a field marks as good or bad",
    "ranked": "a ranked list of answers",
    "steps": "an answer whose steps are marked as right or wrong",
    "classification": "a text with the label of its class",
}
KNOWN = "Known formats:"


@dataclass(frozen=True, slots=True)
class Reason:
    """``what`` is wrong with a record, and ``advice`` that is the same for all records of the data."""

    what: str
    advice: str = ""


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


def ambiguous(fits: Sequence[tuple[str, tuple[str, ...]]]) -> Reason:
    """The reason why a record that several formats read cannot be used as it stands."""
    listed = " and ".join(f"{name} ({', '.join(shape)})" for name, shape in fits)
    name, shape = fits[0]
    if any(other != name for other, _ in fits):
        advice = f"name the format, e.g. `data_format: {name}`"
    elif name == "classification":
        advice = "for classes, name them in `text_columns` and `label_column`"
    else:
        advice = f"name the fields, e.g. `columns: {{prompt: {shape[0]}, completion: {shape[-1]}}}`"
    return Reason(f"the record fits more than one format: {listed}. Say which is meant: {advice}.")


def lacking(format: str, names: Iterable[str], mapped: Collection[str]) -> Reason:
    """The reason why a record is not of the format that the user named. ``mapped``: the fields named in `columns`."""
    known = FORMATS[format].names()
    foreign = next((name for name in mapped if name not in known), None)
    if foreign is not None and not FORMATS[format].judge:
        return Reason(f"columns: the format '{format}' has no field '{foreign}', it reads {', '.join(known)}.")
    present = tuple(names)
    shape = max(FORMATS[format].shapes, key=lambda fields: len({*present}.intersection(fields)) / len(fields))
    missing = next((field for field in shape if field not in present), None)
    if missing is None:  # a mark whose conversation is of no known format
        return _reason(f"the format '{format}' marks a conversation, and the other fields are of none.", present)
    return _reason(
        f"the format '{format}' needs the field '{missing}'.{nearest(missing, candidates(missing, present))}", present
    )


def no_format(present: Sequence[str], spelled: Mapping[str, str]) -> Reason:
    """The reason why a record with these fields cannot be used, and what to write. ``spelled``: our names of fields.

    The closest format is the one that shares most fields with the record.
    """
    names = {spelled.get(name, name) for name in present}
    known = {field for entry in FORMATS.values() for field in entry.names()}
    unfamiliar = [name for name in present if spelled.get(name, name) not in known]
    ranked = [
        (
            len(names.intersection(shape)),
            len(names.intersection((*shape, *entry.optional))),
            -len({*shape} - names),
            entry.purpose == "sft",
            name,
            shape,
        )
        for name, entry in FORMATS.items()
        for shape in entry.shapes
        if not entry.judge and names.intersection(shape) and not names.issuperset(shape)
    ]
    if not ranked or (len(present) == 1 and not by_words(present, ASKS)):
        pairs = ((name, nearest(name, known)) for name in unfamiliar)
        hint = next((f" '{name}' is no field of a format.{said}" for name, said in pairs if said), "")
        return _reason(f"the record fits no known format.{hint}", present)
    *_, name, shape = max(ranked, key=lambda one: one[:4])
    missing = [field for field in shape if field not in names]
    hint = f" The closest is '{name}', which lacks '{missing[0]}'."
    free = candidates(missing[0], unfamiliar)
    said = nearest(missing[0], free)
    if len(missing) > 1 or not (said or free):
        return _reason(f"the record fits no known format.{hint}{said}", present, mapping=len(missing) > 1)
    theirs = next((one for one in free if said == f" Did you mean '{one}'?"), free[0])
    advice = f"Fields of other names can be mapped, e.g. `columns: {{{missing[0]}: {yaml_name(theirs)}}}`."
    return _reason(f"the record fits no known format.{hint}{said}", present, advice=advice)


def _reason(what: str, present: Sequence[str], *, mapping: bool = True, advice: str = "") -> Reason:
    """``what``, with the fields that were found, and the formats that there are."""
    known = ", ".join(f"{name} ({entry.fields or ', '.join(entry.required)})" for name, entry in FORMATS.items())
    if any(len(name) > 40 or name.isdecimal() for name in present):
        advice = "If these are no names, the file lacks a header row: add one."
    elif not advice and mapping and (columns := _columns(present)):
        advice = f"Fields of other names can be mapped, e.g. `{columns}`."
    found = listed(present, quoted=True) or "none"
    advice = advice or "None of them looks like the answer to learn: add it to the records."
    return Reason(f"{what} Fields found: {found}. {advice}", f"{KNOWN} {known}; docs/data.md tells more.")


def _columns(names: Sequence[str]) -> str:
    """A mapping ready to paste, if the names tell it; empty if it would teach a question as an answer."""
    asks = next(iter(by_words(names, ASKS)), None)
    says = next((name for name in by_words(names, SAYS) if not by_words([name], ASKS)), None)
    if len(names) < 2:
        return "" if asks else f"columns: {{text: {yaml_name(names[0] if names else 'body')}}}"
    rest = [name for name in names if name not in (asks, says) and not by_words([name], ASKS)]
    if asks is None and rest:
        asks = rest.pop(0)
    if says is None and rest:
        says = rest.pop(0)
    if asks is None or says is None:
        return ""
    return f"columns: {{prompt: {yaml_name(asks)}, completion: {yaml_name(says)}}}"


def unread(record: Record, name: str, format: str, question: str, answer: str) -> NoReturn:
    """Refuse a record that says something in the field ``name`` which the format that fits does not read.

    Raises:
        UserError: Always.
    """
    advice = UNREAD[name].format(name=name, question=question, answer=yaml_name(answer), format=format)
    raise UserError(f"{record.source}: the field '{name}' is not read by the format '{format}'. {advice}")
