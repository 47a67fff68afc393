"""A window passes over the text of a JSON file: whole values are decoded from it, and memory stays bounded."""

from __future__ import annotations

import codecs
from typing import Any

from weft.data.reading.extent import Extent
from weft.data.reading.files import ByteSource
from weft.data.reading.rows import BROKEN, RowError, after_space, decode, not_utf8

_CHUNK = 1 << 20
PENDING = 4 << 20  # characters; a longer value is decoded only when its end was found


class Window:
    """A part of a file's text. Reading stands at ``at``. Lines and columns are counted in the whole file."""

    def __init__(self, file: ByteSource, limit: int) -> None:
        self.file, self.limit = file, limit
        self.text, self.at = "", 0
        self.ended = False
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")("surrogateescape")
        self._broken = False  # whether bytes that are not UTF-8 have been seen
        self._line, self._before, self._counted = 1, 0, 0  # the line at `_counted`; dropped characters of the line

    # -- text

    def seek(self, position: int) -> None:
        """Go on reading at ``position``."""
        self.at = position

    def skip(self) -> None:
        """Step over one character."""
        self.at += 1

    def more(self, size: int = _CHUNK) -> bool:
        """Drop what was read and take in more text; False at the end of the file."""
        # White space before a record stays, for it tells whether the record stands first on its line.
        newline = self.text.rfind("\n", 0, self.at)
        self.drop(newline if newline >= 0 and self.text[newline : self.at].isspace() else self.at)
        chunk = self._take(size)
        self.text += chunk
        return bool(chunk)

    def _take(self, size: int) -> str:
        """The next characters of the file; none if it has ended."""
        chunk = ""
        while not chunk and not self.ended:
            raw = self.file.read(size)
            self.ended = not raw
            chunk = self._decoder.decode(raw, self.ended)
        self._broken = self._broken or (not chunk.isascii() and BROKEN.search(chunk) is not None)
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
        """(line, column) of a position behind the last one that ``line`` was asked about."""
        newline = self.text.rfind("\n", 0, position)
        column = position - newline if newline >= 0 else position + self._before + 1
        return self._line + self.text.count("\n", self._counted, position), column

    def peek(self) -> str:
        """Skip white space and return the next character, or an empty string at the end."""
        while True:
            self.at = after_space(self.text, self.at)
            if self.at < len(self.text):
                return self.text[self.at]
            if not self.more():
                return ""

    # -- values

    def value(self, *, strict: bool = True) -> tuple[Any, int]:
        """Decode the value that begins here and stay before it: (value, its end). Raises RowError."""
        while True:
            if len(self.text) - self.at > min(PENDING, self.limit) and not self.ended:
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

    def take(self, *, strict: bool = True) -> tuple[Any, int, int]:
        """Decode the value that begins here and step over it: (value, its start, its end). Raises RowError."""
        value, end = self.value(strict=strict)
        start, self.at = self.at, end
        return value, start, end

    def _whole(self) -> None:
        """Take in the rest of the long value that begins here. One beyond the limit is stepped over and refused."""
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
        """Refuse bytes that are not UTF-8 in ``text[start:end]``."""
        if self._broken and (found := BROKEN.search(self.text, start, end)):
            raise not_utf8(self.text, found.start())
