"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from weft.core.adapter import MethodConfig
from weft.errors import UserError
from weft.extensions import Registry

# Filled by weft.methods and by extensions: name -> configuration class.
METHODS: Registry[type[MethodConfig]] = Registry("method")
_Config = TypeVar("_Config", bound=type[MethodConfig])


def register_method(name: str) -> Callable[[_Config], _Config]:
    """A decorator of a ``MethodConfig``: its method can be trained, saved and loaded under this name.

    A class that does not say what PEFT calls it is of a kind of its own, which PEFT does not load.

    Raises:
        UserError: the name is taken, or the class is no ``MethodConfig``.
    """

    def entry(cls: _Config) -> _Config:
        if not (isinstance(cls, type) and issubclass(cls, MethodConfig)):
            raise UserError(
                f"{cls!r} cannot be the method {name!r}: register its configuration, a class of weft.core.adapter's "
                "MethodConfig (docs/extending.md)."
            )
        cls.method = name
        if "peft_type" not in cls.__dict__:
            cls.peft_type = name.upper()
        return cls

    return METHODS.register(name, entry)
