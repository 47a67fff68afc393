"""The options of a thing that a name chooses: an optimizer's, a schedule's."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from weft.errors import nearest, shown

_Kind = TypeVar("_Kind", bound=BaseModel)


def with_options(kind: type[_Kind], name: str, options: Mapping[str, object], key: str) -> _Kind:
    """``kind``, which the configuration calls ``name``, with the options that stand under ``key``.

    Raises:
        ValueError: It has no such option, or the value is none of its.
    """
    known = list(kind.model_fields)
    for option in options:
        if option not in known:
            has = f"it has {', '.join(known)}" if known else "it has none"
            raise ValueError(f"{key}: {name} has no option '{option}'; {has}.{nearest(str(option), known)}")
    try:
        return kind.model_validate(dict(options))
    except ValidationError as error:
        first = error.errors()[0]
        if not first["loc"]:
            raise ValueError(f"{key}: {first['ctx']['error']}") from None
        option = str(first["loc"][0])
        wanted = first["msg"].removeprefix("Input should be ")
        raise ValueError(f"{key}: {option} is {shown(options[option])}; expected: {wanted}") from None


def options_of(value: object) -> object:
    """Options as transformers' command line writes them, ``rank=64,scale=2``, as a mapping; others as they are."""
    if not isinstance(value, str):
        return value
    pairs = [part.partition("=") for part in value.split(",") if part.strip()]
    if any(not equals for _, equals, _ in pairs):
        raise ValueError(f"expected a mapping, or options as name=value, not {shown(value)}")
    return {name.strip(): _plain(text.strip()) for name, _, text in pairs}


def _plain(text: str) -> object:
    """A number or a truth value, where the text is one."""
    if text.lower() in ("true", "false"):
        return text.lower() == "true"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text
