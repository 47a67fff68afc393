"""Find the format of a record, and read it into an example.

The names of the fields tell the format (``registry.py`` has them all), or the user names it. ``columns`` renames fields
first. A record is refused if it could be read in two ways, if a part of it would be lost, or if it is not for the
caller's purpose. The error says where the record is and what to add.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, Literal, overload

from weft.data.formats import refusals
from weft.data.formats.columns import map_columns
from weft.data.formats.examples import SFT, Conversation, Example
from weft.data.formats.fields import as_text
from weft.data.formats.judged import verdict
from weft.data.formats.refusals import Reason
from weft.data.formats.registry import (
    ACCEPTS,
    ALIASES,
    FORMATS,
    PAIRS,
    SPELLINGS,
    TURNS,
    UNREAD,
    Format,
    Purpose,
    Reader,
)
from weft.data.problems import AdvisedError
from weft.data.reading.records import Record
from weft.errors import UserError, check_word, nearest
from weft.extensions import HOW_TO_LOAD

_JUDGE = "kto"


@dataclass(frozen=True, slots=True)
class _Fit:
    """A format that fits a set of fields, the shape that fits, and the fields of ``UNREAD`` that it leaves unread.

    ``base``, of a mark on a conversation, says how the conversation is read.
    """

    name: str
    entry: Format
    shape: tuple[str, ...]
    _: KW_ONLY
    unread: tuple[str, ...] = ()
    base: _Fit | None = None


@dataclass(frozen=True, slots=True)
class _Plan:
    """How records with one set of fields are read: by the first of ``fits`` whose values agree, else ``problem``.

    ``spelled`` maps the data's spellings of fields to ours.
    """

    fits: tuple[_Fit, ...]
    problem: Reason | None = None
    spelled: tuple[tuple[str, str], ...] = ()


@overload
def to_example(
    record: Record,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    purpose: Literal["sft"] = "sft",
) -> SFT: ...


@overload
def to_example(
    record: Record, *, format: str | None = None, columns: Mapping[str, str] | None = None, purpose: Purpose
) -> Example: ...


def to_example(
    record: Record,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    purpose: Purpose = "sft",
) -> Example:
    """Read one record.

    ``columns`` maps a format's field to the data's own, e.g. ``{"completion": "reply"}``; see docs/data.md for paths,
    templates and constants. ``purpose`` is the caller's use; data for another use is refused.

    Raises:
        UserError: The record has no known format or more than one, a field is missing or of the wrong type, a role is
            unknown, or a conversation has no assistant turn. The message names the line.
        EmptyAnswerError: An answer is empty.
    """
    check_word("purpose", purpose, tuple(ACCEPTS))
    record, fit, plan = _choose(record, format, columns)
    if fit.entry.purpose not in ACCEPTS[purpose]:
        refusals.wrong_purpose(record, fit.name, purpose)
    names = [*((ours, name) for name, ours in plan.spelled), *(columns or {}).items()]
    theirs = {ours: name for ours, name in names if ours != name}
    try:
        if format is None:
            _check_unread(record, fit, theirs)
        elif fit.entry.tier in (TURNS, PAIRS):
            _check_marks(record)
        return _read(record, fit)
    except UserError as error:
        listed = [f"{name!r} is read as '{ours}'" for ours, name in theirs.items() if f"'{ours}'" in str(error)]
        if not listed:
            raise
        if isinstance(error, AdvisedError):
            advice = error.advice
            for ours, name in theirs.items():
                advice = advice.replace(as_text(ours), as_text(ours, name))
            raise AdvisedError(f"{error.what} ({', '.join(listed)}.)", advice) from None
        raise type(error)(f"{error} ({', '.join(listed)}.)") from None


def format_of(record: Record, *, format: str | None = None, columns: Mapping[str, str] | None = None) -> str:
    """The name of the record's format, one of FORMATS. Raises UserError as ``to_example`` does where none is clear."""
    return _choose(record, format, columns)[1].name


