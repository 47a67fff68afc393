"""The jobs' data: where it lies, and the samples in it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.core.architecture import Architecture
from weft.core.heads import ClassificationTask
from weft.data import Mixture, Problems, Renderer, Sample, Source, load_labelled, parse_sources
from weft.data.formats.detect import EmptyAnswerError
from weft.data.load import Recipe, iter_samples, split_holdout
from weft.data.reading.files import Place, Shards, find_files, unique
from weft.data.sources import split_by_hash
from weft.errors import UserError
from weft.models.hub import fetch_dataset, is_dataset_id
from weft.train.settings import JobConfig, RunConfig


@dataclass(frozen=True)
class JobData:
    """What a job trains on and what it is evaluated on; the classes, if it classifies; how its sources mix."""

    train: list[Sample]
    held: list[Sample]
    classes: ClassificationTask | None = None
    mixture: Mixture = field(default_factory=lambda: Mixture(()))


@dataclass(frozen=True)
class _Loaded:
    """The samples of one source, each with a hash of what it says."""

    samples: list[Sample]
    keys: list[str]


def data_files(config: RunConfig) -> dict[str, Place]:
    """Where the data that the jobs name lies; what is on a hub is fetched.

    Raises UserError for what is not there, and for a file that one job would read twice.
    """
    places: dict[str, Place] = {}
    for job in config.jobs:
        for data in (job.data or config.data, job.eval_data or config.eval_data):
            sources = parse_sources(data) if data is not None else ()
            for source in sources:
                if source.path not in places:
                    places[source.path] = _place(source.path, config)
            unique([file for source in sources for file in find_files(places[source.path])])
    return places


def _place(path: str, config: RunConfig) -> Place:
    if is_dataset_id(path):
        found = fetch_dataset(path, config.data_hub or config.hub)
        return found if isinstance(found, Path) else Shards(found.name, found.files)
    if not Path(path).exists() and not any(mark in path for mark in "*?["):
        raise UserError(f"no data file at {path}.")
    return Path(path)


class Reader:
    """Reads the jobs' files; what several jobs read alike is read once. ``problems`` are those of all of them."""

    def __init__(
        self, config: RunConfig, renderer: Renderer, architecture: Architecture, places: Mapping[str, Place]
    ) -> None:
        self.config, self.renderer, self.architecture = config, renderer, architecture
        self.places = places
        self.files: dict[Any, Any] = {}
        self.problems = Problems(config.on_bad_record, errors={"empty_answer": EmptyAnswerError})

    def job(self, job: JobConfig) -> JobData:
        """The job's samples to train on and to evaluate on."""
        sources = parse_sources(job.data or self.config.data)
        held = job.eval_data or self.config.eval_data
        evaluated = parse_sources(held) if held is not None else ()
        if any(source.weight is not None for source in evaluated):
            raise UserError("eval_data has weights; every record of it is evaluated once. Leave them out.")
        classes = None
        if job.task == "sequence_classification":
            loaded, names = self._labelled(sources, job, tuple(job.labels) if job.labels else None)
            classes = ClassificationTask(names)
            held_out = self._labelled(evaluated, job, names)[0]
        else:
            loaded, held_out = [self._texts(source) for source in sources], [self._texts(s) for s in evaluated]
        self.problems.check("the data")
        train, out = self._split(loaded) if held is None else (loaded, held_out)
        if job.task != "sequence_classification":  # after the split: no window holds text of both sides
            train, out = [self._windows(part) for part in train], [self._windows(part) for part in out]
        weights = tuple(source.weight for source in sources if source.weight is not None) or None
        mixture = Mixture(tuple(len(part.samples) for part in train), weights)
        return JobData(_joined(train), _joined(out), classes, mixture)

    def _split(self, loaded: Sequence[_Loaded]) -> tuple[list[_Loaded], list[_Loaded]]:
        """What to train on and what to hold out, by source. Every job holds out the same, so that losses compare."""
        places = [(number, i) for number, part in enumerate(loaded) for i in range(len(part.samples))]
        if self.config.eval_split is None:
            sides = split_holdout(places, self.config.eval_size, seed=0)
        else:
            sides = split_by_hash(places, [key for part in loaded for key in part.keys], self.config.eval_split)
        train, held = ([[i for n, i in side if n == number] for number in range(len(loaded))] for side in sides)
        return [_taken(*pair) for pair in zip(loaded, train, strict=True)], [
            _taken(*pair) for pair in zip(loaded, held, strict=True)
        ]

    def _windows(self, loaded: _Loaded) -> _Loaded:
        samples = list(self.renderer.join(loaded.samples))
        return _Loaded(samples, [""] * len(samples))

    def _texts(self, source: Source) -> _Loaded:
        config = self.config
        recipe = Recipe(
            self.renderer,
            source.format or config.data_format,
            source.columns or config.columns,
            self.architecture.task,
            keyed=config.eval_split is not None,
        )
        key = (source.path, recipe.format, json.dumps(recipe.columns), source.limit)
        if key not in self.files:
            found = list(
                iter_samples(
                    self.places[source.path],
                    recipe,
                    problems=self.problems,
                    limit=source.limit or config.limit,
                    empty_answers=config.empty_answers,
                    data_workers=config.data_workers,
                )
            )
            pairs = [(sample, made.key) for made in found for sample in made.samples]
            self.files[key] = _Loaded([sample for sample, _ in pairs], [key for _, key in pairs])
        return self.files[key]

    def _labelled(
        self, sources: Sequence[Source], job: JobConfig, labels: tuple[str, ...] | None
    ) -> tuple[list[_Loaded], tuple[str, ...]]:
        """Classification data; the classes are those of ``labels`` or of the first source."""
        loaded, names = [], labels
        for source in sources:
            key = (source.path, names, tuple(job.text_columns or ()), job.label_column, source.limit)
            if key not in self.files:
                self.files[key] = load_labelled(
                    self.places[source.path],
                    self.renderer,
                    labels=names,
                    text_columns=job.text_columns,
                    label_column=job.label_column,
                    limit=source.limit or self.config.limit,
                    encoder=self.architecture.bidirectional,
                    problems=self.problems,
                )
            samples, names = self.files[key]
            loaded.append(_Loaded(samples, [_token_key(sample) for sample in samples]))
        return loaded, names or ()


def _token_key(sample: Sample) -> str:
    """A hash of a text's tokens: the same text is on the same side of a split, whatever its label."""
    return hashlib.sha256(repr(sample.input_ids).encode()).hexdigest()


def _taken(loaded: _Loaded, places: Sequence[int]) -> _Loaded:
    return _Loaded([loaded.samples[i] for i in places], [loaded.keys[i] for i in places])


def _joined(loaded: Sequence[_Loaded]) -> list[Sample]:
    return [sample for part in loaded for sample in part.samples]
