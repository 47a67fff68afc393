"""The settings of a job's method, or of several that are joined by ``+``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from weft.core.adapter import MethodConfig
from weft.errors import UserError, shown
from weft.files.adapter_folder import read
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


def start_config(folder: str, method: str, settings: MethodConfig | None, model: nn.Module) -> MethodConfig:
    """The configuration of the adapter in ``folder``; ``settings`` are those that the job gives, if it gives any.

    Raises:
        UserError: It cannot be read, is of another method, or has other settings than the job gives.
    """
    config, _, _ = read(Path(folder), model)
    own = [part.method for part in config.methods()]
    if own != method_names(method):
        raise UserError(f"start_from: {folder} holds an adapter of {'+'.join(own)}, and the job's method is {method}.")
    if settings is not None and settings != config:
        pairs = zip(settings.methods(), config.methods(), strict=True)
        told = [
            f"{key} is {getattr(theirs, key)!r} there and {getattr(ours, key)!r} here"
            for ours, theirs in pairs
            for key in type(ours).model_fields
            if getattr(ours, key) != getattr(theirs, key) and key in ours.model_fields_set
        ]
        if told:
            raise UserError(f"start_from: {folder} has other settings: {'; '.join(told)}. Leave the settings out: they "
                            "are those of the folder.")  # fmt: skip
    return config
