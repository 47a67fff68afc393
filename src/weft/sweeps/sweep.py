"""A sweep: trials that share runs over one base, compared, and left or trained to their end.

Trials are jobs of ordinary runs. What is special about a sweep is who leaves, and that several runs may have to wait
for each other: a run that comes to a rung before others have come there saves and ends, and goes on when they have.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Protocol

from weft.errors import UserError
from weft.files.run_folder import RUN_FILE, read_metrics
from weft.files.whole import is_part, make_folder
from weft.files.writing import writing
from weft.sweeps.halving import Rung, leaving
from weft.sweeps.record import SWEEP_FILE, Record, Result
from weft.sweeps.trials import Trials
from weft.training.loop import TrainResult
from weft.training.rungs import Rungs
from weft.training.settings import JobConfig, RunConfig, eval_key

# A rung, and why each trial that leaves there does so.
Heard = Callable[[Rung, Mapping[str, str]], None]


class Runner(Protocol):
    """Trains a run until it ends, is asked to stop, or waits at a rung.

    Here a run is trained in this process. Another runner may do it elsewhere: it needs the configuration, whose
    folder holds all of a run's state, and the decisions about rungs that are known (``Rungs.judge`` gives None for
    those that are not).
    """

    def __call__(self, config: RunConfig, rungs: Rungs | None) -> TrainResult: ...


def check_folder(folder: Path, *, overwrite: bool) -> None:
    """Refuse a folder that holds something else than a sweep; changes nothing.

    Raises:
        UserError: It does.
    """
    if not folder.exists() or (folder / SWEEP_FILE).is_file():
        return
    if not folder.is_dir():
        raise UserError(f"output_dir {folder} is a file, not a folder.")
    what = "a run" if (folder / RUN_FILE).is_file() else "something else than a sweep"
    if any(not is_part(path.name) for path in folder.iterdir()):
        told = "it is not overwritten" if overwrite else "it is left alone"
        raise UserError(f"{folder} holds {what}, so {told}; take another output_dir.")


def begin(folder: Path, *, overwrite: bool) -> None:
    """Make the folder of a sweep; with ``overwrite`` delete the sweep that is in it.

    Raises:
        UserError: It holds something else.
    """
    check_folder(folder, overwrite=overwrite)
    if overwrite and (folder / SWEEP_FILE).is_file():
        with writing(folder, name="output_dir "):
            shutil.rmtree(folder)
    make_folder(folder, "output_dir ")


def run_sweep(
    record: Record,
    trials: Trials,
    runner: Runner,
    on_decision: Heard = lambda rung, left: None,
) -> bool:
    """Train all trials, group by group, until each has ended; False if it was asked to stop.

    ``on_decision`` hears which trials left at a rung, and why.

    Raises:
        UserError: As ``weft.training.run.train``; or no trial has the figure that they are compared by.
    """
    while record.waiting:
        for number in record.waiting:
            group = record.groups[number]
            council = _Council(record, group, on_decision)
            config = trials.run(group, record.run(number))
            rungs = Rungs(tuple(one.step for one in record.rungs), record.metric, council.judge)
            result = runner(config, rungs if record.rungs else None)
            record.seconds += result.seconds
            _note(record, config, result)
            record.complete.update([number] if result.completed else [])
            record.save()
            if not result.completed and not council.waits:
                return False
    if all(record.results[name].figure is None for name in record.trials):
        raise UserError(_no_figure(record))
    return True


class _Council:
    """Decides for one run which of its trials leave. ``waits``: it had to leave that open."""

    def __init__(self, record: Record, group: Sequence[str], on_decision: Heard) -> None:
        self.record, self.group, self.on_decision, self.waits = record, group, on_decision, False

    def judge(self, step: int, figures: Mapping[str, float]) -> Mapping[str, str] | None:
        """Why each trial that leaves does so; None: trials of other runs have not come to this step."""
        record = self.record
        rung = next(one for one in record.rungs if one.step == step)
        if step not in record.left:
            record.reports.setdefault(step, {}).update(figures)
            # In the order of the trials, so that equal figures do not depend on which run came first.
            told = {name: record.reports[step][name] for name in record.trials if name in record.reports[step]}
            record.reports[step] = told
            others = [name for name in record.trials if name not in self.group and name not in record.results]
            if any(name not in told for name in others):
                record.save()
                self.waits = True
                return None
            record.left[step] = leaving(told, rung, record.metric, lower=record.lower)
            record.save()
            self.on_decision(rung, record.left[step])
        return {name: why for name, why in record.left[step].items() if name in figures}


def _note(record: Record, config: RunConfig, result: TrainResult) -> None:
    """Note how those trials of a run ended that have."""
    rows = read_metrics(config.output_dir)
    for job in config.jobs:
        state = result.jobs[job.name]
        if state["ended"] is None:
            continue
        told = _kept([row for row in rows if row["event"] == "eval" and row["job"] == job.name], job, state)
        failed = state["ended"] == "failed"
        figure = None if failed else told.get(record.metric)
        record.results[job.name] = Result(
            ended=state["ended"],
            step=state["step"],
            figure=figure if figure is not None and math.isfinite(figure) else None,
            reason=state["reason"],
            folder=None if failed else str(Path(config.output_dir) / "adapters" / job.name),
            figures=told,
        )


def _kept(rows: Sequence[Mapping[str, Any]], job: JobConfig, state: Mapping[str, Any]) -> dict[str, float | None]:
    """The figures of the weights that are kept: with early stopping the best, else the last."""
    best = state["best_eval_loss"]
    chosen = list(rows[-1:])
    if job.early_stopping_patience is not None and state["ended"] != "left":
        watched = job.early_stopping_on or (next(iter(best)) if isinstance(best, dict) and len(best) == 1 else "")
        least = best.get(watched) if isinstance(best, dict) else best
        chosen = [row for row in rows if row.get(eval_key(watched, "loss")) == least][:1] or chosen
    return {key: value for row in chosen for key, value in row.items() if key.startswith("eval_")}


def _no_figure(record: Record) -> str:
    there = sorted({key for one in record.results.values() for key in one.figures})
    if record.metric in there or not there:
        return f"no trial of the sweep in {record.folder} has a result: all failed. {SWEEP_FILE} says why."
    return (
        f"no trial has the figure {record.metric}; they have {', '.join(there)}. The trials are trained: name one of "
        f"these with --metric, and another output_dir; or look into {record.folder / SWEEP_FILE}."
    )
