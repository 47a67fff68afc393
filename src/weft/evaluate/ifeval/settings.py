"""The settings of an instruction, as IFEval's file holds them."""

from __future__ import annotations

import re
from collections.abc import Mapping

from weft.errors import UserError
from weft.foreign import entry
from weft.patterns import Pattern


def text(settings: Mapping[str, object], key: str) -> str:
    """A setting that is a text.

    Raises:
        UserError: It is missing, or no text.
    """
    return entry(settings, key, str, "an instruction of IFEval")


def whole(settings: Mapping[str, object], key: str) -> int:
    """A setting that is a whole number; some files hold 3.0.

    Raises:
        UserError: It is missing, or no number.
    """
    value = settings.get(key)
    if isinstance(value, float) and value.is_integer():
        return int(value)
    return entry(settings, key, int, "an instruction of IFEval")


def texts(settings: Mapping[str, object], key: str) -> list[str]:
    """A setting that is a list of texts.

    Raises:
        UserError: It is missing, or no list.
    """
    return [str(one) for one in entry(settings, key, list, "an instruction of IFEval")]


def compare(count: int, settings: Mapping[str, object], relation: str, number: str) -> bool:
    """Whether ``count`` is what the settings of these keys say: at least so many, or less than that.

    Raises:
        UserError: The relation is neither.
    """
    asked, wanted = text(settings, relation), whole(settings, number)
    if asked not in ("at least", "less than"):
        raise UserError(f"an instruction of IFEval: {relation} is {asked!r}; expected 'at least' or 'less than'.")
    return count >= wanted if asked == "at least" else count < wanted


def matches(expression: str, answer: str) -> int:
    """How often an expression of the data, whose case does not count, is in the answer."""
    try:
        found = Pattern(f"(?i){expression}", "a keyword of IFEval")
    except UserError:  # a word such as C++ is no expression
        found = Pattern(f"(?i){re.escape(expression)}", "a keyword of IFEval")
    return len(found.all(answer))
