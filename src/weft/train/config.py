"""The configuration of a run: one base, one or many jobs.

Keys of a job may stand at the top, where they are defaults for every job. The method's own settings (``r``,
``num_virtual_tokens`` …) stand beside the job's. Keys that users know from other tools are accepted (``aliases``).
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import yaml
from pydantic import BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

import weft.methods
from weft.core.combined import CombinedConfig
from weft.core.config import MethodConfig
from weft.core.files import check_name, method_config, read_json
from weft.errors import UserError, nearest
from weft.models.hub import Hub
from weft.models.load import Shape
from weft.models.quantize import Quantization
from weft.train.aliases import translate
from weft.train.store import RUN_FILE


class JobConfig(BaseModel):
    """One adapter and how it is trained. ``steps`` are optimizer steps and win over ``epochs``."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    name: str
    method: str
    method_settings: dict[str, Any] = {}
    data: str | None = None
    eval_data: str | None = None
    task: Literal["causal_lm", "seq2seq", "sequence_classification"] = "causal_lm"
    labels: list[str] | None = None
    text_columns: list[str] | None = None
    label_column: str | None = None
    steps: int | None = Field(default=None, gt=0)
    epochs: float = Field(default=3, gt=0)
    batch_size: int = Field(default=8, gt=0)
    gradient_accumulation_steps: int = Field(default=1, gt=0)
    optimizer: Literal["adamw", "sgd"] = "adamw"
    learning_rate: float | None = Field(default=None, gt=0)
    adam_betas: tuple[float, float] = (0.9, 0.999)
    adam_epsilon: float = Field(default=1e-8, gt=0)
    momentum: float = Field(default=0.9, ge=0, lt=1)
    weight_decay: float = Field(default=0.0, ge=0)
    lr_scheduler_type: Literal["constant", "linear", "cosine"] = "cosine"
    warmup_steps: int = Field(default=0, ge=0)
    warmup_ratio: float = Field(default=0.03, ge=0, le=1)
    max_grad_norm: float = Field(default=1.0, ge=0)
    seed: int = 0
    eval_steps: int | None = Field(default=None, gt=0)
    early_stopping_patience: int | None = Field(default=None, gt=0)
    early_stopping_min_delta: float = Field(default=0.0, ge=0)
    neftune_noise_alpha: float = Field(default=0.0, ge=0)

    @field_validator("labels", mode="before")
    @classmethod
    def _names_of_labels(cls, value: Any) -> Any:
        if isinstance(value, (list, tuple)):
            if any(isinstance(name, bool) for name in value):
                raise ValueError("YAML reads no and yes as switches; put the labels in quotes")
            return [str(name) if isinstance(name, (int, float)) else name for name in value]
        return value

    @model_validator(mode="after")
    def _check(self) -> JobConfig:
        check_name(self.name)
        if self.name == "base":
            raise ValueError("'base' is no name for a job: in chat and generate it is the base itself")
        if not -(2**63) <= self.seed < 2**63:
            raise ValueError(f"seed {self.seed} does not fit into 64 bits")
        if not all(0 <= beta < 1 for beta in self.adam_betas):
            raise ValueError(f"adam_betas {self.adam_betas}: both must lie in [0, 1)")
        if self.early_stopping_patience is not None and self.eval_steps is None:
            raise ValueError("early_stopping_patience needs eval_steps: without evaluation nothing can stop early")
        method = self.method_config()
        for part in method.parts if isinstance(method, CombinedConfig) else (method,):
            if self.task not in part.tasks:
                fitting = ", ".join(sorted(part.tasks))
                raise ValueError(f"task {self.task}: method {part.method} is not for that; it is for {fitting}")
        return self

    def method_config(self) -> MethodConfig:
        """The method's own configuration."""
        return method_of(self.method, self.method_settings)

    def planned_steps(self, samples: int) -> tuple[int, int]:
        """(optimizer steps per epoch, of the whole job) with that many samples."""
        per_epoch = math.ceil(math.ceil(samples / self.batch_size) / self.gradient_accumulation_steps)
        return per_epoch, self.steps or max(1, round(self.epochs * per_epoch))


