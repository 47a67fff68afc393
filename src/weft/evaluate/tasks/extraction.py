"""The answer that is in a text: all of it, its first line, its last number, its JSON, what an expression finds."""

from __future__ import annotations

import re

from weft.evaluate.tasks.settings import Extract
from weft.patterns import Pattern

_NUMBER = re.compile(r"[-+]?[$€£¥]?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")
_BEGINS = re.compile(r"[\[{]")


def extracted(text: str, how: Extract) -> str | None:
    """The answer that is in ``text``; None: there is none.

    Raises:
        UserError: An expression takes too long.
    """
    if how == "whole":
        return text.strip()
    if how == "first_line":
        return next((line.strip() for line in text.splitlines() if line.strip()), None)
    if how == "last_number":
        found = _NUMBER.findall(text)
        return found[-1] if found else None
    if how == "json":
        return _json(text)
    matches = Pattern(how.regex, "extract: regex").all(text)
    if not matches:
        return None
    match = matches[0 if how.take == "first" else -1]
    return next((one for one in match.groups() if one), match[0]).strip()


def _json(text: str) -> str | None:
    """The first object or array of JSON in a text: from its bracket to the one that closes it."""
    begin = _BEGINS.search(text)
    if begin is None:
        return None
    depth, quoted, escaped = 0, False, False
    for place in range(begin.start(), len(text)):
        mark = text[place]
        if quoted:
            quoted, escaped = escaped or mark != '"', not escaped and mark == "\\"
        elif mark == '"':
            quoted = True
        elif mark in "[{":
            depth += 1
        elif mark in "]}":
            depth -= 1
            if not depth:
                return text[begin.start() : place + 1]
    return None
