"""The methods by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

from weft.core.adapter import MethodConfig
from weft.extensions import Registry

# Filled by weft.methods and by extensions: name -> configuration class.
METHODS: Registry[type[MethodConfig]] = Registry("method")
_Config = TypeVar("_Config", bound=type[MethodConfig])


def register_method(name: str) -> Callable[[_Config], _Config]:
    """A decorator of a ``MethodConfig``: its method can be trained, saved and loaded under this name.

    A class that does not say what PEFT calls it is of a kind of its own, which PEFT does not load.

    Raises:
        UserError: the name is taken.
    """

    def entry(cls: _Config) -> _Config:
        cls.method = name
        if "peft_type" not in cls.__dict__:
            cls.peft_type = name.upper()
        return cls

    return METHODS.register(name, entry)
