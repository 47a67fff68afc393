"""The words for on and off. YAML 1.2 has true and false only; a setting that is a switch understands the others too."""

from __future__ import annotations

from weft.errors import UserError

_WORDS = {"yes": True, "on": True, "true": True, "no": False, "off": False, "false": False}


def switch_of(value: object) -> bool | None:
    """True or False for a word for on or off; None for any other value."""
    return _WORDS.get(value.lower()) if isinstance(value, str) else value if isinstance(value, bool) else None


def is_on(value: object, key: str) -> bool:
    """Whether the value of a switch is on; nothing at all, 0 and 1 are values too.

    Raises:
        UserError: It is no word for on or off.
    """
    if value is None or value in (0, 1):
        return bool(value)
    found = switch_of(value)
    if found is None:
        raise UserError(f"{key}: expected yes or no, not {value!r}.")
    return found
