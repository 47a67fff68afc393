"""The configuration of a run: one base, one or many jobs.

Keys of a job may stand at the top, where they are defaults for every job. The method's own settings (``r``,
``num_virtual_tokens`` …) stand beside the job's. Keys that users know from other tools are accepted (``aliases``).
"""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any

from pydantic import ValidationError

import weft.methods
from weft.complaints import check_switches, explain, unknown_keys, with_switches
from weft.data.rendering.templates import is_file_name
from weft.data.sources import parse_sets
from weft.errors import UserError, shown
from weft.files.run_folder import RUN_FILE
from weft.foreign import read_json, read_yaml
from weft.methods.registry import METHODS
from weft.paths import local_path
from weft.training.aliases import AUTO, translate
from weft.training.judged_settings import value_job
from weft.training.method_settings import method_names, own_settings, settings_of
from weft.training.said import Overrides, in_our_words, jobs_of, no_method, override, plain, said_last
from weft.training.settings import JobConfig, RunConfig

_JOB_KEYS = frozenset(JobConfig.model_fields) - {"method_settings"}
_RUN_KEYS = frozenset(RunConfig.model_fields)
# Of ``run.json``; in one without a number, ``limit`` was also for evaluation data.
RUN_FORMAT = 2


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
    if isinstance(given, RunConfig):
        return _changed(given, overrides, flags, source) if overrides or flags else given
    if given is not None and not isinstance(given, (str, os.PathLike, Mapping)):
        raise UserError(f"{source}: expected a file, its keys, the folder of a run or a RunConfig; not {shown(given)}.")
    if given is None or isinstance(given, Mapping):
        return build_config(given or {}, overrides, flags=flags, source=source)
    if local_path(given).is_dir():
        return load_run_config(given, overrides, flags=flags)
    if flags.get("resume") and not local_path(given).exists():
        raise UserError(f"no configuration file and no folder of a run at {local_path(given)}.")
    return load_config(given, overrides, flags=flags)


def build_config(
    values: Mapping[str, object],
    overrides: Overrides = (),
    *,
    flags: Mapping[str, object] | None = None,
    source: str = "configuration",
) -> RunConfig:
    """``make_config`` of a mapping after ``flags`` and ``key=value`` overrides, which win in every job too."""
    said = said_last(flags or {}, overrides)
    # Keys are translated first, because an override of learning_rate has to win over the file's lr.
    merged = in_our_words(plain(values), source)
    for key, value in said:
        override(merged, key, value)
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
        kind = " It is a base: say model= (--model)." if (folder / "config.json").is_file() else ""
        raise UserError(
            f"{folder} is a folder without a {RUN_FILE}; give a configuration file or the folder of a run.{kind}"
        )
    begun = {"resume": False, "overwrite_output_dir": False, "output_dir": str(folder)}
    found = _changed(read_run_config(folder), overrides, begun | dict(flags or {}), str(path))
    if not found.resume:
        raise UserError(f"{folder} holds a run; add --resume (in Python resume=True) to go on with it.")
    return found


def _changed(config: RunConfig, overrides: Overrides, flags: Mapping[str, object], source: str) -> RunConfig:
    values = config.model_dump(mode="json")
    # What is None, a job leaves to the run or to its default.
    jobs = [(job.pop("method_settings"), job) for job in values["jobs"]]
    values["jobs"] = [{key: one for key, one in job.items() if one is not None} | own for own, job in jobs]
    return build_config(values, overrides, flags=flags, source=source)


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
    if "format" not in stored and isinstance(limit := config.get("limit"), int):  # it cut what is evaluated, too
        jobs = [{**job, "eval_data": _cut(job.get("eval_data"), limit)} for job in config.get("jobs", ())]
        config = {**config, "eval_data": _cut(config.get("eval_data"), limit), "jobs": jobs}
    return _run_config(config, str(path))


def _cut(data: object, limit: int) -> object:
    """Evaluation data of which each source has a limit: its own, or this one."""
    sets = {
        name: [
            {"limit": limit} | {key: value for key, value in asdict(one).items() if value is not None} for one in own
        ]
        for name, own in parse_sets(data).items()
    }
    return sets.get("", sets) or None


def _run_config(values: Mapping[str, object], source: str) -> RunConfig:
    values = with_switches(values, RunConfig)
    check_switches(values, RunConfig, source)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(explain(error, (RunConfig,), source, _RUN_KEYS)) from None


def make_config(
    values: Mapping[str, object] | None = None, /, *, source: str = "configuration", **settings: object
) -> RunConfig:
    """Check a mapping and make the run's configuration of it; ``settings`` are keys that win over it.

    Raises:
        UserError: an unknown key (with the nearest right one), a wrong type, a missing one; all that are found.
    """
    if settings:
        return build_config(values or {}, settings, source=source)
    top = translate(plain(values or {}), source)
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
        jobs = jobs_of(methods)
    if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise UserError(f"{source}: jobs must be a list of mappings, each with a method.")
    places = [f"{source}: jobs[{i}]" for i in range(len(jobs))]
    made = [
        _job(translate(job, place), defaults, place, top.get("max_length"))
        for job, place in zip(jobs, places, strict=True)
    ]
    made += [beside for job in made if (beside := value_job(job, made)) is not None]
    if jobs and "method" in defaults and all("method" in job for job in jobs):
        raise UserError(f"{source}: method and jobs both say what is trained, and every job has its own; keep one.")
    used = {part for job in made for part in method_names(job.method)}
    for key in [key for key in defaults if key not in _JOB_KEYS]:
        knowing = sorted(n for n, cls in weft.methods.METHODS.items() if key == n or key in cls.model_fields)
        if not used.intersection(knowing):
            raise UserError(
                f"{source}: {key}: no job's method takes it, so it would do nothing. These do: {', '.join(knowing)}."
            )
    return _run_config({**top, "jobs": tuple(made)}, source)


def _job(given: dict[str, object], defaults: dict[str, object], where: str, max_length: object) -> JobConfig:
    method = given.get("method", defaults.get("method"))
    if not isinstance(method, str):
        raise no_method(method, where)
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
