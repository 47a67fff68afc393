"""Records of .json files of any size: the text passes through a window, from which whole values are decoded.

After a record that is no JSON, reading goes on where the next one begins for certain; where that is, see ``_resume``.
What cannot be read then is a problem of its own (``unread``): nothing is lost silently.
"""

from __future__ import annotations

import codecs
import re
from collections.abc import Iterator
from functools import lru_cache
from typing import Any

from weft.data.extent import Extent
from weft.data.files import Bytes
from weft.data.problems import Problem
from weft.data.rows import BROKEN, Record, RowError, as_fields, check_text, decode, not_utf8

_WRAPPERS = ("train", "data")
_SPACE = re.compile(r"[ \t\r\n]*")
_PROBE = 1 << 20  # characters in which a wrapper around the records is recognised
_CHUNK = 1 << 20
_PENDING = 4 << 20  # of a longer value its end is looked for before it is decoded


class Window:
    """A part of a file's text. ``at`` is where reading stands; lines and columns are those of the whole file."""

    def __init__(self, file: Bytes, limit: int) -> None:
        self.file, self.limit = file, limit
        self.text, self.at = "", 0
        self.ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
        self._broken = False  # whether bytes that are no UTF-8 have been seen
        self._first = True
        self._line, self._before, self._counted = 1, 0, 0  # line at `_counted`; characters of line 1 that were dropped

    # -- text

    def more(self, size: int = _CHUNK) -> bool:
        """Drop what was read and take in more; False at the end of the file."""
        # White space before a record stays: it tells whether the record stands first on its line.
        newline = self.text.rfind("\n", 0, self.at)
        self.drop(newline if newline >= 0 and self.text[newline : self.at].isspace() else self.at)
        chunk = self._take(size)
        self.text += chunk
        return bool(chunk)

    def _take(self, size: int) -> str:
        """The next characters of the file, some unless it has ended."""
        chunk = ""
        while not chunk and not self.ended:
            raw = self.file.read(size)
            self.ended = not raw
            chunk = self._decoder.decode(raw, self.ended)
        self._broken = self._broken or (not chunk.isascii() and BROKEN.search(chunk) is not None)
        if self._first and chunk:
            chunk, self._first = chunk.removeprefix("\ufeff"), False
            return chunk or self._take(size)
        return chunk

    def drop(self, to: int) -> None:
        """Forget the text before ``to``."""
        if not to:
            return
        if to > self._counted:
            self.line(to)
        newline = self.text.rfind("\n", 0, to)
        self._before = to - newline - 1 if newline >= 0 else self._before + to
        self.text, self.at, self._counted = self.text[to:], self.at - to, self._counted - to

    def line(self, position: int) -> int:
        """The line of ``position``, which is never before one asked about earlier."""
        self._line += self.text.count("\n", self._counted, position)
        self._counted = position
        return self._line

    def place(self, position: int) -> tuple[int, int]:
        """(line, column) of any position behind the last that ``line`` was asked about."""
        newline = self.text.rfind("\n", 0, position)
        column = position - newline if newline >= 0 else position + self._before + 1
        return self._line + self.text.count("\n", self._counted, position), column

    def peek(self) -> str:
        """Skip white space; the next character, or an empty string at the end."""
        while True:
            self.at = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    # -- values

    def value(self, *, strict: bool = True) -> tuple[Any, int]:
        """Decode the value that begins here, without stepping over it: (value, its end). Raises RowError."""
        while True:
            if len(self.text) - self.at > min(_PENDING, self.limit) and not self.ended:
                self._whole()
            try:
                value, end = decode(self.text, self.at, strict=strict)
            except RowError as fault:
                if fault.begun and not self.ended:
                    self.more(max(_CHUNK, len(self.text) - self.at))
                    continue
                if fault.at is not None and self._broken and (found := BROKEN.search(self.text, self.at, fault.at + 1)):
                    raise not_utf8(self.text, found.start(), broken=fault.broken) from None
                raise
            # A number that touches the end of the window may go on behind it.
            if end == len(self.text) and self.text[end - 1] not in '}]"' and not self.ended:
                self.more()
                continue
            if end - self.at > self.limit:
                self.at = end
                raise self._too_long()
            return value, end

    def _whole(self) -> None:
        """Take in the rest of the long value that begins here; step over one longer than the limit, and refuse it."""
        extent = Extent()
        parts = [self.text[self.at :]]
        seen, end = len(parts[0]), extent.feed(parts[0])
        while end is None and not self.ended and seen <= self.limit:
            parts.append(self._take(_CHUNK))
            seen, end = seen + len(parts[-1]), extent.feed(parts[-1])
        self.drop(self.at)
        if seen - (len(parts[-1]) - end if end is not None else 0) <= self.limit or self.ended:
            if len(parts) > 1:
                self.text = "".join(parts)
            return
        for part in parts:
            self.text, self.at = part, 0
            if part is not parts[-1]:
                self.drop(len(part))
        while end is None:
            self.at = len(self.text)
            if not self.more():
                break
            end = extent.feed(self.text)
        self.at = len(self.text) if end is None else end
        raise self._too_long("" if end is not None else " The file ends before the record does.")

    def _too_long(self, more: str = "") -> RowError:
        return RowError("too_long", f"the record that begins here is longer than {self.limit} characters, which is the "
                     f"limit. Split it.{more}")  # fmt: skip

    def check(self, start: int, end: int) -> None:
        """Refuse bytes that are no UTF-8 in ``text[start:end]``."""
        if self._broken and (found := BROKEN.search(self.text, start, end)):
            raise not_utf8(self.text, found.start())


