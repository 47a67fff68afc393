"""What stands between a run and its trackers: a tracker that fails is turned off, with one warning."""

from __future__ import annotations

import contextlib
import io
import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from weft.errors import UserError, reason_of
from weft.files.whole import make_folder, write_whole
from weft.foreign import read_json
from weft.training.job import Job
from weft.training.loop import Event
from weft.training.rungs import figures
from weft.training.settings import RunConfig
from weft.training.trackers.names import FOLDER
from weft.training.trackers.tracker import End, Facts, Scalar, Tracker

# Keys of an event that are no figures, or say nothing once the step is over.
_NO_FIGURES = {"event", "job", "step", "total_steps", "eta_seconds", "early_stopping_on"}
_OF_RUN = ("model", "dtype", "quantization", "max_length", "train_on", "exact")


class Reports:
    """The trackers of a run; ``tell`` hears every event first, and what is said of a tracker that fails."""

    def __init__(self, config: RunConfig, jobs: Sequence[Job], tell: Callable[[Event], None]) -> None:
        self.config, self.jobs, self.tell = config, list(jobs), tell
        self.folder = Path(config.output_dir) / FOLDER
        self.trackers: dict[str, Tracker] = {}

    def hear(self, event: Event) -> None:
        """Tell the trackers the figures of an event, if it has some."""
        self.tell(event)
        if event["event"] not in ("step", "eval"):
            return
        told = {key: float(one) for key, one in event.items() if key not in _NO_FIGURES and _is_figure(one)}
        self._each(lambda tracker: tracker.log(str(event["job"]), int(event["step"]), told))

    @contextlib.contextmanager
    def open(self) -> Iterator[Callable[[bool], None]]:
        """Begin, and end however the block does; what it gives is told whether all jobs have ended.

        The block raises what it raises.
        """
        how: list[End] = ["crashed"]
        for name in self.config.report_to:
            self._begin(name)
        try:
            yield lambda completed: how.append("finished" if completed else "stopped")
        finally:
            states = {job.name: final_state(job) for job in self.jobs}
            self._each(lambda tracker: tracker.end(how[-1], states))
            self.trackers.clear()

    def _begin(self, name: str) -> None:
        facts = Facts(
            name=Path(self.config.output_dir).name,
            folder=self.folder / name,
            jobs={job.name: settings_of(self.config, job) for job in self.jobs},
        )
        with self._guarded(name), contextlib.redirect_stdout(io.StringIO()):
            path = self.folder / f"{name}.json"
            if self.config.resume and path.is_file():
                facts.ids, facts.resumed = {str(k): str(v) for k, v in read_json(path).items()}, True
            self.trackers[name] = tracker_of(name)(facts)
            make_folder(self.folder)
            write_whole(path, json.dumps(facts.ids, indent=2) + "\n")

    def _each(self, do: Callable[[Tracker], None]) -> None:
        for name, tracker in list(self.trackers.items()):
            # Results have stdout for themselves, and some trackers print there.
            with self._guarded(name), contextlib.redirect_stdout(io.StringIO()):
                do(tracker)

    @contextlib.contextmanager
    def _guarded(self, name: str) -> Iterator[None]:
        try:
            yield
        except Exception as error:
            self.trackers.pop(name, None)
            kind = "" if isinstance(error, UserError) else f"{type(error).__name__}: "
            message = f"report_to: {name} failed ({kind}{reason_of(error)}) and is off from here on; the run goes on"
            self.tell({"event": "warning", "message": message})


def tracker_of(name: str) -> type[Tracker]:
    """The tracker of a name in ``TRACKERS``; its package is imported when it begins."""
    if name == "tensorboard":
        from weft.training.trackers.tensorboard import TensorBoard as Found
    elif name == "wandb":
        from weft.training.trackers.wandb import WeightsAndBiases as Found  # type: ignore[assignment]
    elif name == "mlflow":
        from weft.training.trackers.mlflow import MLflow as Found  # type: ignore[assignment]
    elif name == "swanlab":
        from weft.training.trackers.swanlab import SwanLab as Found  # type: ignore[assignment]
    else:
        from weft.training.trackers.trackio import Trackio as Found  # type: ignore[assignment]
    return Found


def settings_of(config: RunConfig, job: Job) -> dict[str, Scalar]:
    """The settings of a job and of its base that change results, by their keys; with dots for what lies deeper."""
    own: dict[str, Any] = {key: getattr(config, key) for key in _OF_RUN}
    values = job.config.model_dump(mode="json") | {"learning_rate": job.rate}
    own |= {**values.pop("method_settings"), **values}
    return dict(_flat(own, ""))


def final_state(job: Job) -> dict[str, Scalar]:
    """How a job ended, at which step, and the figures of its last evaluation."""
    progress = job.progress
    told: dict[str, Scalar | None] = {"ended": progress.ended or "interrupted", "step": progress.step}
    told["reason"] = progress.reason
    return {key: value for key, value in {**told, **figures(job)}.items() if value is not None}


def _flat(values: Mapping[str, Any], above: str) -> Iterator[tuple[str, Scalar]]:
    for key, value in values.items():
        if isinstance(value, Mapping):
            yield from _flat(value, f"{above}{key}.")
        elif value is not None and value != [] and value != {}:
            yield f"{above}{key}", value if isinstance(value, (str, int, float, bool)) else json.dumps(value)


def _is_figure(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
