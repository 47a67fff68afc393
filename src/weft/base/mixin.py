"""Classes that are put before a module's own class in place: ``module.__class__ = mixed(...)``."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

# The base of such a class. For the type checker it is a module; at run time the module's own class makes it one.
if TYPE_CHECKING:
    Mixin = nn.Module
else:
    Mixin = object

_MIXED: dict[tuple[type, type], type[nn.Module]] = {}


def mixed(prefix: str, mixin: type, base_class: type[nn.Module]) -> type[nn.Module]:
    """The class in which ``mixin`` comes before ``base_class``; its name is that one's after ``prefix``."""
    key = (mixin, base_class)
    if key not in _MIXED:
        name = f"{prefix}{base_class.__name__}"
        _MIXED[key] = type(name, key, {"__module__": mixin.__module__})
    return _MIXED[key]
