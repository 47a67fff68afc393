"""What is said last: ``key=value`` on the command line, keywords in Python. It wins over the file, in every job."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from weft.core.adapter import MethodConfig
from weft.errors import UserError, shown
from weft.foreign import parse_yaml
from weft.methods import METHODS
from weft.patterns import in_order
from weft.training.aliases import RENAMED, translate
from weft.training.bits import DETAILS
from weft.training.method_settings import method_names, own_settings

# ``key=value``, as the command line has them, or values by their keys.
Overrides = Sequence[str] | Mapping[str, object]


def plain(value: Any) -> Any:
    """``value`` as JSON would hold it: text for paths, dtypes and devices, lists for sets, plain numbers for numpy's.

    What is none of these stays as it is.
    """
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: plain(item) for key, item in value.items()}
    value = in_order(value)
    if isinstance(value, (list, tuple, range)):
        return [plain(item) for item in value]
    kind = type(value)
    if kind.__module__ == "torch" and kind.__name__ in ("dtype", "device"):
        return str(value).removeprefix("torch.")
    if kind.__module__.split(".")[0] in ("numpy", "torch") and hasattr(value, "tolist"):
        return plain(value.tolist())
    return value


def said_last(flags: Mapping[str, object], overrides: Overrides) -> list[tuple[str, Any]]:
    """The keys and values that are said beside a file, in the order in which each wins over those before.

    On the command line the last word wins. Keywords have no order: there the key that names a job or a method wins.

    Raises:
        UserError: A word is no ``key=value``, or both ``method`` and ``jobs`` say what is trained.
    """
    said = [*flags.items(), *_pairs(overrides)]
    names = [RENAMED.get(key, key) for key, _ in said]
    if "method" in names and "jobs" in names:
        raise UserError("method and jobs both say what is trained; give one of the two.")
    said = [(key, plain(value)) for pair in said for key, value in _with_settings(*pair)]
    if isinstance(overrides, Mapping):
        said.sort(key=lambda pair: ("." in pair[0], pair[0] == "jobs", pair[0] in METHODS))
    return said


def _pairs(overrides: Overrides) -> Iterator[tuple[str, object]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for word in overrides:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"override {word!r} is not of the form key=value (with dots for what lies deeper).")
        yield key, parse_yaml(text, f"override {word!r}: the value")


def _with_settings(key: str, value: object) -> Iterator[tuple[str, object]]:
    """The pair; or jobs in the place of methods, where one of these is given with its settings."""
    given = list(value) if isinstance(value, (list, tuple)) else [value]
    if key == "method" and any(isinstance(one, MethodConfig) for one in given):
        yield "jobs", [_job_of(one) if isinstance(one, MethodConfig) else {"method": one} for one in given]
    else:
        yield key, value


def _job_of(config: MethodConfig) -> dict[str, object]:
    """The job of a method with these settings; of several in one adapter each under its name."""
    parts = config.methods()
    own = {part.method: part.model_dump(mode="json", include=part.model_fields_set) for part in parts}
    return {"method": "+".join(own), **own}


def jobs_of(methods: object) -> list[dict[str, object]]:
    """Make a job of each method, or of the only one."""
    return [{"method": method} for method in (methods if isinstance(methods, list) else [methods])]


def no_method(given: object, where: str) -> UserError:
    """The error for what is no method's name."""
    names = ", ".join(sorted(METHODS))
    if given is None:
        return UserError(f"{where}: no method; one of {names}.")
    return UserError(
        f"{where}: no method: expected a name ({names}), not {shown(given)}. Settings stand beside it (r=4), or in "
        "Python with it: method=weft.LoraConfig(r=4)."
    )


def in_our_words(values: Mapping[str, object], where: str) -> dict[str, Any]:
    """The keys and values in our words, also those of jobs and those under the names of methods.

    Raises:
        UserError: Two keys mean the same thing, or there are no settings under a method's name.
    """
    found = translate(values, where)
    for key in found.keys() & METHODS.keys():
        found[key] = own_settings(key, found[key], where)
    if isinstance(found.get("jobs"), list):
        found["jobs"] = [in_our_words(job, f"{where}: jobs[{i}]") if isinstance(job, Mapping) else job
                         for i, job in enumerate(found["jobs"])]  # fmt: skip
    return found


def override(values: dict[str, Any], key: str, value: Any) -> None:
    """Put what is said last into a configuration in our words. It wins in every job, unless its dots lead into one.

    Raises:
        UserError: The dots lead nowhere.
    """
    *parents, last = key.split(".")
    if not parents and last in METHODS and isinstance(value, Mapping):
        for name, one in value.items():
            override(values, f"{last}.{name}", one)
        return
    if parents and parents[0] == "jobs" and "jobs" not in values and "method" in values:
        values["jobs"] = jobs_of(values.pop("method"))
    place = _inside(values, parents, key)
    if isinstance(place, list):
        place[_index(place, last, key)] = value
        return
    taken = _put(place, last, value, key)
    jobs = [job for job in _list(values.get("jobs")) if isinstance(job, dict)]
    if not parents:
        for job in jobs:
            if taken & job.keys():
                _put(job, last, value, key)
            _give_way(job, taken)
        if "method" in taken:
            values.pop("jobs", None)
        if "jobs" in taken and all("method" in job for job in jobs):
            values.pop("method", None)
    if len(parents) == 1 and parents[0] in METHODS:
        for job in jobs:
            if parents[0] in method_names(str(job.get("method", values.get("method")))):
                _put(_inside(job, parents, key), last, value, key)


def _inside(values: dict[str, Any], parents: Sequence[str], key: str) -> Any:
    place: Any = values
    for part in parents:
        place = place[_index(place, part, key)] if isinstance(place, list) else place.setdefault(part, {})
        if not isinstance(place, (dict, list)):
            raise UserError(f"override {key!r}: '{part}' holds a value, not further keys.")
    return place


def _put(place: dict[str, Any], last: str, value: object, key: str) -> set[str]:
    """Put a value into a mapping; returns its keys in our words."""
    before = {name: place[name] for name in ("adam_betas",) if name in place}
    if last in DETAILS:  # what it adds to, which the file says in other words
        kept = place.pop("quantization", None)
        before |= {"load_in_4bit": kept in ("nf4", "fp4"), "bnb_4bit_quant_type": kept if kept != "int8" else None}
        before |= {"dtype": place["dtype"]} if "dtype" in place else {}
        before["load_in_8bit"] = kept == "int8"
    found = in_our_words({**before, last: value}, f"override {key!r}")
    place.update(found)
    _give_way(place, found.keys())
    return set(found)


def _give_way(place: Mapping[str, Any], keys: Iterable[str]) -> None:
    """Take from under the names of methods what is said beside them, later."""
    for own in (place[name] for name in place.keys() & METHODS.keys()):
        for key in keys:
            own.pop(key, None)


def _list(value: object) -> list[Any]:
    return value if isinstance(value, list) else []


def _index(place: list[Any], part: str, key: str) -> int:
    if part.isdecimal() and int(part) < len(place):
        return int(part)
    for index, item in enumerate(place):
        if isinstance(item, dict):
            method = str(item.get("method"))
            if part in (item.get("name"), method, "-".join(method_names(method))):
                return index
    raise UserError(f"override {key!r}: '{part}' must be a number below {len(place)}, or a job's name.")
