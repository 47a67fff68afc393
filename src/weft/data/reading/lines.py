"""The lines of a file, whatever ends them, and the records of JSON Lines."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from weft.data.problems import Problem
from weft.data.reading.files import ByteSource
from weft.data.reading.rows import BROKEN, Record, RowError, after_space, as_fields, check_text, decode, not_utf8

_BOM = "\ufeff"
_PIECE = 1 << 20
_ENDS = (b"\n", b"\r")


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
    """The lines of a file: they end with a newline, a carriage return, or both.

    Nothing else splits them: ``str.splitlines`` would also split at U+2028 inside text. A byte order mark at the
    beginning of a line is dropped, for files are put end to end.
    """

    def __init__(self, file: ByteSource, path: str, limit: int) -> None:
        self.file, self.path, self.limit = file, path, limit

    def __iter__(self) -> Iterator[Line]:
        for number, raw in enumerate(self._raw(), start=1):
            if raw is None:
                what = f"the line is longer than {self.limit} bytes, which is the limit. Split the record."
                yield Line(number, "", RowError("too_long", what))
                continue
            try:
                yield Line(number, raw.decode("utf-8").lstrip(_BOM))
            except UnicodeDecodeError:
                text = raw.decode("utf-8", "surrogateescape").lstrip(_BOM)
                yield Line(number, text, not_utf8(text, BROKEN.search(text).start()))  # type: ignore[union-attr]

    def _raw(self) -> Iterator[bytes | None]:
        """The bytes of each line with its end; None for one that is too long, of which no more than that is held."""
        parts: list[bytes] = []  # of a line that goes on
        size, held = 0, b""
        while data := held + (chunk := self.file.read1(_PIECE)):
            held = b"\r" if chunk and data.endswith(b"\r") else b""  # a newline may follow
            for line in data[: len(data) - len(held)].splitlines(keepends=True):
                if not size and line.endswith(_ENDS):
                    yield line if len(line) <= self.limit + 2 else None
                    continue
                size += len(line)
                if size <= self.limit + 2:
                    parts.append(line)
                else:
                    parts = []
                if line.endswith(_ENDS):
                    yield b"".join(parts) or None
                    parts, size = [], 0
        if size:
            yield b"".join(parts) or None

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
