"""Names, and regular expressions from files: with a limit of time, because some would run for ever.

A pattern like ``(a+)+$`` takes twice as long with every character. Python's own ``re`` cannot be stopped. The package
``regex`` (which transformers needs too) reads the same patterns and can be stopped.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator
from functools import lru_cache
from typing import TypeVar

import regex

from weft.errors import UserError

SECONDS = 1.0  # for all modules of a model in sum
LONGEST = 20_000  # characters
_LOOK = "aAz_09.,!( \n\r\té漢字؟🧵'-\u0300"

_Found = TypeVar("_Found")


class Pattern:
    """One pattern; ``where`` names its place in errors, such as ``target_modules``.

    Raises:
        UserError: It is no regular expression, or (from ``full`` and ``begins``) takes too long.
    """

    def __init__(self, text: str, where: str) -> None:
        self.where, self.text = where, text
        if len(text) > LONGEST:
            raise UserError(f"{where} is a pattern of {len(text)} characters; at most {LONGEST} are read.")
        try:
            self._compiled = regex.compile(text)
        except (regex.error, RecursionError, OverflowError, MemoryError, ValueError) as error:
            raise UserError(f"{where} {_short(text)} is no regular expression: {str(error)[:200]}.") from None
        self._left = SECONDS

    def full(self, path: str) -> regex.Match[str] | None:
        """The match of the whole path, as by ``re.fullmatch``."""
        return self._run(path, self._compiled.fullmatch)

    def begins(self, path: str) -> regex.Match[str] | None:
        """The match at the beginning of the path, as by ``re.match``."""
        return self._run(path, self._compiled.match)

    def search(self, text: str) -> regex.Match[str] | None:
        """The first match anywhere in the text, as by ``re.search``."""
        return self._run(text, self._compiled.search)

    def all(self, text: str) -> list[regex.Match[str]]:
        """All matches in the text that do not overlap, as by ``re.finditer``."""
        return self._run(text, lambda text, timeout: [*self._compiled.finditer(text, timeout=timeout)])

    def _run(self, path: str, apply: Callable[..., _Found]) -> _Found:
        begun = time.perf_counter()
        try:
            return apply(path, timeout=max(self._left, 0.01))
        except (TimeoutError, RecursionError, MemoryError):
            raise UserError(
                f"{self.where} {_short(self.text)} takes too long to match: more than {SECONDS:g} s on names such as "
                f"{path!r}. A repeated group with a repeat in it does that; write it without."
            ) from None
        finally:
            spent = time.perf_counter() - begun
            # A stalled machine is not the pattern's fault. A slow pattern is slow each time, and that adds up.
            self._left -= spent if spent > 0.001 else 0.0


@lru_cache(maxsize=256)
def pattern(text: str, where: str) -> Pattern:
    """The pattern, compiled once."""
    return Pattern(text, where)


def check_linear(text: str, where: str) -> None:
    """Refuse a pattern that may run for ever in a library, which applies it without a limit.

    Such a pattern has an unbounded repeat of a group that holds one, or of alternatives that can begin alike. (No known
    tokenizer has one.)

    Raises:
        UserError: It is such a pattern.
    """
    if len(text) > LONGEST:
        raise UserError(f"{where} is a pattern of {len(text)} characters; at most {LONGEST} are read.")
    for body, nested in _repeated_groups(text):
        if nested or _overlap(body):
            raise UserError(
                f"{where} {_short(text)} repeats a group that can match the same text in many ways, and would be tried "
                "for ever on some. Weft does not load it."
            )


def _repeated_groups(text: str) -> Iterator[tuple[str, bool]]:
    """(the inside of a group that is repeated without bound, whether it holds such a repeat)."""
    starts: list[int] = []
    inside: list[bool] = [False]
    at = 0
    while at < len(text):
        mark = text[at]
        if mark == "\\":
            at += 2
            continue
        if mark == "[":
            at = _class_end(text, at)
            continue
        if mark == "(":
            starts.append(at + 1)
            inside.append(False)
        elif mark == ")" and starts:
            nested, body = inside.pop(), text[starts.pop() : at]
            repeat = _unbounded(text, at + 1)
            if repeat:
                yield body, nested
            inside[-1] = inside[-1] or nested or repeat
        elif mark in "*+" or (mark == "{" and _unbounded(text, at)):
            inside[-1] = True
        at += 1


def _class_end(text: str, at: int) -> int:
    """The place behind the class that begins at ``at``; classes may hold classes."""
    depth, at = 1, at + 1
    if text[at : at + 1] == "^":
        at += 1
    if text[at : at + 1] == "]":
        at += 1
    while at < len(text) and depth:
        if text[at] == "\\":
            at += 1
        depth += (text[at : at + 1] == "[") - (text[at : at + 1] == "]")
        at += 1
    return at


def _unbounded(text: str, at: int) -> bool:
    """Whether a repeat without end (or beyond any text) stands at ``at``."""
    if text[at : at + 1] in ("*", "+"):
        return True
    found = regex.match(r"\{(\d*)(,?)(\d*)\}", text[at : at + 24])
    return bool(found and ((found[2] and not found[3]) or int(found[3] or found[1] or 0) > 16))


def _overlap(body: str) -> bool:
    """Whether two alternatives of a group can begin with the same character."""
    body = regex.sub(r"^\?(?:[:>]|[a-z-]+:|P?<\w+>)", "", body)
    parts, depth, last, at = [], 0, 0, 0
    while at < len(body):
        if body[at] == "\\":
            at += 2
            continue
        if body[at] == "[":
            at = _class_end(body, at)
            continue
        depth += (body[at] == "(") - (body[at] == ")")
        if body[at] == "|" and not depth:
            parts.append(body[last:at])
            last = at + 1
        at += 1
    parts.append(body[last:])
    if len(parts) < 2:
        return False
    try:
        made = [regex.compile(f"(?:{part})", regex.VERSION1) for part in parts]
        return any(sum(bool(one.match(c, partial=True, timeout=0.1)) for one in made) > 1 for c in _LOOK)
    except (regex.error, TimeoutError, RecursionError):
        return True


def _short(text: str) -> str:
    return repr(text) if len(text) <= 80 else repr(text[:77] + "...")


def named(path: str, names: Iterable[str]) -> bool:
    """Whether one of the names is the path of a module or parameter, or the last parts of it, as in PEFT."""
    return any(path == name or path.endswith(f".{name}") for name in names)


def last_parts(paths: Iterable[str]) -> set[str]:
    """The last parts of paths: the names by which ``target_modules`` can name them."""
    return {path.rsplit(".", 1)[-1] for path in paths}


def check_name(name: str) -> None:
    """Refuse a name that cannot be a folder's: letters, digits, '.', '_', '-', not beginning with a dot.

    Raises:
        UserError: It is none.
    """
    if not regex.fullmatch(r"[A-Za-z0-9_\-\u4e00-\u9fff][\w.\-]{0,99}", name):
        raise UserError(f"{name!r} is no name for an adapter: use letters, digits, '_', '-' and '.', at most 100.")


def in_order(value: object) -> object:
    """A sorted list in the place of a set, whose order is another one in the next process; else ``value``."""
    return sorted(value, key=repr) if isinstance(value, (set, frozenset)) else value
