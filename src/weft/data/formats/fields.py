"""Functions with which every reader of records checks the type of a field, and complains in the same words."""

from __future__ import annotations

import json
import reprlib
from typing import Any, NoReturn

from weft.data.problems import AdvisedError
from weft.data.reading.records import Record
from weft.errors import UserError

_REPR = reprlib.Repr()  # bounded in depth too: the repr of deeply nested data would exhaust the stack
_REPR.maxstring = _REPR.maxother = _REPR.maxlong = 60


def short(value: object) -> str:
    """The type of a value and its beginning."""
    return f"{type(value).__name__} {shown(value)}"


def shown(value: object) -> str:
    """The beginning of a value."""
    return _REPR.repr(value)[:80]


def string(record: Record, name: str, *, optional: bool = False) -> str:
    """The text of a field; the empty string for an optional one that is absent or null.

    Raises:
        UserError: The field holds no text.
    """
    value = record.fields.get(name)
    if isinstance(value, str):
        return value
    if value is None and optional:
        return ""
    advice = ""
    if isinstance(value, (int, float)):
        # How 0.10 or 1e5 was written is not known any more, so that the user decides.
        advice = f"Write such a value in quotation marks, or have it read as text: {as_text(name)}."
    raise AdvisedError(f"{record.source}: '{name}' must be a string, found {short(value)}.", advice)


def as_text(ours: str, theirs: str = "") -> str:
    """The setting that reads a field as text, whatever it holds."""
    return f'`columns: {{{ours}: "{{{theirs or ours}}}"}}`'


def as_list(value: object, name: str, source: str) -> list[Any]:
    """The value as a list; it may be JSON text in a cell of a table.

    Raises:
        UserError: It is not a list.
    """
    if isinstance(value, str) and value.lstrip()[:1] == "[":
        value = parse_json(value, f"{source}: '{name}'")
    if not isinstance(value, list):
        raise UserError(f"{source}: '{name}' must be a list, found {short(value)}.")
    return value


def parse_json(text: str, where: str) -> Any:
    """The value of JSON inside a string.

    Raises:
        UserError: It is not JSON; the message begins with ``where``.
    """
    try:
        return json.loads(text, parse_constant=_reject)
    except ValueError as error:
        raise UserError(f"{where} is a string that is not JSON: {error}.") from None
    except RecursionError:
        raise UserError(f"{where} is JSON that is nested too deeply.") from None


def _reject(name: str) -> NoReturn:
    raise ValueError(f"it holds {name}, which JSON does not have")
