"""Records of tables: .csv and .tsv files of any program, whatever separates their columns."""

from __future__ import annotations

import csv
import re
from collections.abc import Iterable, Iterator, Sequence
from itertools import chain
from typing import Any

from weft.data.problems import Problem
from weft.data.reading.lines import Line, Lines
from weft.data.reading.rows import Record, RowError, listed
from weft.errors import UserError

_MAX_CELL = 2**31 - 1  # one long document is longer than the csv module's own limit, 128 KiB
_LINE_COST = 512  # bytes that a remembered line takes besides its characters
_SEPARATORS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a vertical bar"}
_SAYS = re.compile(r"\"?sep=(.)\"?[\r\n]*", re.IGNORECASE | re.DOTALL)  # Excel's first line
_PEEK, _PEEKED = 50, 1 << 18  # lines, and characters in them, that choose the separator
_NUMBER = re.compile(r"\s*[+-]?\d*\.?\d*\s*")


class Header:
    """The names of a table's columns, and what becomes of the cells under them.

    Columns without a name are passed over while they hold numbers (a program's own count of the rows) or nothing.
    """

    def __init__(self, path: str, names: Sequence[str], line: int, hint: str = "") -> None:
        self.path, self.line, self.hint = path, line, hint
        self.cells = [one.strip() if not one.strip() else one for one in names]
        while self.cells and not self.cells[-1]:
            self.cells.pop()
        self.names = [name for name in self.cells if name]
        if not self.names or len(set(self.names)) < len(self.names):
            raise UserError(f"{path}:{line}: the first line must name the columns, each once; found {listed(names)}.")

    def record(self, cells: list[str], line: int) -> Record | Problem | None:
        """The record of a row; None for one that is empty, or is the header again (files were put end to end)."""
        named = self.cells
        if len(cells) > 1 and not any(map(str.strip, cells)):
            return None
        while len(cells) > len(named) and not cells[-1].strip():
            cells = cells[:-1]
        if cells == named and len(named) > 1:
            return None
        if len(cells) != len(named):
            where = f"the header (line {self.line}) names" if self.line else "expected are"
            what = f"{len(cells)} cells where {where} {len(named)} columns: {listed(named)}{self.hint}."
            return Problem("row_width", self.path, what, line=line)
        for name, cell in zip(named, cells, strict=True):
            if not name and not _NUMBER.fullmatch(cell):
                what = f"a cell says {cell[:40]!r} in a column that the header (line {self.line}) does not name."
                return Problem("row_width", self.path, what, line=line)
        found = {name: _lines(cell) for name, cell in zip(named, cells, strict=True) if name}
        return Record(dict(found), f"{self.path}:{line}")


def _lines(cell: str) -> str:
    """The text of a cell, whose lines end as in any other text."""
    return cell.replace("\r\n", "\n").replace("\r", "\n") if "\r" in cell else cell


def read_table(lines: Lines, names: Sequence[str] | None, *, tabs: bool) -> Iterator[Record | Problem]:
    """One record per row under the header row, or under ``names``.

    Raises:
        UserError: The first line does not name the columns, each once, or it is not clear what separates them.
    """
    hint = " (a .tsv file has no quoting: save as .csv if cells hold tabs or line breaks)" if tabs else ""
    header = Header(lines.path, names, 0, hint) if names else None
    for row in table_rows(lines, tabs=tabs):
        if isinstance(row, Problem):
            if header is None:
                raise UserError(f"{row} This is the line that names the columns.")
            yield row
            continue
        line, cells = row
        if header is None:
            other = next((mark for mark in ",;|" if tabs and len(cells) == 1 and mark in cells[0]), None)
            if other is not None:
                raise UserError(
                    f"{lines.path}:{line}: a tab separates the columns of a .tsv file, here it seems to be "
                    f"{_SEPARATORS[other]}. Rename the file to end in .csv."
                )
            header = Header(lines.path, cells, line, hint)
        elif (item := header.record(cells, line)) is not None:
            yield item


