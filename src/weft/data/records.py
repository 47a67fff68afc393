"""Read data files into records, each of which knows the line that it came from.

Every reader counts lines itself, so that a complaint about record 31,000 of a JSON array points at a line that the
user can open. Nothing here knows what the fields mean: that is ``weft.data.formats``.
"""

from __future__ import annotations

import csv
import io
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, NoReturn

from weft.errors import UserError

TABLES = (".csv", ".tsv")
SUFFIXES = (".json", ".jsonl", *TABLES, ".txt")
_WRAPPERS = ("train", "data")
_SPACE = re.compile(r"[ \t\r\n]*")
_BOM = b"\xef\xbb\xbf"
_MAX_CELL = 2**31 - 1  # the csv module's own limit, 128 KiB, is less than one long document


@dataclass(frozen=True, slots=True)
class Record:
    """One row of a data file. ``source`` is ``"path:line"``: the 1-based line where the record begins."""

    fields: dict[str, Any]
    source: str


def read_records(
    path: str | os.PathLike[str], *, limit: int | None = None, header: Sequence[str] | None = None
) -> list[Record]:
    """Read the first ``limit`` records (all by default) of a .json, .jsonl, .csv, .tsv or .txt file, in file order.

    A .json file may hold an array of objects, an object with such an array under ``train`` or ``data``, one object,
    or objects one after another (JSON Lines under the wrong suffix). A row that is a list of messages is taken as
    ``{"messages": row}``. ``header`` names the columns of a table whose file does not.
    Raises UserError for a file that cannot be read, and for the first malformed record.
    """
    if limit is not None and limit < 1:
        raise UserError(f"limit is {limit}: give the number of records to read, 1 or more (or leave it out for all).")
    file = _existing(path)
    suffix = file.suffix.lower()
    try:
        reader = _read_table(file, header) if suffix in TABLES else _READERS[suffix](file)
        records = list(islice(reader, limit))
        empty = not records and file.stat().st_size == 0
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error
    if not records:
        what = "the file is empty" if empty else "the file holds no records"
        raise UserError(f"{path}: {what}; expected at least one record.")
    return records


def first_rows(path: str | os.PathLike[str], count: int) -> list[list[str]]:
    """The first rows of a .csv or .tsv file as they stand, the header among them; of other files none."""
    file = _existing(path)
    if file.suffix.lower() not in TABLES:
        return []
    try:
        return [row for _, row in islice(_rows(file), count)]
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror or error}.") from error


def _existing(path: str | os.PathLike[str]) -> Path:
    """The file at ``path``, which exists and has a suffix that is read."""
    file = Path(path)
    if file.is_dir():
        raise UserError(f"{path} is a directory: give one data file ({', '.join(SUFFIXES)}).")
    if not file.exists():
        raise UserError(f"{path} does not exist: check the path of the data file (it is relative to {_here()}).")
    if file.suffix.lower() not in SUFFIXES:
        raise UserError(
            f"{path}: files ending in '{file.suffix}' are not read. Known: {', '.join(SUFFIXES)}. "
            "Convert the file, for instance to JSON Lines (.jsonl: one object per line)."
        )
    return file


def _here() -> str:
    return "the current directory"


def _decode(raw: bytes, path: Path, first_line: int = 1) -> str:
    """UTF-8 to text; ``first_line`` is the number of the line at which ``raw`` begins."""
    if first_line == 1:
        raw = raw.removeprefix(_BOM)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        line = first_line + raw.count(b"\n", 0, error.start)
        raise UserError(
            f"{path}:{line}: byte 0x{raw[error.start]:02x} is not UTF-8. Save the file as UTF-8, "
            "for instance with `iconv -f <its encoding> -t utf-8`."
        ) from None


def _lines(path: Path) -> Iterator[tuple[int, str]]:
    """Lines with their numbers, split at newlines only: ``str.splitlines`` would also split at U+2028 inside text."""
    with path.open("rb") as file:
        for number, raw in enumerate(file, start=1):
            yield number, _decode(raw, path, number).rstrip("\r\n")


# ---------------------------------------------------------------------------------------------------------------- JSON