class JsonFile:
    """The records of one .json file, in order, and a Problem in the place of each that cannot be read."""

    def __init__(self, file: Bytes, path: str, limit: int) -> None:
        self.window, self.path = Window(file, limit), path
        # How records begin: white space before them on their line; None as soon as one begins elsewhere.
        self._indent: str | None = None
        self._begun = self._aligned = self._stopped = False

    def items(self) -> Iterator[Record | Problem]:
        """All records; a wrapper around them is recognised."""
        window = self.window
        first = window.peek()
        if first == "[":
            yield from self._array()
        elif first == "{" and (array := self._wrapped()) is not None:
            window.at, whole = array
            yield from self._array()
            if not whole and not self._stopped:
                yield from self._after_wrapped()
            return
        else:
            yield from self._sequence()
            return
        if not self._stopped and window.peek():
            yield self._problem(RowError("unread", "malformed JSON: something follows the end of the array.",
                                      window.at))  # fmt: skip

    # -- the three shapes

    def _array(self) -> Iterator[Record | Problem]:
        window = self.window
        window.at += 1
        if window.peek() == "]":
            window.at += 1
            return
        while True:
            item, broken = self._item()
            yield item
            mark, resumed = window.peek(), False
            if not broken and mark not in (",", "]"):
                what = "malformed JSON: expected ',' or ']' after a record (is the file cut off?)."
                yield self._problem(RowError("malformed_json" if mark else "cut_off", what, window.at))
                broken = mark not in ("{", "[")
            if broken:
                if not self._resume(in_array=True):
                    if window.peek():
                        yield self._unread()
                    return
                mark, resumed = window.peek(), True
            if mark in ("{", "[") or (resumed and mark not in (",", "]")):
                continue
            window.at += 1
            if mark == "]":
                return
            if window.peek() == "]":
                what = "malformed JSON: a comma with no record after it."
                yield self._problem(RowError("malformed_json", what, window.at))
                window.at += 1
                return

    def _sequence(self) -> Iterator[Record | Problem]:
        """Objects one after another."""
        window = self.window
        while window.peek():
            item, broken = self._item()
            yield item
            if broken and not self._resume(in_array=False):
                if window.peek():
                    yield self._unread()
                return

    def _wrapped(self) -> tuple[int, bool] | None:
        """Where the array of ``{"train": [...]}`` or ``{"data": [...]}`` begins, and whether all of the file was seen.

        In a file that is larger than the probe the first such array is taken.
        """
        window = self.window
        while len(window.text) - window.at < _PROBE and window.more():
            pass
        text, start = window.text, window.at
        whole = window.ended
        found: dict[str, int] = {}
        at = start
        try:
            while True:
                at = _skip(text, at + 1)  # the brace, or the comma between two fields
                if text[at : at + 1] == "}":
                    break
                key, at = decode(text, at)
                at = _skip(text, at)
                if text[at : at + 1] != ":" or not isinstance(key, str):
                    return None
                at = _skip(text, at + 1)
                if key in _WRAPPERS and text[at : at + 1] == "[":
                    found[key] = at  # the last of two equal names is the one that counts, as in json.loads
                    if not whole:
                        return at, False
                at = decode(text, at, strict=False)[1]
                at = _skip(text, at)
                if text[at : at + 1] not in (",", "}"):
                    raise RowError("malformed_json", "")
                if text[at] == "}":
                    break
        except RowError:
            return (next(iter(found.values())), False) if found else None
        name = next((name for name in _WRAPPERS if name in found), None)
        if name is None or (text[at + 1 :].strip() and whole):
            return None
        return found[name], True

    def _after_wrapped(self) -> Iterator[Problem]:
        """What follows the array of a wrapper: other fields, which must be whole and hold no second array."""
        window = self.window
        try:
            while window.peek() == ",":
                window.at += 1
                window.peek()
                key, window.at = window.value()
                if window.peek() != ":":
                    raise RowError("malformed_json", "malformed JSON: expecting ':' delimiter.", window.at)
                window.at += 1
                if window.peek() == "[" and key in _WRAPPERS:
                    yield self._unread(f"a second array of records ('{key}')")
                window.at = window.value(strict=False)[1]
            if window.peek() != "}":
                what = "malformed JSON: expected '}' after the array (is the file cut off?)."
                raise RowError("cut_off", what, window.at)
        except RowError as fault:
            yield self._problem(fault)

    # -- one record

    def _item(self) -> tuple[Record | Problem, bool]:
        """The record that begins here, and a step over it; (problem, True): its end is not known, and no step."""
        window = self.window
        line = window.line(window.at)
        self._note_indent()
        try:
            try:
                value, end = window.value()
            except RowError as fault:
                if not fault.broken and fault.kind != "too_long":
                    window.at = window.value(strict=False)[1]  # a fault of meaning: the brackets tell where it ends
                raise fault
            start, window.at = window.at, end
            window.check(start, end)
            fields = as_fields(value)
            check_text(fields, window.text, start, end)
        except RowError as fault:
            return self._problem(self._own(fault), line), fault.broken
        self._note_lines(start, end)
        return Record(fields, f"{self.path}:{line}"), False

    def _own(self, fault: RowError) -> RowError:
        """``fault``, but not blamed on the next record where this one was not closed before it."""
        text, at = self.window.text, self.window.at
        if not fault.broken or fault.at is None or self._indent is None or not self._trusted():
            return fault
        if not _beginning(self._indent).search(text, at, fault.at + 1):
            return fault
        what = f"{fault.what} The record that begins here is not closed before the next one begins."
        return RowError(fault.kind, what, broken=True)

    def _problem(self, fault: RowError, line: int | None = None) -> Problem:
        column = None
        if fault.at is not None:
            line, column = self.window.place(fault.at)
        return Problem(fault.kind, self.path, fault.what, line, column)

    def _unread(self, what: str = "the rest of the file") -> Problem:
        self._stopped = True
        line, column = self.window.place(self.window.at)
        return Problem(
            "unread", self.path,
            f"{what} from here on is not read, for it is not certain where the next record begins. Mend what was "
            "reported before it.",
            line, column,
        )  # fmt: skip

    # -- going on after a broken record

    def _note_indent(self) -> None:
        """Whether the record that begins here stands first on its line, as the ones before it."""
        text, at = self.window.text, self.window.at
        if (self._begun and self._indent is None) or text[at : at + 1] not in ("{", "["):
            return
        newline = text.rfind("\n", 0, at)
        before = text[newline + 1 : at]
        first = not before.strip() and self.window.place(at)[1] == len(before) + 1
        if not self._begun:
            self._begun, self._indent = True, before if first else None
        elif not first or before != self._indent:
            self._indent = None

    def _note_lines(self, start: int, end: int) -> None:
        """A whole record within which no line begins as records do is evidence that only records begin so."""
        if self._indent is not None:
            self._aligned = True
            if _beginning(self._indent).search(self.window.text, start, end):
                self._indent = None

    def _resume(self, *, in_array: bool) -> bool:
        """Step to where the next record certainly begins, or the array ends. False: there is no such place.

        That is behind a comma too many; where records stand first on their lines, equally indented, the next line that
        begins so; else behind the brackets of the broken record, if they and its quotation marks match.
        """
        window = self.window
        if window.peek() == ",":
            window.at += 1
            if window.peek() in ("{", "]"):
                return True
        if self._indent is not None:
            return self._next_line(in_array)
        if window.peek() not in ("{", "["):
            return False
        while True:
            end = Extent(careful=True).feed(window.text[window.at :])
            if end is not None:
                window.at += max(end, 0)
                return end >= 0 and window.peek() in (",", "]") if in_array else window.peek() == "{"
            if len(window.text) - window.at > _PENDING or not window.more():
                return False

    def _next_line(self, in_array: bool) -> bool:
        window, indent = self.window, self._indent
        assert indent is not None
        if not self._trusted():
            return False
        while True:
            found = _beginning(indent, in_array).search(window.text, window.at)
            if found:
                window.at = found.end() - 1
                if window.text[window.at] == "]":
                    return True
                return bool(indent) or self._aligned or self._on_one_line()
            keep = len(indent) + 2  # a beginning may lie across the seam
            window.at = max(window.at, len(window.text) - keep)
            if not window.more():
                window.at = len(window.text)
                return False

    def _trusted(self) -> bool:
        """Whether lines indented as records are may be taken for their beginnings. Without any white space they may be
        inner ones, unless whole records have shown otherwise, or the broken one does not begin as one of many lines.
        """
        text, at = self.window.text, self.window.at
        return bool(self._indent) or self._aligned or text[at + 1 : at + 2] not in ("\n", "\r")

    def _on_one_line(self) -> bool:
        window = self.window
        start = window.at
        try:
            end = window.value()[1]
        except RowError:
            return False
        return "\n" not in window.text[start if window.at == start else window.at : end]


@lru_cache(maxsize=8)
def _beginning(indent: str, in_array: bool = False) -> re.Pattern[str]:
    """A line of that indentation that begins a value; in an array, also a less indented one that ends it."""
    ends = f"|\\n[ \\t]{{0,{max(len(indent) - 1, 0)}}}\\]" if in_array else ""
    return re.compile(f"\\n{re.escape(indent)}[^ \\t\\r\\n}}\\],:]{ends}")


def _skip(text: str, at: int) -> int:
    return _SPACE.match(text, at).end()  # type: ignore[union-attr]