def _separator(lines: Iterable[Line], path: str, tabs: bool) -> tuple[str, Iterator[Line]]:
    """What separates the columns, and the lines of the table.

    Excel's line ``sep=;`` says it. Otherwise it is the only one that splits the header, or of several the only one by
    which all rows have as many cells as the header.

    Raises:
        UserError: Several fit.
    """
    rest = iter(lines)
    first = next(rest, None)
    if first is not None and (said := _SAYS.fullmatch(first.text)):
        return said[1], rest
    head = [] if first is None else [first]
    if tabs or first is None:
        return "\t", chain(head, rest)
    size, ended = len(first.text), True
    for line in rest:
        head.append(line)
        size += len(line.text)
        if len(head) >= _PEEK or size > _PEEKED:
            ended = False
            break
    widths = {mark: _widths(head, mark, ended) for mark in _SEPARATORS}
    fitting = [mark for mark, found in widths.items() if found and found[0] > 1]
    even = [mark for mark in fitting if len(set(widths[mark])) == 1]
    if len(even) > 1 or (len(fitting) > 1 and not even and "," not in fitting):
        what = " or ".join(_SEPARATORS[mark] for mark in even or fitting)
        raise UserError(
            f"{path}:{first.number}: {what} could separate the columns. Say which by a first line such as "
            f"`sep={(even or fitting)[0]}`."
        )
    chosen = even or [mark for mark in fitting if mark == ","] or fitting or [","]
    return chosen[0], chain(head, rest)


def _widths(head: Sequence[Line], mark: str, ended: bool) -> list[int]:
    """The numbers of cells of the first rows."""
    limit = csv.field_size_limit(_MAX_CELL)
    try:
        found = [len(row) for row in csv.reader((line.text for line in head), delimiter=mark) if row]
    except csv.Error:
        return []
    finally:
        csv.field_size_limit(limit)
    return found if ended or len(found) < 2 else found[:-1]  # the last row may go on


class _Feed:
    """Hands lines to the csv reader and remembers the lines of the current row, so that they can be read again."""

    def __init__(self, lines: Iterator[Line], limit: int) -> None:
        self.lines, self.limit = lines, limit
        self.again: list[Line] = []  # in reverse
        self.row: list[Line] = []
        self.size = 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self.again.pop() if self.again else next(self.lines)
        self.row.append(line)
        self.size += len(line.text) + _LINE_COST
        if line.fault is not None and line.fault.kind == "too_long":
            raise line.fault
        if self.size > self.limit:
            raise RowError("too_long", f"the row that begins here is longer than {self.limit} characters, which is the "
                        "limit (is a quotation mark left open?).")  # fmt: skip
        return line.text

    def begin(self) -> None:
        """A new row begins."""
        self.row, self.size = [], 0

    def back(self) -> None:
        """Read all lines of the row but its first again."""
        self.again += self.row[:0:-1]


def table_rows(lines: Lines, *, tabs: bool) -> Iterator[tuple[int, list[str]] | Problem]:
    """Rows that are not blank, each with the line where it begins (a quoted cell may span lines).

    A .csv is quoted as spreadsheets do. In a .tsv a quotation mark is a character like any other.

    Raises:
        UserError: It is not clear what separates the columns.
    """
    separator, rest = _separator(lines, lines.path, tabs)
    options: dict[str, Any] = {"delimiter": separator, **({"quoting": csv.QUOTE_NONE} if tabs else {"strict": True})}
    feed = _Feed(rest, lines.limit)
    reader = csv.reader(feed, **options)
    while True:
        feed.begin()
        limit = csv.field_size_limit(_MAX_CELL)  # process-wide, hence put back around every row
        try:
            row = next(reader, None)
        except (csv.Error, RowError) as error:
            yield _bad_row(lines, feed, error, separator)
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


def _bad_row(lines: Lines, feed: _Feed, error: csv.Error | RowError, separator: str) -> Problem:
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
    left_open = len(feed.row) > 1 and ("end of data" in str(error) or _left_open(last.text, separator))
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


def _left_open(text: str, separator: str) -> bool:
    """Whether the quotation mark that ended a swallowed stretch in this line stands where a cell begins."""
    quote = text.find('"')
    return quote == 0 or (quote > 0 and text[quote - 1] == separator)
