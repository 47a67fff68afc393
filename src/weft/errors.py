"""The one exception whose message is written for the user.

The command line prints a ``UserError`` as one message and leaves with exit code 2. A program catches it as the
``ValueError`` that it is. Any other exception that escapes is a defect of Weft and keeps its traceback.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Sequence


class UserError(ValueError):
    """The user gave something that cannot be used. The message says what, where, what was expected and what to do."""


def check_word(key: str, value: object, known: Sequence[str]) -> None:
    """Refuse a value that is none of the ``known`` words.

    Raises:
        UserError: It is none of them; names the nearest.
    """
    if value not in known:
        raise UserError(f"{key} is {value!r}; expected one of {', '.join(known)}.{nearest(str(value), known)}")


def reason_of(error: BaseException) -> str:
    """The first line of an error's message that says something; its kind if there is none."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # A line that ends with a colon has no meaning without the next.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]


def nearest(name: str, known: Iterable[str]) -> str:
    """``" Did you mean 'x'?"`` for the closest of ``known``, or an empty string if none is close."""
    match = difflib.get_close_matches(name, [str(k) for k in known], n=1, cutoff=0.6)
    return f" Did you mean '{match[0]}'?" if match else ""


def shown(value: object) -> str:
    """A value that a user gave, as a message shows it: the beginning of a long one."""
    text = repr(value)
    return text if len(text) <= 200 else f"{text[:200]} …"
