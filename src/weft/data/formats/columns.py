"""The key ``columns``: the user's names of fields, paths into nested ones, templates of several, and constants."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from typing import Any

from weft.data.formats.fields import short
from weft.data.reading.records import Record
from weft.errors import UserError, nearest

_PLACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")


def map_columns(record: Record, columns: Mapping[str, str], known: Collection[str]) -> Record:
    """The record under our names of fields, without the fields that were read. ``known``: the fields of all formats.

    A value of ``columns`` is a field's name, a path (``data.answers.0``), a text in which ``{field}`` or ``{path}``
    stands for the field's text, or a constant after ``=``.

    Raises:
        UserError: The record has no such field, or no format has one of that name.
    """
    made: dict[str, object] = {}
    used: set[str] = set()
    for ours, theirs in columns.items():
        if ours not in known:
            raise UserError(
                f"columns: '{ours}' is a field of no format.{nearest(ours, known)} Write `<field of the format>: "
                f"<field in the data>`; the formats stand in docs/data.md."
            )
        made[ours] = _value(record, theirs, used)
    fields = {name: value for name, value in record.fields.items() if name not in used}
    fields.update(made)
    return Record(fields, record.source)


def _value(record: Record, theirs: str, used: set[str]) -> object:
    if theirs in record.fields:
        used.add(theirs)
        return record.fields[theirs]
    if theirs.startswith("="):
        return theirs[1:]
    if "{" not in theirs and "}" not in theirs:
        return _at_path(record, theirs, used)

    def text(found: re.Match[str]) -> str:
        if found[0] in ("{{", "}}"):
            return found[0][0]
        if found[1] is None:
            raise UserError(f"columns: '{theirs}' holds a single '{found[0]}'. Write {{{{ and }}}} for the braces.")
        return _as_text(_at_path(record, found[1], used), found[1], record)

    return _PLACE.sub(text, theirs)


def _at_path(record: Record, path: str, used: set[str]) -> object:
    """The value of a field, or at a path of fields and places in lists; None where a part of the path is null."""
    if path in record.fields:
        used.add(path)
        return record.fields[path]
    value: Any = record.fields
    for depth, part in enumerate(path.split(".")):
        if value is None:
            break
        if isinstance(value, dict) and part in value:
            value = value[part]
        elif isinstance(value, list) and part.isdecimal() and len(part) < 10 and int(part) < len(value):
            value = value[int(part)]
        else:
            known = value if isinstance(value, dict) else ()
            inside = f" in '{'.'.join(path.split('.')[:depth])}'" if depth else ""
            found = f"Fields found: {', '.join(map(repr, known)) or 'none'}." if known else f"Found: {short(value)}."
            raise UserError(
                f"{record.source}: columns: there is no field '{part}'{inside}.{nearest(part, known)} {found}"
            )
    used.add(path.split(".")[0])
    return value


def _as_text(value: object, name: str, record: Record) -> str:
    """A field as a part of a text: a string, a number, or a list of them with one entry a line."""
    if isinstance(value, list) and all(isinstance(item, (str, int, float)) for item in value):
        return "\n".join(_as_text(item, name, record) for item in value)
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, (str, int, float)):
        return str(value)
    raise UserError(
        f"{record.source}: columns: '{name}' must hold text, a number or a list of them, found {short(value)}."
    )