def _reject_constant(name: str) -> NoReturn:
    raise _NotANumberError(name)


class _NotANumberError(Exception):
    """NaN or an infinity, which Python's json accepts and JSON does not have."""


_DECODER = json.JSONDecoder(parse_constant=_reject_constant)


class _Scanner:
    """Walks over one JSON text, remembering the line of the furthest place asked about (so counting stays linear)."""

    def __init__(self, text: str, path: Path, first_line: int = 1) -> None:
        self.text, self.path, self.first_line = text, path, first_line
        self.at = 0
        self._counted_to, self._line = 0, first_line

    def line(self, position: int) -> int:
        """The line of ``position``, which never goes back."""
        self._line += self.text.count("\n", self._counted_to, position)
        self._counted_to = position
        return self._line

    def peek(self) -> str:
        """Skip white space; the next character, or an empty string at the end."""
        self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
        return self.text[self.at : self.at + 1]

    def fail(self, what: str, position: int) -> NoReturn:
        line = self.first_line + self.text.count("\n", 0, position)
        column = position - self.text.rfind("\n", 0, position)
        raise UserError(f"{self.path}:{line}:{column}: malformed JSON: {what}.")

    def value(self) -> Any:
        """Decode the value that begins here and step over it."""
        start = self.at
        try:
            value, self.at = _DECODER.raw_decode(self.text, start)
        except json.JSONDecodeError as error:
            self.fail(error.msg[:1].lower() + error.msg[1:], error.pos)
        except _NotANumberError as error:
            raise UserError(
                f"{self.path}:{self.line(start)}: the record that begins here holds {error}, which JSON does not have. "
                "Use null or leave the field out."
            ) from None
        except RecursionError:
            raise UserError(f"{self.path}:{self.line(start)}: the JSON here is nested too deeply to be read.") from None
        except ValueError as error:  # an integer of more than 4,300 digits
            raise UserError(f"{self.path}:{self.line(start)}: the JSON here cannot be read: {error}.") from None
        return value

    def record(self) -> Record:
        """Decode one row."""
        start, line = self.at, self.line(self.at)
        row, source = self.value(), f"{self.path}:{line}"
        if any(self.text.find(escape, start, self.at) >= 0 for escape in ("\\ud", "\\uD")):
            _check_surrogates(row, source)
        return Record(_as_fields(row, source), source)

    def array(self) -> Iterator[Record]:
        """The rows of the array that begins here."""
        self.at += 1
        if self.peek() == "]":
            self.at += 1
            return
        while True:
            yield self.record()
            mark = self.peek()
            if mark not in (",", "]") or not mark:
                self.fail("expected ',' or ']' after a record (is the file cut off?)", self.at)
            self.at += 1
            if mark == "]":
                return
            if self.peek() == "]":
                self.fail("a comma with no record after it", self.at)


def _as_fields(row: Any, source: str) -> dict[str, Any]:
    if isinstance(row, dict):
        return row
    if isinstance(row, list) and row and all(isinstance(item, dict) and "role" in item for item in row):
        return {"messages": row}
    raise UserError(
        f"{source}: a record must be an object with named fields, this is {_json_type(row)}. "
        'Write for instance {"instruction": "...", "output": "..."}.'
    )


def _json_type(value: Any) -> str:
    names = {list: "an array", str: "a string", bool: "true/false", int: "a number", float: "a number"}
    return names.get(type(value), "null" if value is None else type(value).__name__)


def _check_surrogates(row: Any, source: str) -> None:
    """Half of a UTF-16 pair is legal in JSON but is no character: tokenizers fail on it far from here."""
    try:
        json.dumps(row, ensure_ascii=False).encode("utf-8")
    except UnicodeEncodeError as error:
        escape = f"\\u{ord(error.object[error.start]):04x}"
        raise UserError(
            f"{source}: a string of this record holds {escape} alone, half of a character. Repair or remove it."
        ) from None


def _read_json(path: Path) -> Iterator[Record]:
    scan = _Scanner(_decode(path.read_bytes(), path), path)
    first = scan.peek()
    if first == "[":
        yield from scan.array()
    elif first == "{" and (start := _wrapped_array(scan.text, scan.at)) is not None:
        scan.at = start
        yield from scan.array()
        return
    else:
        while scan.peek():
            yield scan.record()
        return
    if scan.peek():
        scan.fail("something follows the end of the array", scan.at)


