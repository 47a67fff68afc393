"""What is said of a setting that cannot be taken: in a user's words, never in Python's."""

from __future__ import annotations

import types
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Annotated, Any, Literal, Self, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError, field_validator
from pydantic_core import ErrorDetails

from weft.errors import UserError, nearest, shown
from weft.patterns import in_order
from weft.switches import switch_of

_PLAIN: dict[object, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "text",
    list: "a list",
    tuple: "a list",
    dict: "key: value pairs",
}
_TOKENIZER = "The base's own tokenizer is taken; chat_template and add_tokens are what can be changed."
# What is said of keys that have no counterpart here.
HINTS = {
    "stages": "A file with stages is a chain of runs: weft train FILE runs it (docs/preferences.md).",
    "tokenizer": _TOKENIZER,
    "processing_class": _TOKENIZER,
    "peft_config": "Say method: lora with its settings beside it (r: 4), or in Python method=weft.LoraConfig(r=4).",
    "args": "Its values are keys here, by the same names (learning_rate, num_train_epochs, output_dir).",
    "compute_metrics": "The evaluation gives the loss, of labels also accuracy, F1 and MCC; weft generate --input "
    "scores answers.",
}


class Worded(BaseModel):
    """Settings that a program makes. A wrong one is refused in our words; ``model_validate`` keeps pydantic's error."""

    # A set has another order in every process, and settings are compared.
    _ordered = field_validator("*", mode="before")(in_order)

    def __init__(self, **settings: Any) -> None:
        cls = type(self)
        check_switches(settings, cls, cls.__name__)
        try:
            super().__init__(**settings)
        except ValidationError as error:
            known = f" It takes: {', '.join(cls.model_fields)}." * bool(settings.keys() - cls.model_fields.keys())
            raise UserError(explain(error, (cls,), cls.__name__, set(cls.model_fields)) + known) from None

    @classmethod
    def read(cls, values: Mapping[str, object], where: str) -> Self:
        """The settings that a file gives at ``where``.

        Raises:
            UserError: One of them cannot be taken.
        """
        check_switches(values, cls, where)
        try:
            return cls.model_validate(with_switches(values, cls))
        except ValidationError as error:
            raise UserError(explain(error, (cls,), where, set(cls.model_fields))) from None

    # Without this mark model_validate would call the constructor, and give its words inside pydantic's.
    __init__.__dict__["__pydantic_base_init__"] = True


def with_switches(settings: Mapping[str, Any], cls: type[BaseModel]) -> dict[str, Any]:
    """``settings`` with true and false for the words of on and off, where the field is a switch."""
    found = dict(settings)
    for key, value in settings.items():
        if key in cls.model_fields and isinstance(value, str):
            types_ = set(_options(cls.model_fields[key].annotation))
            if bool in types_ and value not in _words(types_) and (switch := switch_of(value)) is not None:
                found[key] = switch
    return found


def check_switches(settings: Mapping[str, object], cls: type[BaseModel], where: str) -> None:
    """Refuse true and false for numbers: pydantic takes true for 1, which nobody means.

    Raises:
        UserError: A setting that is no switch is true or false.
    """
    for key, value in settings.items():
        field = cls.model_fields.get(key)
        if isinstance(value, bool) and field is not None and bool not in _options(field.annotation):
            raise UserError(f"{where}: {key}: expected {expected(field.annotation)}, not {str(value).lower()}.")


def unknown_keys(where: str, keys: Sequence[str], known: set[str] | frozenset[str]) -> str:
    """A line for each key that is none of the ``known``, with the nearest."""
    return "\n".join(f"{where}: unknown key '{key}'.{_instead(str(key), known)}" for key in keys)


def _instead(key: str, known: set[str] | frozenset[str]) -> str:
    if key in ("extension", "extensions"):
        return " No file can name code to run: give --extension FILE.py on the command line (docs/extending.md)."
    return f" {HINTS[key]}" if key in HINTS else nearest(key, known)


def explain(
    error: ValidationError, classes: Sequence[type[BaseModel]], where: str, known: set[str] | frozenset[str]
) -> str:
    """A line for each setting that pydantic refuses; ``classes`` have the fields, ``known`` are the keys there are."""
    fields = {key: field.annotation for cls in classes for key, field in cls.model_fields.items()}
    lines: dict[str, None] = {}
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            line = unknown_keys(where, [key], known)
        elif item["type"] == "missing":
            line = f"{where}: '{key}' is missing."
        else:
            line = _refused(item, fields, where)
        lines[line] = None
    return "\n".join(lines)


def _refused(item: ErrorDetails, fields: Mapping[str, object], where: str) -> str:
    place, value = item["loc"], item["input"]
    annotation = fields.get(str(place[0])) if place else None
    # Of a choice between kinds pydantic tells what is wrong with each; the kinds themselves say more.
    choice = annotation is not None and len(list(_options(annotation))) > 1
    if item["type"] in ("literal_error", "bool_parsing", "bool_type") or (choice and len(place) > 1):
        words = _words(_options(annotation))
        hint = nearest(value, words) if isinstance(value, str) else ""
        return f"{where}: {place[0]}: expected {expected(annotation)}, not {shown(value)}.{hint}"
    key = ".".join(str(part) for part in place)
    given = "" if isinstance(value, (dict, BaseModel)) else f" (given: {shown(value)})"
    said = item["msg"].removeprefix("Value error, ").removeprefix(f"{key}: ")
    return f"{where}: {key + ': ' if key else ''}{said}{given}"


def expected(annotation: object) -> str:
    """What a field takes, in words: ``one of error, warn, off``, ``a whole number``."""
    options = list(_options(annotation))
    words = _words(options)
    told = [f"one of {', '.join(words)}"] if len(words) > 1 else [f"the word {one}" for one in words]
    told += [_PLAIN.get(get_origin(one) or one, "another value") for one in options if get_origin(one) is not Literal]
    return " or ".join(dict.fromkeys(told))


def _words(options: Iterable[object]) -> list[str]:
    return [str(word) for one in options if get_origin(one) is Literal for word in get_args(one)]


def _options(annotation: object) -> Iterator[object]:
    """The kinds of value that an annotation allows, but for none at all."""
    if get_origin(annotation) in (Union, types.UnionType):
        for one in get_args(annotation):
            yield from _options(one)
    elif get_origin(annotation) is Annotated:
        yield from _options(get_args(annotation)[0])
    elif annotation is not type(None):
        yield annotation
