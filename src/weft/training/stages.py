"""Several runs in one file, one after the other: SFT, then a reward model, then PPO that begins with the one and is
rewarded by the other.

``stages`` is a list of mappings with a ``name`` each; the keys beside it are defaults of every stage. A stage is a run
in its own folder, ``output_dir/NAME``. Where ``start_from`` or the ``adapter`` of a reward is the name of an earlier
stage (or STAGE/JOB), it is that stage's adapter.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.errors import UserError, nearest
from weft.foreign import read_yaml
from weft.paths import local_path
from weft.patterns import check_name
from weft.training.config import build_config, read_run_config
from weft.training.said import Overrides, said_last
from weft.training.settings import RunConfig


@dataclass(frozen=True)
class Stage:
    """One run of a chain."""

    name: str
    config: RunConfig

    @property
    def done(self) -> bool:
        """Whether the folder holds the finished adapters of all its jobs, and no more steps of them are wanted."""
        folder = Path(self.config.output_dir)
        if not all((folder / "adapters" / job.name).is_dir() for job in self.config.jobs):
            return False
        begun = {job.name: job for job in read_run_config(folder).jobs}
        return all(
            (job.steps, job.epochs) == (begun[job.name].steps, begun[job.name].epochs) for job in self.config.jobs
        )


def read_stages(
    file: str | os.PathLike[str] | Mapping[str, object], overrides: Overrides = (), *, flags: Mapping[str, object]
) -> list[Stage]:
    """The runs of a file with stages; ``flags`` and ``overrides`` win in every one of them.

    Raises:
        UserError: The stages are no list of mappings with names, a name is there twice, or a stage is no valid run.
    """
    source = "configuration" if isinstance(file, Mapping) else str(local_path(file))
    values: Any = dict(file) if isinstance(file, Mapping) else read_yaml(local_path(file))
    stages = values.pop("stages")
    if not isinstance(stages, list) or not stages or not all(isinstance(one, dict) for one in stages):
        raise UserError(f"{source}: stages must be a list of mappings, each with a name and the keys of a run.")
    flags, said = dict(flags), _pairs(overrides)
    asked = said.pop("output_dir", None) or flags.pop("output_dir", None) or values.get("output_dir")
    folder = Path(str(asked or "runs/weft"))
    found: list[Stage] = []
    for number, own in enumerate(stages):
        name = own.get("name")
        if not isinstance(name, str):
            raise UserError(f"{source}: stages[{number}] has no name.")
        check_name(name)
        if any(stage.name == name for stage in found):
            raise UserError(f"{source}: two stages are named {name}.")
        merged = {**values, **own, "output_dir": str(folder / name)}
        del merged["name"]
        merged = _looked_up(merged, found, f"{source}: stages[{number}]")
        found.append(Stage(name, build_config(merged, said, flags=flags, source=f"{source}: stage {name}")))
    return found


def _pairs(overrides: Overrides) -> dict[str, object]:
    """What is said last, by its keys; words are read as the command line has them.

    Raises:
        UserError: A word is no ``key=value``.
    """
    if isinstance(overrides, Mapping):
        return dict(overrides)
    return dict(said_last({}, overrides))


def _looked_up(values: Any, earlier: Sequence[Stage], where: str) -> Any:
    """The values with folders in the place of the names of earlier stages."""
    if isinstance(values, list):
        return [_looked_up(one, earlier, where) for one in values]
    if not isinstance(values, dict):
        return values
    return {
        key: _adapter(value, earlier, where)
        if key in ("start_from", "adapter") and isinstance(value, str)
        else _looked_up(value, earlier, where)
        for key, value in values.items()
    }


def _adapter(named: str, earlier: Sequence[Stage], where: str) -> str:
    """The folder of an earlier stage's adapter; what names none is a folder itself."""
    name, _, job = named.partition("/")
    for stage in earlier:
        if stage.name != name:
            continue
        jobs = [one.name for one in stage.config.jobs if not (one.judged is not None and one.judged.per_token)]
        if job and job not in jobs:
            raise UserError(f"{where}: stage {name} has no job '{job}'.{nearest(job, jobs)} It has: {', '.join(jobs)}.")
        if not job and len(jobs) > 1:
            raise UserError(f"{where}: stage {name} has the jobs {', '.join(jobs)}; say which, {name}/{jobs[0]}.")
        return str(Path(stage.config.output_dir) / "adapters" / (job or jobs[0]))
    if not Path(named).exists() and earlier:
        names = [stage.name for stage in earlier]
        told = f"no folder and no earlier stage ({', '.join(names)})"
        raise UserError(f"{where}: {named!r} is {told}.{nearest(name, names)}")
    return named