def _wrapped_array(text: str, start: int) -> int | None:
    """Where the array of ``{"train": [...]}`` or ``{"data": [...]}`` begins, if ``text`` is one such object alone."""
    try:
        whole, end = _DECODER.raw_decode(text, start)
    except (ValueError, RecursionError, _NotANumberError):
        return _broken_wrapper(text, start)
    name = next((name for name in _WRAPPERS if isinstance(whole.get(name), list)), None)
    if name is None or text[end:].strip():
        return None
    scan = _Scanner(text, Path())
    scan.at, found = start, None
    while scan.peek() != "}":
        scan.at += 1  # the brace, or the comma between two fields
        scan.peek()
        key = scan.value()
        scan.peek()
        scan.at += 1
        scan.peek()
        if key == name:
            found = scan.at  # the last of two equal names is the one that counts, as in json.loads
        scan.value()
    return found


def _broken_wrapper(text: str, start: int) -> int | None:
    """The array of a wrapper that does not parse as a whole, so that ``limit`` and the error's line still work."""
    match = re.compile(r'\{\s*"(?:train|data)"\s*:\s*(?=\[\s*\{)').match(text, start)
    return match.end() if match else None


def _read_jsonl(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        scan = _Scanner(line, path, number)
        if not scan.peek():
            continue
        try:
            record = scan.record()
        except UserError as error:
            if line.strip() in ("[", "{"):
                raise UserError(
                    f"{path}:{number}: a .jsonl file holds one whole object per line; this one seems to be a JSON "
                    "file spread over lines. Rename it to .json."
                ) from None
            raise error
        if scan.peek():
            scan.fail("something follows the object; a .jsonl file holds one object per line", scan.at)
        yield record


# ------------------------------------------------------------------------------------------------------ tables and text


def _read_table(path: Path, names: Sequence[str] | None) -> Iterator[Record]:
    rows = _rows(path)
    header_line, header = (0, list(names)) if names else next(rows, (1, []))
    if not header:
        return
    if len(set(header)) < len(header) or "" in header:
        raise UserError(
            f"{path}:{header_line}: the first line must name the columns, each once; found {', '.join(header)!r}."
        )
    hint = " (a .tsv file has no quoting: save as .csv if cells hold tabs or line breaks)"
    for line, row in rows:
        if len(row) != len(header):
            named = f"the header (line {header_line}) names" if header_line else "expected are"
            raise UserError(
                f"{path}:{line}: {len(row)} cells where {named} {len(header)} columns: "
                f"{', '.join(header)}{hint if _tabs(path) else ''}."
            )
        yield Record(dict(zip(header, row, strict=True)), f"{path}:{line}")


def _tabs(path: Path) -> bool:
    return path.suffix.lower() == ".tsv"


def _rows(path: Path) -> Iterator[tuple[int, list[str]]]:
    """Rows that are not blank, each with the line where it begins (a quoted cell may span lines).

    A .csv is quoted as spreadsheets do; a .tsv has no quoting: a quotation mark there is a character like another.
    """
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if _tabs(path) else {"strict": True}
    reader = csv.reader(io.StringIO(_decode(path.read_bytes(), path), newline=""), **options)
    while True:
        line = reader.line_num + 1
        limit = csv.field_size_limit(_MAX_CELL)  # process-wide, hence put back around every row
        try:
            row = next(reader, None)
        except csv.Error as error:
            raise UserError(
                f"{path}:{line}: malformed table row: {error}. Expected one row per record, cells that hold "
                'the separator, a line break or a quotation mark enclosed in "..." with inner marks doubled.'
            ) from None
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        if row:
            yield line, row


def _read_txt(path: Path) -> Iterator[Record]:
    for number, line in _lines(path):
        if line.strip():
            yield Record({"text": line}, f"{path}:{number}")


_READERS = {".json": _read_json, ".jsonl": _read_jsonl, ".txt": _read_txt}
