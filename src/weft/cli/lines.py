"""What the user of ``weft chat`` says: lines of a terminal or of stdin, joined to turns, and kept between chats."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass

from weft.errors import UserError
from weft.paths import cache_folder

_QUOTES = '"""'
# Lines of the history's file.
_KEPT = 1000


@dataclass(frozen=True)
class Turn:
    """What was said at once. ``quoted``: it stood between quotes, and so is a message, whatever it begins with."""

    text: str
    quoted: bool = False


class _DroppedError(Exception):
    """The user gave up the message that he was typing."""


# Gives the next line, or None at the end; the argument says whether it goes on with a message.
Reader = Callable[[bool], str | None]


def turns(keep_history: bool) -> Generator[Turn]:
    """The turns that the user types, or those of stdin.

    A message between ``\"\"\"`` and ``\"\"\"`` may have several lines; so may one whose lines end with a backslash.

    Raises:
        UserError: A line of stdin is not UTF-8, or a message between quotes has no end there.
    """
    if not sys.stdin.isatty():
        yield from joined(_piped())
        return
    with _history(keep_history):
        yield from joined(_typed, lenient=True)


def joined(read: Reader, *, lenient: bool = False) -> Generator[Turn]:
    """Turns of the lines that ``read`` gives. ``lenient``: a message that has no end is dropped.

    Raises:
        UserError: A message between quotes has no end.
    """
    while (line := read(False)) is not None:
        with contextlib.suppress(_DroppedError):
            if line.lstrip().startswith(_QUOTES):
                turn = _quoted(line.lstrip().removeprefix(_QUOTES), read, lenient)
            else:
                turn = Turn(_continued(line, read))
            if turn.text.strip():
                yield turn


def _quoted(line: str, read: Reader, lenient: bool) -> Turn:
    lines = [line]
    while not lines[-1].rstrip().endswith(_QUOTES):
        more = read(True)
        if more is None:
            if lenient:
                raise _DroppedError
            raise UserError(f"the message that begins with {_QUOTES}{lines[0][:40]} has no {_QUOTES} at its end.")
        lines.append(more)
    lines[-1] = lines[-1].rstrip().removesuffix(_QUOTES)
    return Turn("\n".join(lines).strip("\n"), quoted=True)


def _continued(line: str, read: Reader) -> str:
    """The line with those behind it, as long as each ends with a backslash. A command is one line: it names paths."""
    lines = [line]
    while lines[-1].endswith("\\") and not line.lstrip().startswith("/"):
        lines[-1] = lines[-1][:-1]
        more = read(True)
        if more is None:
            break
        lines.append(more)
    return "\n".join(lines)


def _piped() -> Reader:
    lines = enumerate(sys.stdin, 1)

    def read(goes_on: bool) -> str | None:
        number, line = next(lines, (0, None))
        if line is not None and any("\ud800" <= character <= "\udfff" for character in line):
            raise UserError(f"line {number} of stdin is not UTF-8.")
        return None if line is None else line.rstrip("\r\n")

    return read


def _typed(goes_on: bool) -> str | None:
    try:
        return input("... " if goes_on else "> ")
    except EOFError:
        print()
        return None
    except KeyboardInterrupt:
        print()
        if goes_on:
            raise _DroppedError from None
        return None


@contextlib.contextmanager
def _history(keep: bool) -> Iterator[None]:
    """Let ``input`` edit lines and find earlier ones; with ``keep`` also those of earlier chats."""
    try:
        import readline  # it changes what input() does
    except ImportError:
        yield
        return
    from weft.files.whole import make_folder

    folder = cache_folder() if keep else None
    readline.clear_history()
    readline.set_history_length(_KEPT)
    before = 0
    if folder is not None:
        with contextlib.suppress(OSError):
            readline.read_history_file(folder / "chat_history")
        before = readline.get_current_history_length()
    try:
        yield
    finally:
        new = readline.get_current_history_length() - before
        if folder is not None and new > 0:
            # Without a place for it the chat has gone well all the same.
            with contextlib.suppress(OSError, UserError):
                make_folder(folder)
                # Others may not read what was said.
                os.close(os.open(folder / "chat_history", os.O_WRONLY | os.O_CREAT, 0o600))
                readline.append_history_file(new, folder / "chat_history")
