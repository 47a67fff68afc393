"""Records of plain text: a whole file, a paragraph, or a line is one text to learn."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

from weft.data.problems import Problem
from weft.data.reading.lines import Line, Lines
from weft.data.reading.rows import Record, RowError

TextUnit = Literal["file", "paragraph", "line"]


def read_texts(lines: Lines, unit: TextUnit) -> Iterator[Record | Problem]:
    """One record per ``unit``; blank lines separate paragraphs. A text with a bad line is a Problem.

    A file without a blank line is one paragraph.
    """
    if unit == "line":
        yield from _each_line(lines)
        return
    text = _Text(lines)
    before = ""
    for line in lines:
        # A file whose line ends were converted twice has \r\r\n, and no blank line.
        doubled = line.text == "\r\n" and before.endswith("\r")
        before = line.text
        if doubled:
            continue
        if line.text.strip() or line.fault is not None:
            text.add(line)
        elif unit == "file":
            text.blank(line)
        elif (item := text.end()) is not None:
            yield item
    if (item := text.end()) is not None:
        yield item


def _each_line(lines: Lines) -> Iterator[Record | Problem]:
    for line in lines:
        if (fault := line.text_fault()) is not None:
            yield lines.problem(line.number, fault)
        elif line.text.strip():
            yield Record({"text": line.text.rstrip("\r\n")}, f"{lines.path}:{line.number}")


class _Text:
    """The text that is being read. Of one that is too long, or has a bad line, only the fault is kept."""

    def __init__(self, lines: Lines) -> None:
        self.lines = lines
        self._begin()

    def _begin(self) -> None:
        self.parts: list[str] = []
        self.first = self.size = self.blanks = 0
        self.fault: Problem | None = None

    def add(self, line: Line) -> None:
        """Take in a line that is not blank."""
        self.first = self.first or line.number
        if self.fault is not None:
            return
        self.size += len(line.text) + self.blanks
        if (fault := line.text_fault()) is not None:
            self.fault = self.lines.problem(line.number, fault)
        elif self.size > self.lines.limit:
            what = (
                f"the text that begins here is longer than {self.lines.limit} characters, which is the limit. Separate "
                "its parts by blank lines (`text_unit: paragraph`), or learn every line by itself (`text_unit: line`)."
            )
            self.fault = self.lines.problem(self.first, RowError("too_long", what))
        self.parts = [] if self.fault is not None else self.parts
        if self.fault is None:
            self.parts += [""] * self.blanks
            self.parts.append(line.text.rstrip("\r\n"))
        self.blanks = 0

    def blank(self, line: Line) -> None:
        """Take in a blank line, which counts if more text follows."""
        self.blanks += bool(self.first)

    def end(self) -> Record | Problem | None:
        """What the text became; None if there was none. The next one begins."""
        first, text, fault = self.first, "\n".join(self.parts), self.fault
        self._begin()
        if fault is not None or not first:
            return fault
        return Record({"text": text}, f"{self.lines.path}:{first}")
