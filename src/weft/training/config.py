"""The configuration of a run: one base, one or many jobs.

Keys of a job may stand at the top, where they are defaults for every job. The method's own settings (``r``,
``num_virtual_tokens`` …) stand beside the job's. Keys that users know from other tools are accepted (``aliases``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import weft.methods
from weft.complaints import check_switches, explain, unknown_keys, with_switches
from weft.core.adapter import MethodConfig
from weft.data.rendering.templates import is_file_name
from weft.errors import UserError
from weft.files.run_folder import RUN_FILE
from weft.foreign import parse_yaml, read_json, read_yaml
from weft.methods.registry import METHODS
from weft.paths import local_path
from weft.training.aliases import AUTO, translate
from weft.training.bits import DETAILS
from weft.training.settings import JobConfig, RunConfig, method_names, own_settings, settings_of

_JOB_KEYS = frozenset(JobConfig.model_fields) - {"method_settings"}
_RUN_KEYS = frozenset(RunConfig.model_fields)
# ``key=value``, as the command line has them, or values by their keys.
Overrides = Sequence[str] | Mapping[str, object]


def load_config(
    path: str | os.PathLike[str], overrides: Overrides = (), *, flags: Mapping[str, object] | None = None
) -> RunConfig:
    """Read a YAML (or JSON) file and ``key=value`` overrides; dots go into lists and mappings: ``jobs.0.r=16``.

    ``flags`` are settings of the whole run that win over the file and give way to ``overrides``.

    Raises:
        UserError: There is no such file, or it is no valid configuration.
    """
    source = local_path(path)
    if not source.exists():
        raise UserError(f"no configuration file at {source}.")
    values = read_yaml(source)
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{source} must hold 'key: value' lines; it holds {found}.")
    return build_config(values, overrides, flags=flags, source=str(source))


def config_of(
    given: str | os.PathLike[str] | Mapping[str, object] | RunConfig | None,
    overrides: Overrides = (),
    *,
    flags: Mapping[str, object],
    source: str,
) -> RunConfig:
    """The configuration that a user means by a file, by the folder of a run to go on with, or by settings alone.

    Raises:
        UserError: It is none, or no valid one.
    """
    flags = _plain(_with_jobs(flags))
    overrides = _plain(overrides)
    if isinstance(given, RunConfig):
        return _changed(given, overrides, flags, source) if overrides or flags else given
    if given is None or isinstance(given, Mapping):
        return build_config(_plain(given or {}), overrides, flags=flags, source=source)
    if local_path(given).is_dir():
        return load_run_config(given, overrides, flags=flags)
    return load_config(given, overrides, flags=flags)


def _with_jobs(flags: Mapping[str, object]) -> Mapping[str, object]:
    """``flags`` with jobs in the place of methods, where one of these is given with its settings."""
    method = flags.get("method")
    given = list(method) if isinstance(method, (list, tuple)) else [method]
    if not any(isinstance(one, MethodConfig) for one in given):
        return flags
    jobs = [_job_of(one) if isinstance(one, MethodConfig) else {"method": one} for one in given]
    return {**{key: value for key, value in flags.items() if key != "method"}, "jobs": jobs}


def _job_of(config: MethodConfig) -> dict[str, object]:
    """The job of a method with these settings; of several in one adapter each under its name."""
    parts = config.methods()
    own = {part.method: part.model_dump(mode="json", include=part.model_fields_set) for part in parts}
    return {"method": "+".join(own), **own}


def _plain(value: Any) -> Any:
    """``value`` with text in the place of paths, also of those in lists and mappings."""
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    if isinstance(value, Mapping):
        return {key: _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


def build_config(
    values: Mapping[str, object],
    overrides: Overrides = (),
    *,
    flags: Mapping[str, object] | None = None,
    source: str = "configuration",
) -> RunConfig:
    """``make_config`` of a mapping after ``flags`` and ``key=value`` overrides."""
    # Keys are translated first, because an override of learning_rate has to win over the file's lr.
    merged = translate(values, source)
    if isinstance(merged.get("jobs"), list):
        jobs = [translate(job, f"{source}: jobs[{i}]") if isinstance(job, dict) else job
                for i, job in enumerate(merged["jobs"])]  # fmt: skip
        merged["jobs"] = jobs
    if flags and "method" in flags:
        merged.pop("jobs", None)
    merged |= translate(flags or {}, "command line")
    for key, value in _pairs(overrides):
        _override(merged, key, value)
    return make_config(merged, source=source)


def load_run_config(
    folder: str | os.PathLike[str], overrides: Overrides = (), *, flags: Mapping[str, object] | None = None
) -> RunConfig:
    """Read the configuration of the run in ``folder``, to go on with it there.

    Raises:
        UserError: The folder holds no run, or the overrides do not resume it.
    """
    folder = local_path(folder)
    path = folder / RUN_FILE
    if not path.is_file():
        raise UserError(f"{folder} is a folder without a {RUN_FILE}; give a configuration file or the folder of a run.")
    begun = {"resume": False, "overwrite_output_dir": False, "output_dir": str(folder)}
    found = _changed(read_run_config(folder), overrides, begun | dict(flags or {}), str(path))
    if not found.resume:
        raise UserError(f"{folder} holds a run; add --resume (in Python resume=True) to go on with it.")
    return found


def _changed(config: RunConfig, overrides: Overrides, flags: Mapping[str, object], source: str) -> RunConfig:
    values = config.model_dump(mode="json") | dict(flags)
    for key, value in _pairs(overrides):
        _override(values, key, value)
    _to_jobs(values, source)
    return _run_config(values, source)


def _to_jobs(values: dict[str, Any], source: str) -> None:
    """Give keys of jobs that stand at the top to every job; those of methods to the jobs whose method knows them."""
    for key in [key for key in values if key not in _RUN_KEYS]:
        value, taken = values.pop(key), False
        for job in values["jobs"]:
            known = {name for part in method_names(job["method"]) for name in METHODS.find(part).model_fields}
            place = job if key in _JOB_KEYS else job["method_settings"] if key in known else None
            if place is not None:
                place[key], taken = value, True
        if not taken:
            raise UserError(unknown_keys(source, [key], _RUN_KEYS | _JOB_KEYS))


def read_run_config(folder: str | Path) -> RunConfig:
    """Read the configuration of a run from its folder alone.

    Raises:
        UserError: The file holds no configuration, or is damaged.
    """
    path = Path(folder) / RUN_FILE
    stored = read_json(path)
    config = stored.get("config")
    if not isinstance(config, dict):
        raise UserError(f"{path} holds no configuration; it was not written by Weft, or is damaged.")
    template = config.get("chat_template")
    if isinstance(template, str) and is_file_name(template):
        raise UserError(f"{path}: chat_template names the file {template[:200]!r}; a run holds the text itself.")
    if "text_unit" not in config:  # every line was a text, before the key was there
        data = json.dumps([config.get(key) for key in ("data", "eval_data", "jobs")])
        config = {**config, "text_unit": "line"} if ".txt" in data else config
    return _run_config(config, str(path))


def _run_config(values: Mapping[str, object], source: str) -> RunConfig:
    values = with_switches(values, RunConfig)
    check_switches(values, RunConfig, source)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, (RunConfig,), source, _RUN_KEYS)) from None


def _pairs(overrides: Overrides) -> Iterator[tuple[str, object]]:
    if isinstance(overrides, Mapping):
        yield from overrides.items()
        return
    for override in overrides:
        key, equals, text = override.partition("=")
        if not equals or not all(key.split(".")):
            raise UserError(f"override {override!r} is not of the form key=value (with dots for what lies deeper).")
        yield key, parse_yaml(text, f"override {override!r}: the value")


def _override(values: dict[str, Any], key: str, value: object) -> None:
    *parents, last = key.split(".")
    if parents and parents[0] == "jobs" and "jobs" not in values and "method" in values:
        values["jobs"] = _jobs_of(values.pop("method"))
    place: Any = values
    for part in parents:
        place = place[_index(place, part, key)] if isinstance(place, list) else place.setdefault(part, {})
        if not isinstance(place, (dict, list)):
            raise UserError(f"override {key!r}: '{part}' holds a value, not further keys.")
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        before = {name: place[name] for name in ("adam_betas",) if name in place}
        if last in DETAILS:  # what it adds to, which the file says in other words
            before["load_in_4bit"] = place.pop("quantization", None) in ("nf4", "fp4")
        place.update(translate({**before, last: value}, f"override {key!r}") if last != "adam_betas" else {last: value})


def _jobs_of(methods: object) -> list[dict[str, object]]:
    """Make a job of each method, or of the only one."""
    return [{"method": method} for method in (methods if isinstance(methods, list) else [methods])]


def _index(place: list[object], part: str, key: str) -> int:
    if part.isdecimal() and int(part) < len(place):
        return int(part)
    for index, item in enumerate(place):
        if isinstance(item, dict):
            method = str(item.get("method"))
            if part in (item.get("name"), method, "-".join(method_names(method))):
                return index
    raise UserError(f"override {key!r}: '{part}' must be a number below {len(place)}, or a job's name.")


def make_config(values: Mapping[str, object], *, source: str = "configuration") -> RunConfig:
    """Check a mapping and make the run's configuration of it.

    Raises:
        UserError: an unknown key (with the nearest right one), a wrong type, a missing one; all that are found.
    """
    top = translate(values, source)
    jobs = top.pop("jobs", None)
    method_keys = {key for cls in weft.methods.METHODS.values() for key in cls.model_fields} | set(weft.methods.METHODS)
    unknown = [key for key in top if key not in _RUN_KEYS | _JOB_KEYS | method_keys]
    if unknown:
        raise UserError(unknown_keys(source, unknown, _RUN_KEYS | _JOB_KEYS | method_keys))
    defaults = {key: top.pop(key) for key in list(top) if key not in _RUN_KEYS}
    if jobs is None:
        methods = defaults.pop("method", None)
        if methods is None:
            raise UserError(f"{source}: no method. Give method: lora, method: [lora, prefix_tuning], or a list jobs:.")
        jobs = _jobs_of(methods)
    if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise UserError(f"{source}: jobs must be a list of mappings, each with a method.")
    places = [f"{source}: jobs[{i}]" for i in range(len(jobs))]
    made = [
        _job(translate(job, place), defaults, place, top.get("max_length"))
        for job, place in zip(jobs, places, strict=True)
    ]
    for name in defaults.keys() & weft.methods.METHODS.keys():
        if not any(name in method_names(job.method) for job in made):
            raise UserError(f"{source}: {name}: no job uses this method, so nothing would take these settings.")
    return _run_config({**top, "jobs": tuple(made)}, source)


def _job(given: dict[str, object], defaults: dict[str, object], where: str, max_length: object) -> JobConfig:
    method = given.get("method", defaults.get("method"))
    if not isinstance(method, str):
        raise UserError(f"{where}: no method; one of {', '.join(sorted(weft.methods.METHODS))}.")
    parts = method_names(method)
    classes = {part: METHODS.find(part) for part in parts}
    if len(classes) < len(parts):
        raise UserError(f"{where}: method {method!r} names one method twice.")
    fields = {key for cls in classes.values() for key in cls.model_fields}
    # Settings may also stand under the method's own name, where only it takes them.
    known = _JOB_KEYS | fields | set(parts)
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UserError(unknown_keys(where, unknown, known))
    # A default (r, say) is meant for the jobs whose method knows it.
    fitting = {key: value for key, value in defaults.items() if key in known}
    merged: dict[str, Any] = {"name": "-".join(parts), **fitting, **given}
    for part in classes.keys() & merged.keys():
        # What the job says, wherever it says it, wins over the defaults.
        default = {k: v for k, v in own_settings(part, fitting.get(part, {}), where).items() if k not in given}
        merged[part] = default | own_settings(part, given.get(part, {}), where)
    settings = {key: merged.pop(key) for key in list(merged) if key not in _JOB_KEYS}
    for part, cls in classes.items():
        check_switches(settings_of(part, cls, settings, where), cls, where)
        settings = with_switches(settings, cls)
        if isinstance(settings.get(part), dict):
            settings[part] = with_switches(settings[part], cls)
    merged = with_switches(merged, JobConfig)
    check_switches(merged, JobConfig, where)
    if merged.get("batch_tokens") == AUTO:
        merged["batch_tokens"] = _auto_tokens(merged.get("batch_size"), max_length, where)
    try:
        return JobConfig(**merged, method_settings=settings)
    except ValidationError as error:
        raise UserError(explain(error, (JobConfig, *classes.values()), where, known)) from None


def _auto_tokens(batch_size: object, max_length: object, where: str) -> object:
    if not isinstance(max_length, int):
        raise UserError(
            f"{where}: packing (batch_tokens: auto) fills batches up to batch_size times max_length tokens, and "
            "max_length is not given. Add max_length, or say batch_tokens: 4096 (say) instead."
        )
    # What is no number is refused by the field itself.
    size = JobConfig.model_fields["batch_size"].default if batch_size is None else batch_size
    return size * max_length if isinstance(size, int) else None
