"""One record and its checks: JSON is decoded strictly, and what would fail far from here is refused here."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, NoReturn

# Bytes that are not UTF-8 are decoded to these (``errors="surrogateescape"``), so that their place is known.
BROKEN = re.compile("[\udc80-\udcff]")
# A byte order mark counts as white space between records, for files are put end to end.
_SPACE = re.compile("[ \t\r\n\ufeff]*")
_NAMES, _NAME = 12, 40  # that are shown
_DIGITS = 308  # the largest integer that a double holds has so many
_LONG = 6 << 20  # characters; a window of several records holds fewer
_NESTED = 500_000
_HALVES = ("\\ud", "\\uD")


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a data file. ``source`` is ``"path:line"``: the 1-based line where the record begins."""

    fields: dict[str, object]
    source: str


class RowError(Exception):
    """What is wrong with one record.

    ``at`` is the place in the text, if one character can be blamed. ``begun`` says that the text ended before the value
    did. ``broken`` says that the brackets do not tell where the record ends.
    """

    def __init__(
        self, kind: str, what: str, at: int | None = None, *, begun: bool = False, broken: bool = False
    ) -> None:
        super().__init__(what)
        self.kind, self.what, self.at, self.begun, self.broken = kind, what, at, begun, broken


def listed(names: Iterable[object], *, quoted: bool = False) -> str:
    """Names of a file's fields or columns, as a message shows them: not too many, and none too long.

    ``quoted`` puts each in quotation marks.
    """
    short = [name if len(name) <= _NAME else f"{name[:_NAME]}…" for name in map(str, names)]
    shown = ", ".join(map(repr, short[:_NAMES]) if quoted else short[:_NAMES])
    return shown if len(short) <= _NAMES else f"{shown} and {len(short) - _NAMES} more"


def _constant(name: str) -> NoReturn:
    raise RowError(
        "not_a_number",
        f"the record that begins here holds {name}, which JSON does not have. Use null or leave the field out.",
    )


def _integer(digits: str) -> int:
    if len(digits) > _DIGITS:
        raise RowError("number_too_large", f"the record that begins here holds a number of {len(digits)} digits. "
                    "Shorten it, or make it a string.")  # fmt: skip
    return int(digits)


def _float(text: str) -> float:
    value = float(text)
    if math.isinf(value):
        short = text if len(text) <= 20 else text[:17] + "..."
        raise RowError("number_too_large", f"the record that begins here holds {short}, more than a double can hold. "
                    "Shorten it, or make it a string.")  # fmt: skip
    return value


def _object(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for number, name in enumerate(names) if name in names[:number])
        raise RowError(
            "duplicate_key",
            f"an object of this record names the field {twice[:60]!r} twice, and only one of the two could be read. "
            "Remove one.",
        )
    return found


_STRICT = json.JSONDecoder(parse_constant=_constant, parse_int=_integer, parse_float=_float, object_pairs_hook=_object)
_LENIENT = json.JSONDecoder(parse_int=len, parse_float=len)


def _check_values(text: str, at: int) -> None:
    """Refuse a long record of small values, which take twenty times the memory of their text."""
    nested = text.count("[", at) + text.count("{", at)
    if nested > _NESTED or text.count(",", at) > 8 * _NESTED:
        raise RowError("too_many_values", "the record that begins here holds more values than any text does. Split it.",
                       broken=True)  # fmt: skip


def after_space(text: str, at: int = 0) -> int:
    """The place of the first character from ``at`` on that is not white space."""
    found = _SPACE.match(text, at)
    assert found is not None
    return found.end()


def decode(text: str, at: int, *, strict: bool = True) -> tuple[Any, int]:
    """Decode the JSON value that begins at ``at``: (value, place behind it). Raises RowError."""
    if len(text) - at > _LONG and strict:
        _check_values(text, at)
    try:
        return (_STRICT if strict else _LENIENT).raw_decode(text, at)
    except json.JSONDecodeError as error:
        message = error.msg[:1].lower() + error.msg[1:]
        # In a text that was cut anywhere the decoder stumbles over an open string, or over one of the last characters.
        begun = message.startswith("unterminated string") or error.pos >= len(text) - 12
        raise RowError("malformed_json", f"malformed JSON: {message}.", error.pos, begun=begun, broken=True) from None
    except RecursionError:
        raise RowError("too_deep", "the JSON here is nested too deeply to be read.", broken=True) from None


def check_text(fields: object, text: str, start: int, end: int) -> None:
    """Refuse a row if its source, ``text[start:end]``, has escapes of NUL characters or of halves of characters."""
    if text.find("\\u0000", start, end) >= 0:
        check_nul(fields)
    if any(text.find(escape, start, end) >= 0 for escape in _HALVES):
        # JSON allows half of a UTF-16 pair, but it is not a character: tokenizers fail on it far from here.
        try:
            json.dumps(fields, ensure_ascii=False).encode("utf-8")
        except UnicodeEncodeError as error:
            escape = f"\\u{ord(error.object[error.start]):04x}"
            raise RowError(
                "half_character",
                f"a string of this record holds {escape} alone, half of a character. Repair or remove it.",
            ) from None


def check_nul(value: object) -> None:
    """Refuse NUL characters anywhere in decoded JSON: texts have none, and programs in C end a string there."""
    todo = [value]
    while todo:
        item = todo.pop()
        if isinstance(item, str) and "\0" in item:
            raise RowError("nul", "a string of this record holds a NUL character (\\u0000). Remove it.")
        if isinstance(item, dict):
            todo += [*item.keys(), *item.values()]
        elif isinstance(item, list):
            todo += item


def not_utf8(text: str, at: int, *, broken: bool = False) -> RowError:
    """The error at a character that stands for a byte that is not UTF-8; ``broken``: the JSON is malformed too."""
    byte = ord(text[at]) - 0xDC00
    return RowError(
        "not_utf8",
        f"byte 0x{byte:02x} is not UTF-8. Save the file as UTF-8, "
        "for instance with `iconv -f <its encoding> -t utf-8`.",
        at,
        broken=broken,
    )


def as_fields(row: object) -> dict[str, object]:
    """The fields of a row; a list of messages becomes ``{"messages": row}``. Raises RowError for anything else."""
    if isinstance(row, dict):
        return row
    if isinstance(row, list) and row and all(isinstance(item, dict) and "role" in item for item in row):
        return {"messages": row}
    raise RowError(
        "not_an_object",
        f"a record must be an object with named fields, this is {_json_type(row)}. "
        'Write for instance {"instruction": "...", "output": "..."}.',
    )


def _json_type(value: object) -> str:
    names = {list: "an array", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)