def _choose(record: Record, format: str | None, columns: Mapping[str, str] | None) -> tuple[Record, _Fit, _Plan]:
    """The record in our spelling, and the fit and the plan by which it is read."""
    if columns:
        record = map_columns(record, columns, field_names())
    fields = record.fields
    present = tuple(fields)
    if None in fields.values():
        present = tuple(name for name in present if fields[name] is not None)
    plan = _plan(present, format_named(format), frozenset(columns or ()))
    if plan.spelled:
        ours = dict(plan.spelled)
        fields = {ours.get(name, name): value for name, value in fields.items() if value is not None}
        record = Record(fields, record.source)
    for fit in plan.fits:
        if fit.entry.when is None or format is not None or fit.entry.when(fields, fit.shape):
            return record, fit, plan
    reason = plan.problem or refusals.no_format(present, dict(plan.spelled))
    raise AdvisedError(f"{record.source}: {reason.what}", reason.advice)


def format_named(format: str | None) -> str | None:
    """The format's own name, where ``format`` may be another of its names.

    Raises:
        UserError: There is no such format.
    """
    if format is None:
        return None
    name = ALIASES.get(format, format)
    if name not in FORMATS:
        hint = nearest(format, [*FORMATS, *ALIASES])
        raise UserError(f"format '{format}' is unknown.{hint} Known formats: {', '.join(FORMATS)}. {HOW_TO_LOAD}")
    return name


def _read(record: Record, fit: _Fit) -> Example:
    if fit.entry.read is not None:
        return fit.entry.read(record, fit.shape)
    assert fit.base is not None
    assert fit.entry.judge is not None
    conversation = _read(record, fit.base)
    assert isinstance(conversation, Conversation)
    return fit.entry.judge(conversation, record, fit.shape[0])


def _check_unread(record: Record, fit: _Fit, theirs: Mapping[str, str]) -> None:
    """Refuse a record that says something in a field which its format does not read."""
    for name in fit.unread:
        value = record.fields[name]
        if (isinstance(value, (int, float)) and value in (0, 1)) if name == "label" else value:
            shape = fit.shape if fit.base is None else fit.base.shape
            question, answer = (theirs.get(field, field) for field in (shape[0], shape[-1]))
            refusals.unread(record, name, fit.name, question, answer)


def _check_marks(record: Record) -> None:
    """Refuse an answer that is marked as bad: naming a format allows learning the good ones only."""
    for (name,) in FORMATS[_JUDGE].shapes:
        if verdict(record.fields.get(name)) is False:
            raise UserError(
                f"{record.source}: '{name}' marks this answer as bad, so it would be taught. Remove such records, or "
                "train on the labels (KTO)."
            )


def register_format(
    name: str,
    *,
    shapes: tuple[tuple[str, ...], ...],
    what: str,
    example: dict[str, Any],
    optional: tuple[str, ...] = (),
    purpose: Purpose = "sft",
    tier: int = PAIRS,
) -> Callable[[Reader], Reader]:
    """A decorator of a function that reads a record: records with the fields of one of ``shapes`` are of this format.

    The function takes the record and the shape that fits, and returns an example of the ``purpose``: a ``Conversation``
    or a ``PlainText`` for "sft". ``Format`` explains the other arguments.

    Raises:
        UserError: The name is taken.
    """

    def entry(read: Reader) -> Format:
        _plan.cache_clear()
        field_names.cache_clear()
        return Format(tier, purpose, shapes, optional=optional, what=what, example=example, read=read)

    return FORMATS.register(name, entry)


# ------------------------------------------------------------------------------------------------------------ detection


@lru_cache(maxsize=1)
def field_names() -> frozenset[str]:
    """Every field of any format."""
    return frozenset(name for entry in FORMATS.values() for name in entry.names())