class RunConfig(BaseModel):
    """A run: base, data, jobs, where it is written."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    model: str
    data: str
    jobs: tuple[JobConfig, ...] = Field(min_length=1)
    output_dir: str = "runs/weft"
    overwrite_output_dir: bool = False
    resume: bool = False
    eval_data: str | None = None
    eval_size: int = Field(default=0, ge=0)
    data_format: str | None = None
    columns: dict[str, str] | None = None
    limit: int | None = Field(default=None, gt=0)
    empty_answers: Literal["error", "skip"] = "error"
    chat_template: str | None = None
    train_on: Literal["answers", "last_answer", "all"] = "answers"
    max_length: int | None = Field(default=None, gt=1)
    truncate: bool = False
    hub: Hub = "huggingface"
    data_hub: Hub | None = None
    shape: Shape = "full"
    quantization: Quantization | None = None
    dtype: str = "auto"
    device: str = "auto"
    threads: int | None = Field(default=None, gt=0)
    exact: bool = False
    gradient_checkpointing: bool = False
    logging_steps: int = Field(default=10, gt=0)
    save_steps: int | None = Field(default=None, gt=0)
    save_total_limit: int = Field(default=2, gt=0)

    @model_validator(mode="after")
    def _names_differ(self) -> RunConfig:
        names = [job.name for job in self.jobs]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"two jobs are named {', '.join(twice)}; give each its own name")
        classifies = any(job.task == "sequence_classification" for job in self.jobs)
        for key in ("labels", "text_columns", "label_column"):
            if not classifies and any(getattr(job, key) is not None for job in self.jobs):
                raise ValueError(f"{key} is for classification; add task: sequence_classification")
        return self


_JOB_KEYS = frozenset(JobConfig.model_fields) - {"method_settings"}
_RUN_KEYS = frozenset(RunConfig.model_fields)


def load_config(
    path: str | Path, overrides: Sequence[str] = (), *, flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """Read a YAML (or JSON) file and ``key=value`` overrides; dots go into lists and mappings: ``jobs.0.r=16``.

    ``flags`` are settings of the whole run that win over the file and give way to ``overrides``.
    """
    source = Path(path)
    try:
        values = _parse(source.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"no configuration file at {source}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, OSError) as error:
        raise UserError(f"{source} is not valid YAML: {_one_line(error)}") from None
    if not isinstance(values, dict):
        found = "nothing" if values is None else f"a {type(values).__name__}"
        raise UserError(f"{source} must hold 'key: value' lines; it holds {found}.")
    return build_config(values, overrides, flags=flags, source=str(source))


def build_config(
    values: Mapping[str, Any],
    overrides: Sequence[str] = (),
    *,
    flags: Mapping[str, Any] | None = None,
    source: str = "configuration",
) -> RunConfig:
    """``make_config`` of a mapping after ``flags`` and ``key=value`` overrides."""
    # Translated first: an override of learning_rate has to win over the file's lr.
    merged = translate(values, source)
    if isinstance(merged.get("jobs"), list):
        jobs = [translate(job, f"{source}: jobs[{i}]") if isinstance(job, dict) else job
                for i, job in enumerate(merged["jobs"])]  # fmt: skip
        merged["jobs"] = jobs
    if flags and "method" in flags:
        merged.pop("jobs", None)
    merged |= translate(flags or {}, "command line")
    for override in overrides:
        _override(merged, override)
    return make_config(merged, source=source)


def load_run_config(
    folder: str | Path, overrides: Sequence[str] = (), *, flags: Mapping[str, Any] | None = None
) -> RunConfig:
    """The configuration of the run in ``folder``, to go on with it there."""
    path = Path(folder) / RUN_FILE
    if not path.is_file():
        raise UserError(f"{folder} is a folder without a {RUN_FILE}; give a configuration file or the folder of a run.")
    values = read_run_config(folder).model_dump(mode="json")
    values |= {"resume": False, "overwrite_output_dir": False, "output_dir": str(folder), **(flags or {})}
    for override in overrides:
        _override(values, override)
    if not values["resume"]:
        raise UserError(f"{folder} holds a run; add --resume to go on with it.")
    return _run_config(values, str(path))


def read_run_config(folder: str | Path) -> RunConfig:
    """The configuration of a run from its folder alone."""
    path = Path(folder) / RUN_FILE
    stored = read_json(path)
    if not isinstance(stored.get("config"), dict):
        raise UserError(f"{path} holds no configuration; it was not written by Weft, or is damaged.")
    return _run_config(stored["config"], str(path))


def _run_config(values: Mapping[str, Any], source: str) -> RunConfig:
    _refuse_switches(values, RunConfig, source)
    try:
        return RunConfig.model_validate(values)
    except ValidationError as error:
        raise UserError(_explain(error, source, _RUN_KEYS)) from None


class _Loader(yaml.SafeLoader):
    """Safe YAML in which ``1e-3`` is a number (YAML 1.1 takes it for text) and a key that stands twice is an error."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key, _ in node.value:
            if key.tag != "tag:yaml.org,2002:merge" and isinstance(key, yaml.ScalarNode):
                if key.value in seen:
                    raise yaml.constructor.ConstructorError(None, None, f"'{key.value}' stands twice", key.start_mark)
                seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float", re.compile(r"^[-+]?[0-9]+(\.[0-9]*)?[eE][-+]?[0-9]+$"), list("-+0123456789")
)


