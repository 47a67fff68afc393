"""The settings of a job's method, or of several that are joined by ``+``."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from weft.core.adapter import MethodConfig
from weft.errors import UserError, shown
from weft.methods.combined import CombinedConfig
from weft.methods.registry import METHODS
from weft.training.aliases import translate


def settings_of(
    part: str, cls: type[MethodConfig], settings: Mapping[str, object], where: str = "configuration"
) -> dict[str, object]:
    """The settings of one method of a job with several. What stands under the method's name wins."""
    own = own_settings(part, settings.get(part, {}), where)
    return {**{key: value for key, value in settings.items() if key in cls.model_fields}, **own}


def own_settings(part: str, own: object, where: str) -> dict[str, object]:
    """The settings under a method's name, in our words.

    Raises:
        UserError: They are no mapping.
    """
    if not isinstance(own, Mapping):
        raise UserError(f"{where}: {part}: expected this method's settings (key: value), not {shown(own)}.")
    return translate(own, f"{where}: {part}")


def method_names(method: str) -> list[str]:
    return [name.strip() for name in method.split("+")]


def method_of(method: str, settings: Mapping[str, Any]) -> MethodConfig:
    """The configuration of a method, or of several joined by ``+``."""
    classes = [(name, METHODS.find(name)) for name in method_names(method)]
    if len(classes) == 1:
        name, cls = classes[0]
        return cls.model_validate({k: v for k, v in settings.items() if k != name} | settings.get(name, {}))
    return CombinedConfig(parts=tuple(cls.model_validate(settings_of(name, cls, settings)) for name, cls in classes))
