"""Find the end of a JSON value from its brackets and quotation marks alone, piece by piece."""

from __future__ import annotations

import re

_MARK = re.compile(r'["{}\[\]]')
_INSIDE = re.compile(r'[^"\\]*+(?:\\.[^"\\]*+)*+', re.DOTALL)  # of a string, up to its end or a last backslash
_CLOSES = {"{": "}", "[": "]"}


class Extent:
    """Follows one value through pieces of text; the first piece begins where the value does.

    ``careful`` is for values that are known to be malformed. Their end counts only if brackets match by kind, and if no
    string holds a line break or begins or ends where strings cannot.
    """

    def __init__(self, *, careful: bool = False) -> None:
        self._careful = careful
        self._depth = 0
        self._open: list[str] = []
        self._in_string = self._escaped = False

    def feed(self, text: str) -> int | None:
        """The place behind the value, counted in this piece; None if the value goes on; -1 if its end is not known."""
        at = 0
        while at < len(text):
            if self._in_string:
                at, begun = self._string(text, at), at
                if at < 0:
                    return None if not (self._careful and "\n" in text[begun:]) else -1
                if self._careful and ("\n" in text[begun:at] or not _after(text, at)):
                    return -1
                self._in_string = False
                if not self._depth:
                    return at
                continue
            mark = _MARK.search(text, at)
            if mark is None:
                return None
            at = mark.end()
            if mark[0] == '"':
                if self._careful and not _before(text, mark.start()):
                    return -1
                self._in_string, self._escaped = True, False
            elif mark[0] in _CLOSES:
                self._depth += 1
                if self._careful:
                    self._open.append(_CLOSES[mark[0]])
            else:
                if self._careful and (not self._open or self._open.pop() != mark[0]):
                    return -1
                self._depth -= 1
                if self._depth <= 0:
                    return at
        return None

    def _string(self, text: str, at: int) -> int:
        """The place behind the string that ``at`` lies in; -1 if the string goes on."""
        inside = _INSIDE.match(text, at + self._escaped)
        assert inside is not None
        end = inside.end()
        self._escaped = text[end : end + 1] == "\\"
        return end + 1 if text[end : end + 1] == '"' else -1


def _before(text: str, at: int) -> bool:
    """Whether a string can begin at ``at``."""
    return text[max(at - 64, 0) : at].rstrip()[-1:] in ("{", "[", ",", ":")


def _after(text: str, at: int) -> bool:
    """Whether a string can end before ``at``."""
    return text[at : at + 64].lstrip()[:1] in ("", ",", ":", "]", "}")