def _parse(text: str) -> Any:
    return yaml.load(text, Loader=_Loader)


def _one_line(error: BaseException) -> str:
    mark = getattr(error, "problem_mark", None)
    if mark is None:
        return " ".join(str(error).split())
    return f"line {mark.line + 1}, column {mark.column + 1}: {getattr(error, 'problem', error)}"


def _override(values: dict[str, Any], override: str) -> None:
    key, equals, text = override.partition("=")
    *parents, last = key.split(".")
    if not equals or not all((*parents, last)):
        raise UserError(f"override {override!r} is not of the form key=value (with dots for what lies deeper).")
    try:
        value = _parse(text)
    except yaml.YAMLError as error:
        raise UserError(f"override {override!r}: the value is not valid YAML: {_one_line(error)}") from None
    if parents and parents[0] == "jobs" and "jobs" not in values and "method" in values:
        methods = values.pop("method")
        values["jobs"] = [{"method": method} for method in (methods if isinstance(methods, list) else [methods])]
    place: Any = values
    for part in parents:
        place = place[_index(place, part, key)] if isinstance(place, list) else place.setdefault(part, {})
        if not isinstance(place, (dict, list)):
            raise UserError(f"override {key!r}: '{part}' holds a value, not further keys.")
    if isinstance(place, list):
        place[_index(place, last, key)] = value
    else:
        before = {name: place[name] for name in ("adam_betas",) if name in place}
        place.update(translate({**before, last: value}, f"override {key!r}") if last != "adam_betas" else {last: value})


def _index(place: list[Any], part: str, key: str) -> int:
    if part.isdecimal() and int(part) < len(place):
        return int(part)
    for index, item in enumerate(place):
        if isinstance(item, dict):
            method = str(item.get("method"))
            if part in (item.get("name"), method, "-".join(_names(method))):
                return index
    raise UserError(f"override {key!r}: '{part}' must be a number below {len(place)}, or a job's name.")


def make_config(values: Mapping[str, Any], *, source: str = "configuration") -> RunConfig:
    """Check a mapping and make the run's configuration of it.

    Raises:
        UserError: an unknown key (with the nearest right one), a wrong type, a missing one; all that are found.
    """
    top = translate(values, source)
    jobs = top.pop("jobs", None)
    method_keys = {key for cls in weft.methods.METHODS.values() for key in cls.model_fields} | set(weft.methods.METHODS)
    unknown = [key for key in top if key not in _RUN_KEYS | _JOB_KEYS | method_keys]
    if unknown:
        raise UserError(_unknown(source, unknown, _RUN_KEYS | _JOB_KEYS | method_keys))
    defaults = {key: top.pop(key) for key in list(top) if key not in _RUN_KEYS}
    if jobs is None:
        methods = defaults.pop("method", None)
        if methods is None:
            raise UserError(f"{source}: no method. Give method: lora, method: [lora, prefix_tuning], or a list jobs:.")
        jobs = [{"method": method} for method in (methods if isinstance(methods, list) else [methods])]
    if not isinstance(jobs, list) or not all(isinstance(job, dict) for job in jobs):
        raise UserError(f"{source}: jobs must be a list of mappings, each with a method.")
    places = [f"{source}: jobs[{i}]" for i in range(len(jobs))]
    made = [_job(translate(job, place), defaults, place) for job, place in zip(jobs, places, strict=True)]
    for name in defaults.keys() & weft.methods.METHODS.keys():
        if not any(name in _names(job.method) for job in made):
            raise UserError(f"{source}: {name}: no job uses this method, so nothing would take these settings.")
    return _run_config({**top, "jobs": tuple(made)}, source)


