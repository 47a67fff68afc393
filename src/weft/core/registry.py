"""The methods by name."""

from __future__ import annotations

from weft.core.config import MethodConfig
from weft.errors import UserError, nearest

# Filled by weft.methods: name -> configuration class.
METHODS: dict[str, type[MethodConfig]] = {}


def method_config(method: str) -> type[MethodConfig]:
    """The configuration class of a method by its name.

    Raises:
        UserError: There is no such method; the message lists those there are.
    """
    if method not in METHODS:
        raise UserError(f"no method named {method!r}.{nearest(method, METHODS)} Methods: {', '.join(sorted(METHODS))}.")
    return METHODS[method]
