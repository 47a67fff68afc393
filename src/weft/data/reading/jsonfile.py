"""Records of .json files of any size: the text passes through a window, from which whole values are decoded.

After a malformed record, reading goes on where the next one certainly begins; ``_resume`` tells where that is. If there
is no such place, the rest is a problem of its own (``unread``): nothing is lost silently.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from functools import lru_cache

from weft.data.problems import Problem
from weft.data.reading.extent import Extent
from weft.data.reading.files import ByteSource
from weft.data.reading.rows import Record, RowError, after_space, as_fields, check_text, decode
from weft.data.reading.window import PENDING, Window

_WRAPPERS = ("train", "data", "rows", "records", "samples")
_PROBE = 1 << 20  # characters in which a wrapper around the records is recognised


class JsonFile:
    """The records of one .json file, in order, and a Problem in the place of each that cannot be read."""

    def __init__(self, file: ByteSource, path: str, limit: int) -> None:
        self.window, self.path = Window(file, limit), path
        # The white space before a record on its line; None as soon as one record begins otherwise.
        self._indent: str | None = None
        self._begun = self._aligned = self._stopped = False

    def items(self) -> Iterator[Record | Problem]:
        """All records; a wrapper around them is recognised."""
        window = self.window
        first = window.peek()
        if first == "[":
            yield from self._array()
        elif first == "{" and (array := self._wrapped()) is not None:
            start, whole = array
            window.seek(start)
            yield from self._array()
            if not whole and not self._stopped:
                yield from self._after_wrapped()
            return
        else:
            yield from self._sequence()
            return
        if not self._stopped and window.peek():
            yield self._problem_here("unread", "malformed JSON: something follows the end of the array.")

    # -- the three shapes

    def _array(self) -> Iterator[Record | Problem]:
        window = self.window
        window.skip()
        if window.peek() == "]":
            window.skip()
            return
        while True:
            item, broken = self._item()
            yield item
            mark, resumed = window.peek(), False
            if not broken and mark not in (",", "]"):
                what = "malformed JSON: expected ',' or ']' after a record (is the file cut off?)."
                yield self._problem_here("malformed_json" if mark else "cut_off", what)
                broken = mark not in ("{", "[")
            if broken:
                if not self._resume(in_array=True):
                    if window.peek():
                        yield self._unread()
                    return
                mark, resumed = window.peek(), True
            if mark in ("{", "[") or (resumed and mark not in (",", "]")):
                continue
            window.skip()
            if mark == "]":
                return
            if window.peek() == "]":
                yield self._problem_here("malformed_json", "malformed JSON: a comma with no record after it.")
                window.skip()
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
        """The place of the array in ``{"train": [...]}`` and its like, and whether the whole file was seen.

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
                at = after_space(text, at + 1)  # the brace, or the comma between two fields
                if text[at : at + 1] == "}":
                    break
                key, at = decode(text, at)
                at = after_space(text, at)
                if text[at : at + 1] != ":" or not isinstance(key, str):
                    return None
                at = after_space(text, at + 1)
                if key in _WRAPPERS and text[at : at + 1] == "[":
                    found[key] = at  # the last of two equal names is the one that counts, as in json.loads
                    if not whole:
                        return at, False
                at = decode(text, at, strict=False)[1]
                at = after_space(text, at)
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
        """Check what follows the array of a wrapper: other fields must be whole and hold no second array."""
        window = self.window
        try:
            while window.peek() == ",":
                window.skip()
                window.peek()
                key = window.take()[0]
                if window.peek() != ":":
                    raise RowError("malformed_json", "malformed JSON: expecting ':' delimiter.", window.at)
                window.skip()
                if window.peek() == "[" and key in _WRAPPERS:
                    yield self._unread(f"a second array of records ('{key}')")
                window.take(strict=False)
            if window.peek() != "}":
                what = "malformed JSON: expected '}' after the array (is the file cut off?)."
                raise RowError("cut_off", what, window.at)
        except RowError as fault:
            yield self._problem(fault)

    # -- one record

    def _item(self) -> tuple[Record | Problem, bool]:
        """The record that begins here, and a step over it. (problem, True): its end is not known, and nothing moved."""
        window = self.window
        line = window.line(window.at)
        self._note_indent()
        try:
            try:
                value, start, end = window.take()
            except RowError as fault:
                if not fault.broken and fault.kind != "too_long":
                    window.take(strict=False)  # the fault is one of meaning: the brackets tell where the record ends
                raise fault
            window.check(start, end)
            fields = as_fields(value)
            check_text(fields, window.text, start, end)
        except RowError as fault:
            return self._problem(self._own(fault), line), fault.broken
        self._note_lines(start, end)
        return Record(fields, f"{self.path}:{line}"), False

    def _own(self, fault: RowError) -> RowError:
        """``fault``, blamed on this record if it was not closed before the next one began."""
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
        return Problem(fault.kind, self.path, fault.what, line=line, column=column)

    def _problem_here(self, kind: str, what: str) -> Problem:
        return self._problem(RowError(kind, what, self.window.at))

    def _unread(self, what: str = "the rest of the file") -> Problem:
        self._stopped = True
        return self._problem_here(
            "unread",
            f"{what} from here on is not read, for it is not certain where the next record begins. Mend what was "
            "reported before it.",
        )

    # -- going on after a broken record

    def _note_indent(self) -> None:
        """Note whether the record that begins here stands first on its line, as those before it did."""
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
        """Note whether a whole record has lines that begin as records do. If none has, only records begin so."""
        if self._indent is not None:
            self._aligned = True
            if _beginning(self._indent).search(self.window.text, start, end):
                self._indent = None

    def _resume(self, *, in_array: bool) -> bool:
        """Step to where the next record certainly begins, or the array ends. False: there is no such place.

        The place is behind a comma too many. If records stand first on their lines and equally indented, it is the next
        line that begins so. Else it is behind the broken record, if its brackets and quotation marks match.
        """
        window = self.window
        if window.peek() == ",":
            window.skip()
            if window.peek() in ("{", "]"):
                return True
        if self._indent is not None:
            return self._next_line(in_array)
        if window.peek() not in ("{", "["):
            return False
        while True:
            end = Extent(careful=True).feed(window.text[window.at :])
            if end is not None:
                window.seek(window.at + max(end, 0))
                return end >= 0 and window.peek() in (",", "]") if in_array else window.peek() == "{"
            if len(window.text) - window.at > PENDING or not window.more():
                return False

    def _next_line(self, in_array: bool) -> bool:
        window, indent = self.window, self._indent
        assert indent is not None
        if not self._trusted():
            return False
        while True:
            found = _beginning(indent, in_array).search(window.text, window.at)
            if found:
                window.seek(found.end() - 1)
                if window.text[window.at] == "]":
                    return True
                return bool(indent) or self._aligned or self._on_one_line()
            keep = len(indent) + 2  # a beginning may lie across the seam
            window.seek(max(window.at, len(window.text) - keep))
            if not window.more():
                window.seek(len(window.text))
                return False

    def _trusted(self) -> bool:
        """Whether lines that are indented as records are count as their beginnings.

        Without white space such lines may lie inside a record, unless whole records have shown otherwise or the broken
        one does not begin as one of many lines.
        """
        text, at = self.window.text, self.window.at
        return bool(self._indent) or self._aligned or text[at + 1 : at + 2] not in ("\n", "\r")

    def _on_one_line(self) -> bool:
        try:
            end = self.window.value()[1]
        except RowError:
            return False
        return "\n" not in self.window.text[self.window.at : end]


@lru_cache(maxsize=8)
def _beginning(indent: str, in_array: bool = False) -> re.Pattern[str]:
    """Matches a line of that indentation that begins a value; in an array also a less indented one that ends it."""
    ends = f"|\\n[ \\t]{{0,{max(len(indent) - 1, 0)}}}\\]" if in_array else ""
    return re.compile(f"\\n{re.escape(indent)}[^ \\t\\r\\n}}\\],:]{ends}")