def _job(given: dict[str, Any], defaults: dict[str, Any], where: str) -> JobConfig:
    method = given.get("method", defaults.get("method"))
    if not isinstance(method, str):
        raise UserError(f"{where}: no method; one of {', '.join(sorted(weft.methods.METHODS))}.")
    parts = _names(method)
    classes = {part: method_config(part) for part in parts}
    if len(classes) < len(parts):
        raise UserError(f"{where}: method {method!r} names one method twice.")
    fields = {key for cls in classes.values() for key in cls.model_fields}
    # Settings may also stand under the method's own name, where only it takes them.
    known = _JOB_KEYS | fields | set(parts)
    unknown = [key for key in given if key not in known]
    if unknown:
        raise UserError(_unknown(where, unknown, known))
    # A default of another method's (r, say, for prompt tuning) is meant for the jobs that know it.
    fitting = {key: value for key, value in defaults.items() if key in known}
    merged = {"name": "-".join(parts), **fitting, **given}
    for part in classes.keys() & merged.keys():
        # What the job says, wherever it says it, wins over the defaults.
        default = {k: v for k, v in _own_settings(part, fitting.get(part, {}), where).items() if k not in given}
        merged[part] = default | _own_settings(part, given.get(part, {}), where)
    settings = {key: merged.pop(key) for key in list(merged) if key not in _JOB_KEYS}
    for part, cls in classes.items():
        _refuse_switches(_settings_of(part, cls, settings, where), cls, where)
    _refuse_switches(merged, JobConfig, where)
    try:
        method_of(method, settings)
        return JobConfig(**merged, method_settings=settings)
    except ValidationError as error:
        raise UserError(_explain(error, where, known)) from None


def _settings_of(
    part: str, cls: type[MethodConfig], settings: Mapping[str, Any], where: str = "configuration"
) -> dict[str, Any]:
    """Of the settings of a job with several methods, those of one: what stands under its name wins."""
    own = _own_settings(part, settings.get(part, {}), where)
    return {**{key: value for key, value in settings.items() if key in cls.model_fields}, **own}


def _own_settings(part: str, own: Any, where: str) -> dict[str, Any]:
    """What stands under a method's name, in our words."""
    if not isinstance(own, Mapping):
        raise UserError(f"{where}: {part}: expected this method's settings (key: value), not {own!r}.")
    return translate(own, f"{where}: {part}")


def _names(method: str) -> list[str]:
    return [name.strip() for name in method.split("+")]


def method_of(method: str, settings: Mapping[str, Any]) -> MethodConfig:
    """The configuration of a method, or of several joined by ``+``."""
    classes = [(name, method_config(name)) for name in _names(method)]
    if len(classes) == 1:
        name, cls = classes[0]
        return cls(**{key: value for key, value in settings.items() if key != name} | settings.get(name, {}))
    return CombinedConfig(parts=tuple(cls(**_settings_of(name, cls, settings)) for name, cls in classes))


def _refuse_switches(settings: Mapping[str, Any], cls: type[BaseModel], where: str) -> None:
    """pydantic takes true for 1, which nobody means."""
    for key, value in settings.items():
        field = cls.model_fields.get(key)
        if isinstance(value, bool) and field is not None and "bool" not in str(field.annotation):
            raise UserError(f"{where}: {key}: expected {_plain(field.annotation)}, not {str(value).lower()}.")


def _plain(annotation: Any) -> str:
    return getattr(annotation, "__name__", str(annotation)).replace("typing.", "")


def _unknown(where: str, keys: list[str], known: set[str] | frozenset[str]) -> str:
    return "\n".join(f"{where}: unknown key '{key}'.{nearest(str(key), known)}" for key in keys)


def _explain(error: ValidationError, where: str, known: set[str] | frozenset[str]) -> str:
    lines = []
    for item in error.errors():
        key = ".".join(str(part) for part in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(f"{where}: unknown key '{key}'.{nearest(key, known)}")
        elif item["type"] == "missing":
            lines.append(f"{where}: '{key}' is missing.")
        else:
            given = "" if isinstance(item["input"], (dict, BaseModel)) else f" (given: {item['input']!r})"
            message = item["msg"].removeprefix("Value error, ")
            lines.append(f"{where}: {key + ': ' if key else ''}{message}{given}")
    return "\n".join(lines)