@lru_cache(maxsize=4096)  # data sets have few sets of fields, and many records of each
def _plan(present: tuple[str, ...], format: str | None, mapped: frozenset[str]) -> _Plan:
    """Which formats fit records that have these fields. ``mapped`` are the fields that the user named."""
    spelled = {name: ours for name in present if (ours := our_name(name)) != name and ours not in mapped}
    names = [spelled.get(name, name) for name in present]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        theirs = [repr(name) for name, ours in zip(present, names, strict=True) if ours == twice]
        said = f"the fields {' and '.join(theirs)} could each be '{twice}'."
        return _Plan((), Reason(f"{said} Say which: `columns: {{{twice}: {theirs[0]}}}`."))
    chosen = FORMATS if format is None else {format: FORMATS[format]}
    fits, problem = _fits(frozenset(names), chosen, mapped)
    if not fits and not problem:
        problem = refusals.no_format(present, spelled) if format is None else refusals.lacking(format, names, mapped)
    return _Plan(tuple(fits), problem, tuple(spelled.items()))


def our_name(name: str) -> str:
    """The name of a field in our spelling: ``Question `` and ``问题`` are ``question``."""
    if name in field_names():
        return name
    plain = name.strip().lower()
    plain = SPELLINGS.get(plain, plain)
    return plain if plain in field_names() else name


def _fits(
    names: frozenset[str], formats: Mapping[str, Format], mapped: frozenset[str]
) -> tuple[list[_Fit], Reason | None]:
    """The formats that fit, one of each tier, up to a tier with several; and then why that is one too many."""
    fits: list[_Fit] = []
    for tier in sorted({entry.tier for entry in formats.values()}):
        entries = {name: entry for name, entry in formats.items() if entry.tier == tier}
        found = [fit for name, entry in entries.items() for fit in _shapes(name, entry, names, mapped)]
        found = [fit for place, fit in enumerate(found) if not _covered(place, found)]
        if len(found) > 1:
            return fits, refusals.ambiguous([(fit.name, fit.shape) for fit in found])
        fits += found
    return fits, None


def _shapes(name: str, entry: Format, names: frozenset[str], mapped: frozenset[str]) -> list[_Fit]:
    fits = []
    for shape in entry.shapes:
        if not names.issuperset(shape):
            continue
        if entry.judge is None:
            if mapped.issubset(entry.names()):
                fits.append(_Fit(name, entry, shape, unread=_unread(entry, names, bool(mapped))))
            continue
        conversations = {key: other for key, other in FORMATS.items() if other.tier in (TURNS, PAIRS)}
        bases, _ = _fits(names.difference(shape), conversations, mapped.difference(shape))
        fits += [_Fit(name, entry, shape, unread=base.unread, base=base) for base in bases[:1]]
    return fits


def _covered(place: int, fits: list[_Fit]) -> bool:
    """Whether another format reads all that this one does. Of two that read the same, the first counts."""
    mine = fits[place]
    return any(
        _covers(other, mine) and (number < place or not _covers(mine, other))
        for number, other in enumerate(fits)
        if number != place
    )


def _covers(fit: _Fit, other: _Fit) -> bool:
    return {*fit.shape, *fit.entry.optional, *fit.entry.copies}.issuperset(other.shape)


def _unread(entry: Format, names: frozenset[str], mapped: bool) -> tuple[str, ...]:
    """Fields that the format does not read although they would change what the record means."""
    if entry.purpose == "classification":
        return ()
    unread = []
    for name in names.intersection(UNREAD).difference(entry.names()):
        to_prompt = "{question}" in UNREAD[name]
        if (to_prompt and entry.tier != PAIRS) or (name == "label" and entry.tier not in (TURNS, PAIRS)):
            continue
        if name.startswith("rejected") and entry.purpose != "sft":
            continue
        if mapped and (name == "instruction" or name.startswith("rejected")):  # the user has chosen among the fields
            continue
        unread.append(name)
    return tuple(sorted(unread))
