"""The jobs' data files: where they lie, and the samples in them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from weft.core.architecture import Architecture
from weft.core.heads import ClassificationTask
from weft.data import Renderer, Sample, load_labelled, load_samples, split_holdout
from weft.errors import UserError
from weft.models.hub import fetch_dataset, is_dataset_id
from weft.train.settings import JobConfig, RunConfig


@dataclass(frozen=True)
class JobData:
    """What a job trains on and what it is evaluated on; the classes, if it classifies."""

    train: list[Sample]
    held: list[Sample]
    classes: ClassificationTask | None = None


def data_files(config: RunConfig) -> dict[str, Path]:
    """Where the data that the jobs name lies; what is on a hub is fetched."""
    places = {}
    for job in config.jobs:
        for data in (job.data or config.data, job.eval_data or config.eval_data):
            if data is None or data in places:
                continue
            if is_dataset_id(data):
                places[data] = fetch_dataset(data, config.data_hub or config.hub)
            elif Path(data).is_dir():
                raise UserError(f"{data} is a folder; data is one file.")
            elif not Path(data).is_file():
                raise UserError(f"no data file at {data}.")
            else:
                places[data] = Path(data)
    return places


class Reader:
    """Reads the jobs' files; what several jobs read alike is read once."""

    def __init__(
        self, config: RunConfig, renderer: Renderer, architecture: Architecture, places: Mapping[str, Path]
    ) -> None:
        self.config, self.renderer, self.architecture = config, renderer, architecture
        self.places = places
        self.files: dict[Any, Any] = {}

    def job(self, job: JobConfig) -> JobData:
        """The job's samples to train on and to evaluate on."""
        path, held = job.data or self.config.data, job.eval_data or self.config.eval_data
        classes = None
        if job.task == "sequence_classification":
            samples, names = self._labelled(path, job, tuple(job.labels) if job.labels else None)
            classes = ClassificationTask(names)
            if held is not None:
                return JobData(samples, self._labelled(held, job, names)[0], classes)
        else:
            samples = self._texts(path)
            if held is not None:
                return JobData(samples, self._texts(held))
        # Every job holds out the same records, so that their losses compare.
        return JobData(*split_holdout(samples, self.config.eval_size, seed=0), classes)

    def _texts(self, path: str) -> list[Sample]:
        if path not in self.files:
            self.files[path] = load_samples(
                self.places[path],
                self.renderer,
                format=self.config.data_format,
                columns=self.config.columns,
                limit=self.config.limit,
                empty_answers=self.config.empty_answers,
                task=self.architecture.task,
            )
        return self.files[path]

    def _labelled(
        self, path: str, job: JobConfig, labels: tuple[str, ...] | None
    ) -> tuple[list[Sample], tuple[str, ...]]:
        key = (path, labels, tuple(job.text_columns or ()), job.label_column)
        if key not in self.files:
            self.files[key] = load_labelled(
                self.places[path],
                self.renderer,
                labels=labels,
                text_columns=job.text_columns,
                label_column=job.label_column,
                limit=self.config.limit,
                encoder=self.architecture.bidirectional,
            )
        return self.files[key]
