"""``sweep.json``: what a sweep tries, how far it is, and what came out. It is written whole after every decision."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from weft.errors import UserError
from weft.files.whole import write_whole
from weft.foreign import entry, expect, read_json
from weft.sweeps.halving import Rung, place
from weft.sweeps.trials import Trials

SWEEP_FILE = "sweep.json"
_FORMAT = 1


@dataclass(kw_only=True)
class Result:
    """How a trial ended. ``figure``: of the weights that are kept; None if it has none, or it is not finite."""

    ended: str  # finished, early_stop, left, failed
    step: int
    figure: float | None
    reason: str | None = None
    folder: str | None = None
    figures: dict[str, float | None] = field(default_factory=dict)


@dataclass(kw_only=True)
class Record:
    """A sweep in its folder.

    Attributes:
        groups: the names of the trials that share a run, by run.
        reports: the figure of each trial at the step of each rung, as far as they have come.
        left: why each trial that left did so, by the step.
        complete: the numbers of the runs that are trained to their end.
    """

    folder: Path
    asked: dict[str, Any]
    trials: dict[str, dict[str, Any]]
    rungs: tuple[Rung, ...]
    groups: list[list[str]] = field(default_factory=list)
    reports: dict[int, dict[str, float]] = field(default_factory=dict)
    left: dict[int, dict[str, str]] = field(default_factory=dict)
    results: dict[str, Result] = field(default_factory=dict)
    complete: set[int] = field(default_factory=set)
    seconds: float = 0.0

    @property
    def metric(self) -> str:
        """The figure by which trials are compared."""
        return str(self.asked["metric"])

    @property
    def lower(self) -> bool:
        """Whether a lower figure is better."""
        return self.metric.endswith("loss")

    def run(self, number: int) -> Path:
        """The folder of a run."""
        return self.folder / f"run-{number}"

    @property
    def waiting(self) -> list[int]:
        """The numbers of the runs that are not trained to their end."""
        return [number for number in range(len(self.groups)) if number not in self.complete]

    def table(self) -> list[str]:
        """The names of the trials, the best first: those that were trained to the end, those that left, the failed."""
        last = {"left": 1, "failed": 2}

        def order(names: Sequence[str]) -> list[str]:
            told = {name: self.results[name].figure for name in names}
            return place({name: math.nan if one is None else one for name, one in told.items()}, self.lower)

        found = []
        for kind in range(3):
            own = [name for name in self.trials if name in self.results]
            own = [name for name in own if last.get(self.results[name].ended, 0) == kind]
            steps = sorted({self.results[name].step if kind == 1 else 0 for name in own}, reverse=True)
            for step in steps:
                found += order([name for name in own if kind != 1 or self.results[name].step == step])
        return found

    @property
    def winner(self) -> str | None:
        """The best trial; None: none was trained to its end."""
        best = next(iter(self.table()), None)
        return best if best is not None and self.results[best].ended in ("finished", "early_stop") else None

    def json(self) -> dict[str, Any]:
        """The record as JSON holds it."""
        rungs = [
            {"step": one.step, "keep": one.keep, "figures": self.reports.get(one.step, {}),
             "left": self.left.get(one.step)}
            for one in self.rungs
        ]  # fmt: skip
        order = self.table()
        return {
            "format": _FORMAT,
            "asked": self.asked,
            "trials": self.trials,
            "groups": self.groups,
            "rungs": rungs,
            "results": {name: asdict(self.results[name]) for name in order},
            "order": order,
            "winner": None if self.waiting else self.winner,
            "complete": sorted(self.complete),
            "seconds": round(self.seconds, 3),
        }

    def save(self) -> None:
        """Write the file.

        Raises:
            WriteError: The machine refuses to write it.
        """
        write_whole(self.folder / SWEEP_FILE, json.dumps(_finite(self.json()), indent=2, ensure_ascii=False) + "\n")


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: _finite(one) for key, one in value.items()}
    return [_finite(one) for one in value] if isinstance(value, (list, tuple)) else value


def new_record(folder: Path, trials: Trials, asked: Mapping[str, Any], rungs: Sequence[Rung]) -> Record:
    """The record of a sweep that has not begun; ``asked`` are the words and options that it was called with."""
    told = {
        trial.name: {"settings": trial.settings, "seed": trial.job.seed, "job": trial.job.model_dump(mode="json")}
        for trial in trials.trials
    }
    return Record(folder=folder, asked=dict(asked), trials=told, rungs=tuple(rungs))


def resumed(record: Record) -> bool:
    """Take over what the folder holds of the same sweep; False if it holds none.

    Raises:
        UserError: It holds another sweep, or the file is damaged.
    """
    path = record.folder / SWEEP_FILE
    if not path.is_file():
        return False
    found = read_json(path)
    if found.get("format") != _FORMAT:
        raise UserError(f"{path}: format {found.get('format')!r} is not known here; it was written by another version.")
    changed = [key for key in ("asked", "trials") if found.get(key) != _plain(getattr(record, key))]
    old = [[one.get("step"), one.get("keep")] for one in expect(found.get("rungs"), list, f"{path}: rungs")]
    if changed or old != [[one.step, one.keep] for one in record.rungs]:
        raise UserError(
            f"{record.folder} holds another sweep ({_difference(found, record)}). Call it as it was called, take "
            "another output_dir, or overwrite_output_dir=true to delete it."
        )
    where = str(path)
    record.groups = [list(map(str, one)) for one in entry(found, "groups", list, where)]
    record.complete = set(map(int, entry(found, "complete", list, where)))
    for one in entry(found, "rungs", list, where):
        rung = expect(one, dict, where)
        step = entry(rung, "step", int, where)
        figures = entry(rung, "figures", dict, where)
        record.reports[step] = {str(name): math.nan if one is None else float(one) for name, one in figures.items()}
        if rung.get("left") is not None:
            record.left[step] = {str(name): str(why) for name, why in entry(rung, "left", dict, where).items()}
    for name, result in entry(found, "results", dict, where).items():
        try:
            record.results[str(name)] = Result(**expect(result, dict, where))
        except TypeError as error:
            raise UserError(f"{path}: the result of {name} is damaged: {error}.") from None
    record.seconds = float(expect(found.get("seconds"), (int, float), f"{where}: seconds"))
    return True


def _plain(value: Any) -> Any:
    """As it is read back from JSON."""
    if isinstance(value, Mapping):
        return {str(key): _plain(one) for key, one in value.items()}
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _difference(found: Mapping[str, Any], record: Record) -> str:
    """The first thing in which two sweeps differ."""
    asked = found.get("asked")
    if isinstance(asked, dict):
        for key, value in record.asked.items():
            if asked.get(key) != _plain(value):
                return f"{key}: {asked.get(key)!r} there, {_plain(value)!r} here"
    trials = found.get("trials")
    if isinstance(trials, dict) and len(trials) != len(record.trials):
        return f"{len(trials)} trials there, {len(record.trials)} here"
    return "other settings of its trials"
