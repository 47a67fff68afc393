"""The trials of a sweep: one job with other settings each, as jobs of one run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.data.sources import parse_sets
from weft.errors import UserError, nearest
from weft.methods import METHODS
from weft.objectives import class_metrics
from weft.training.aliases import RENAMED, SWITCHES
from weft.training.bits import TOLD
from weft.training.config import config_of
from weft.training.settings import JobConfig, RunConfig, eval_key

# Keys of a job by which its figures could not be compared with those of others.
_FIXED = ("name", "data", "eval_data", "task", "labels", "text_columns", "label_column", "early_stopping_on")


@dataclass(frozen=True)
class Trial:
    """``words`` are the settings in which it differs, ``key=value``, as they are written on a command line."""

    name: str
    words: tuple[str, ...]
    job: JobConfig

    @property
    def settings(self) -> dict[str, str]:
        """The value of each key in which trials differ, as it is written."""
        return dict(word.split("=", 1) for word in self.words)


@dataclass(frozen=True)
class Trials:
    """All trials, and the run that they are jobs of."""

    config: RunConfig
    trials: tuple[Trial, ...]

    def run(self, names: Sequence[str], folder: Path) -> RunConfig:
        """The run of these trials, which goes on if it has begun."""
        jobs = tuple(trial.job for trial in self.trials if trial.name in names)
        changes = {"jobs": jobs, "output_dir": str(folder), "resume": True, "overwrite_output_dir": False}
        return self.config.model_copy(update=changes)


def trials_of(
    file: str | None, overrides: Sequence[str], settings: Sequence[tuple[str, ...]], flags: Mapping[str, object]
) -> Trials:
    """The trials of a configuration with each of these ``settings``, which are ``key=value`` words.

    Raises:
        UserError: A key is none of a job, or a value none of the key's; or the configuration has several jobs.
    """
    for key in dict.fromkeys(word.partition("=")[0] for one in settings for word in one):
        check_key(key)
    made: list[tuple[tuple[str, ...], RunConfig]] = []
    for words in settings:
        config = config_of(file, [*overrides, *words], flags=flags, source="command line")
        if len(config.jobs) != 1:
            names = ", ".join(job.name for job in config.jobs)
            raise UserError(
                f"a sweep tries settings of one job, and the configuration has {len(config.jobs)} ({names}). Keep one; "
                "methods are tried as other settings are: method=lora,prefix_tuning."
            )
        made.append((words, config))
    first = made[0][1]
    for other, config in made[1:]:
        if (changed := _other(first, config)) is not None:
            raise UserError(f"{' '.join(other)} changes {changed}, a setting of the run; {_SHARED}")
    width = max(2, len(str(len(made) - 1)))
    trials = []
    for number, (words, config) in enumerate(made):
        name = f"trial-{number:0{width}}"
        trials.append(Trial(name, words, config.jobs[0].model_copy(update={"name": name})))
    return Trials(first, tuple(trials))


_SHARED = "all trials share one base and one reading of the data. Make a sweep for each value."


def check_key(key: str) -> None:
    """Refuse a key that trials cannot differ in.

    Raises:
        UserError: No job has it, or it is a setting of the run.
    """
    head, _, _ = key.partition(".")
    ours = RENAMED.get(head, head)
    of_methods = {name for cls in METHODS.values() for name in cls.model_fields}
    of_jobs = set(JobConfig.model_fields) - {"method_settings", *_FIXED}
    of_run = set(RunConfig.model_fields) - of_jobs
    if ours in _FIXED:
        raise UserError(f"--grid {key}: trials that differ in {ours} cannot be compared; make a sweep for each.")
    if ours in of_run or head in _BITS or head == "jobs":
        what = "the base" if ours in _OF_BASE or head in _BITS else "the run"
        raise UserError(f"--grid {key}: '{ours}' is a setting of {what}; {_SHARED}")
    known = {*of_jobs, *of_methods, *METHODS, *RENAMED, *SWITCHES, "adam_beta1", "adam_beta2"}
    if head not in known:
        raise UserError(f"--grid {key}: no job has a key '{head}'.{nearest(head, {*of_jobs, *of_methods, *METHODS})}")


# Keys of other tools for the bits of a base; some lines of the reference tell two.
_BITS = {key for line in TOLD for key in line.split("`, `")}
_OF_BASE = ("model", "dtype", "device", "shape", "hub", "quantization", "double_quantization", "offload_param")


def _other(first: RunConfig, config: RunConfig) -> str | None:
    """The first setting of the run in which two configurations differ."""
    one, two = (config.model_dump(mode="json", exclude={"jobs"}) for config in (first, config))
    return next((key for key in one if one[key] != two.get(key)), None)


def metric_of(trials: Trials, asked: str | None) -> str:
    """The figure of evaluations by which trials are compared.

    Raises:
        UserError: Nothing is evaluated, there is no such loss, or there are several sets and none is named.
    """
    config, job = trials.config, trials.trials[0].job
    evaluated: Any = job.eval_data or config.eval_data
    if not (evaluated or config.eval_size or config.eval_split):
        raise UserError("nothing to compare trials by: add eval_data, eval_size or eval_split.")
    losses = [eval_key(name, "loss") for name in (parse_sets(evaluated) if evaluated else {"": ()})]
    if asked is None:
        if job.early_stopping_on is not None:
            return eval_key(job.early_stopping_on, "loss")
        if len(losses) > 1:
            raise UserError(f"eval_data has several sets; name the loss that counts: --metric {' or '.join(losses)}.")
        return losses[0]
    named = asked if asked.startswith("eval_") else f"eval_{asked}"
    names = parse_sets(evaluated) if evaluated else {"": ()}
    classes = class_metrics([0], [0]) if job.classifies else ()
    known = [*losses, *(eval_key(name, figure) for name in names for figure in classes)]
    # What an objective has to watch beside the loss, it says when it evaluates.
    if named not in known and (job.objective is None or named.endswith("_loss")):
        raise UserError(f"--metric {named}: evaluations have {', '.join(known)}.{nearest(named, known)}")
    return named
