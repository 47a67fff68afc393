"""Records of files that are read line by line: JSON Lines, tables, text."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

from weft.data.problems import Problem
from weft.data.reading.files import ByteSource
from weft.data.reading.rows import BROKEN, Record, RowError, after_space, as_fields, check_text, decode, not_utf8
from weft.errors import UserError

_BOM = b"\xef\xbb\xbf"
_PIECE = 1 << 20
_MAX_CELL = 2**31 - 1  # one long document is longer than the csv module's own limit, 128 KiB
_LINE_COST = 512  # bytes that a remembered line takes besides its characters
_LINE_END = re.compile("(?<=\r)(?!\n)")  # the csv module counts a lone carriage return as the end of a line


@dataclass(frozen=True, slots=True)
class Line:
    """One line with its end; ``fault`` if it cannot be text."""

    number: int
    text: str
    fault: RowError | None = None

    def text_fault(self) -> RowError | None:
        """What makes the line no text: its ``fault``, or a NUL character."""
        nul = self.text.find("\0")
        if self.fault is not None or nul < 0:
            return self.fault
        return RowError("nul", "a NUL character, which no text has. Remove it (is this a text file?).", nul)


class Lines:
    """The lines of a file. Only newlines split them: ``str.splitlines`` would also split at U+2028 inside text."""

    def __init__(self, file: ByteSource, path: str, limit: int) -> None:
        self.file, self.path, self.limit = file, path, limit

    def __iter__(self) -> Iterator[Line]:
        number, limit = 0, self.limit
        while raw := self.file.readline(limit + 1):
            number += 1
            if number == 1:
                raw = raw.removeprefix(_BOM)
            if len(raw) > limit and not raw.endswith(b"\n"):
                del raw
                yield Line(number, "", self._skip())
                continue
            try:
                text = raw.decode("utf-8")
            except UnicodeDecodeError:
                text = raw.decode("utf-8", "surrogateescape")
                yield Line(number, text, not_utf8(text, BROKEN.search(text).start()))  # type: ignore[union-attr]
                continue
            yield Line(number, text)

    def _skip(self) -> RowError:
        """Read to the end of a line that is too long, in pieces."""
        while (piece := self.file.readline(_PIECE)) and not piece.endswith(b"\n"):
            pass
        return RowError(
            "too_long", f"the line is longer than {self.limit} bytes, which is the limit. Split the record."
        )

    def problem(self, line: int, fault: RowError) -> Problem:
        """``fault`` in the line of that number."""
        column = None if fault.at is None else fault.at + 1
        return Problem(fault.kind, self.path, fault.what, line=line, column=column)


def read_jsonl(lines: Lines) -> Iterator[Record | Problem]:
    """One record per line that is not blank."""
    for line in lines:
        start = after_space(line.text)
        if start == len(line.text) and line.fault is None:
            continue
        try:
            if line.fault is not None:
                raise line.fault
            yield Record(_json_row(line.text.rstrip("\r\n"), start), f"{lines.path}:{line.number}")
        except RowError as fault:
            if line.text.strip() in ("[", "{"):
                fault = RowError(
                    fault.kind,
                    "a .jsonl file holds one whole object per line; this one seems to be a JSON file spread over "
                    "lines. Rename it to .json.",
                )
            yield lines.problem(line.number, fault)


def _json_row(text: str, start: int) -> dict[str, Any]:
    value, end = decode(text, start)
    fields = as_fields(value)
    check_text(fields, text, start, end)
    end = after_space(text, end)
    if end < len(text):
        what = "malformed JSON: something follows the object; a .jsonl file holds one object per line."
        raise RowError("malformed_json", what, end)
    return fields


def read_txt(lines: Lines) -> Iterator[Record | Problem]:
    """One record per line that is not blank."""
    for line in lines:
        if (fault := line.text_fault()) is not None:
            yield lines.problem(line.number, fault)
        elif line.text.strip():
            yield Record({"text": line.text.rstrip("\r\n")}, f"{lines.path}:{line.number}")


# --------------------------------------------------------------------------------------------------------------- tables


def read_table(lines: Lines, names: Sequence[str] | None, *, tabs: bool) -> Iterator[Record | Problem]:
    """One record per row under the header row, or under ``names``.

    Raises:
        UserError: The first line does not name the columns, each once.
    """
    rows = table_rows(lines, tabs=tabs)
    header_line, header = (0, list(names)) if names else (0, [])
    hint = " (a .tsv file has no quoting: save as .csv if cells hold tabs or line breaks)" if tabs else ""
    for row in rows:
        if isinstance(row, Problem):
            if not header:
                raise UserError(f"{row} This is the line that names the columns.")
            yield row
            continue
        line, cells = row
        if not header:
            header_line, header = line, cells
            if len(set(header)) < len(header) or "" in header:
                found = ", ".join(header)
                raise UserError(
                    f"{lines.path}:{line}: the first line must name the columns, each once; found {found!r}."
                )
        elif len(cells) != len(header):
            named = f"the header (line {header_line}) names" if header_line else "expected are"
            what = f"{len(cells)} cells where {named} {len(header)} columns: {', '.join(header)}{hint}."
            yield Problem("row_width", lines.path, what, line=line)
        else:
            yield Record(dict(zip(header, cells, strict=True)), f"{lines.path}:{line}")


class _Feed:
    """Hands lines to the csv reader and remembers the lines of the current row, so that they can be read again."""

    def __init__(self, lines: Lines) -> None:
        self.lines = iter(lines)
        self.limit = lines.limit
        self.again: list[Line] = []  # in reverse
        self.row: list[Line] = []
        self.size = self.counted = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.pop() if self.again else self._next()
        self.row.append(line)
        self.size += len(line.text) + _LINE_COST
        if line.fault is not None and line.fault.kind == "too_long":
            raise line.fault
        if self.size > self.limit:
            raise RowError("too_long", f"the row that begins here is longer than {self.limit} characters, which is the "
                        "limit (is a quotation mark left open?).")  # fmt: skip
        return line.text

    def _next(self) -> Line:
        line = next(self.lines)
        # Numbered as the csv module counts: a lone carriage return ends a line too.
        pieces = _LINE_END.split(line.text) if "\r" in line.text.rstrip("\r\n") else [line.text]
        pieces = [piece for piece in pieces if piece] or [""]
        first = line.number + self.counted
        self.counted += len(pieces) - 1
        self.again = [Line(first + n, piece, line.fault) for n, piece in enumerate(pieces)][:0:-1]
        return Line(first, pieces[0], line.fault)

    def begin(self) -> None:
        """A new row begins."""
        self.row, self.size = [], 0

    def back(self) -> None:
        """Read all lines of the row but its first again."""
        self.again += self.row[:0:-1]


def table_rows(lines: Lines, *, tabs: bool) -> Iterator[tuple[int, list[str]] | Problem]:
    """Rows that are not blank, each with the line where it begins (a quoted cell may span lines).

    A .csv is quoted as spreadsheets do. In a .tsv a quotation mark is a character like any other.
    """
    options: dict[str, Any] = {"delimiter": "\t", "quoting": csv.QUOTE_NONE} if tabs else {"strict": True}
    feed = _Feed(lines)
    reader = csv.reader(feed, **options)
    while True:
        feed.begin()
        limit = csv.field_size_limit(_MAX_CELL)  # process-wide, hence put back around every row
        try:
            row = next(reader, None)
        except (csv.Error, RowError) as error:
            yield _bad_row(lines, feed, error)
            reader = csv.reader(feed, **options)
            continue
        finally:
            csv.field_size_limit(limit)
        if row is None:
            return
        faults = [(line.number, fault) for line in feed.row if (fault := line.text_fault()) is not None]
        if faults:
            yield lines.problem(*faults[0])
        elif row:
            yield feed.row[0].number, row


def _bad_row(lines: Lines, feed: _Feed, error: csv.Error | RowError) -> Problem:
    """Say what is wrong with the row, and go to where the next one begins.

    A quotation mark that was left open swallows lines up to the next mark, which then stands where a cell begins. In
    that case all lines but the first are read again. Otherwise the swallowed lines belong to a long cell.
    """
    first, last = feed.row[0], feed.row[-1]
    if isinstance(error, RowError):
        if len(feed.row) > 1 and last.fault is None:
            feed.back()
            return lines.problem(first.number, error)
        return lines.problem(last.number, error)
    left_open = len(feed.row) > 1 and ("end of data" in str(error) or _left_open(last.text))
    broken = next(((line.number, line.fault) for line in feed.row if line.fault), None)
    if broken is not None and not left_open:
        return lines.problem(*broken)
    what = (
        f"malformed table row: {error}. Expected one row per record, cells that hold the separator, a line break or a "
        'quotation mark enclosed in "..." with inner marks doubled.'
    )
    if left_open:
        feed.back()
    elif len(feed.row) > 1:
        what += f" The lines up to {last.number} belong to it and are not read."
    return Problem("malformed_row", lines.path, what, line=first.number)


def _left_open(text: str) -> bool:
    """Whether the quotation mark that ended a swallowed stretch in this line stands where a cell begins."""
    quote = text.find('"')
    return quote == 0 or (quote > 0 and text[quote - 1] == ",")
