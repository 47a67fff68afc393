"""The jobs' data: where it lies, and the samples in it."""

from __future__ import annotations

import hashlib
import json
from array import array
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from weft.core.architecture import Architecture
from weft.core.heads import ClassificationTask
from weft.data import Mixture, Problems, Renderer, Sample, Source, load_labelled, parse_sources
from weft.data.formats.detect import EmptyAnswerError
from weft.data.load import Recipe, held_by_chance, iter_samples
from weft.data.reading.files import Place, Shards, find_files, unique
from weft.data.sources import held_by_hash
from weft.data.store import MEMORY, SampleStore
from weft.data.views import chained, picked
from weft.errors import UserError
from weft.models.hub import fetch_dataset, is_dataset_id
from weft.train.settings import JobConfig, RunConfig


@dataclass(frozen=True)
class JobData:
    """What a job trains on and what it is evaluated on; the classes, if it classifies; how its sources mix."""

    train: Sequence[Sample]
    held: Sequence[Sample]
    classes: ClassificationTask | None = None
    mixture: Mixture = field(default_factory=lambda: Mixture(()))


@dataclass(frozen=True)
class _Loaded:
    """The samples of one source, each with a hash of what it says."""

    samples: Sequence[Sample]
    keys: Iterable[str]


_Sides = tuple[list[Sequence[Sample]], list[Sequence[Sample]]]  # to train on, to evaluate on, by source


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


def check_evaluated(sources: Sequence[Source]) -> None:
    """Refuse weights of the data that is evaluated on.

    Raises:
        UserError: There are.
    """
    if any(source.weight is not None for source in sources):
        raise UserError("eval_data has weights; every record of it is evaluated once. Leave them out.")


class _Keys:
    """Hashes of samples, of which only what a split looks at is kept: 8 bytes each."""

    def __init__(self) -> None:
        self.numbers = array("Q")

    def __iter__(self) -> Iterator[str]:
        return (f"{number:016x}" for number in self.numbers)

    def append(self, key: str) -> None:
        self.numbers.append(int(key[:16], 16))


class Reader:
    """Reads the jobs' files; what several jobs read alike is read once. ``problems`` are those of all of them.

    Samples go to a ``SampleStore`` as they are made, the windows of documents that are joined to another, which lives
    longer: the documents themselves are not needed any more when the Reader is gone.
    """

    def __init__(
        self, config: RunConfig, renderer: Renderer, architecture: Architecture, places: Mapping[str, Place]
    ) -> None:
        self.config, self.renderer, self.architecture = config, renderer, architecture
        self.places = places
        self.files: dict[Any, Any] = {}
        self.stores = SampleStore(MEMORY // 2), SampleStore(MEMORY // 2)
        self.sides: dict[Any, tuple[_Sides, Any]] = {}
        self.problems = Problems(config.on_bad_record, errors={"empty_answer": EmptyAnswerError})

    def job(self, job: JobConfig) -> JobData:
        """The job's samples to train on and to evaluate on."""
        sources = parse_sources(job.data or self.config.data)
        held = job.eval_data or self.config.eval_data
        evaluated = parse_sources(held) if held is not None else ()
        check_evaluated(evaluated)
        classes = None
        if job.task == "sequence_classification":
            loaded, names = self._labelled(sources, job, tuple(job.labels) if job.labels else None)
            classes = ClassificationTask(names)
            held_out = self._labelled(evaluated, job, names)[0]
        else:
            loaded, held_out = [self._texts(source) for source in sources], [self._texts(s) for s in evaluated]
        self.problems.check("the data")
        train, out = self._sides(loaded, None if held is None else held_out, texts=classes is None)
        weights = tuple(source.weight for source in sources if source.weight is not None) or None
        return JobData(chained(train), chained(out), classes, Mixture(tuple(map(len, train)), weights))

    def _sides(self, loaded: Sequence[_Loaded], held_out: Sequence[_Loaded] | None, *, texts: bool) -> _Sides:
        """What to train on and what to evaluate on, by source. Made once for jobs with the same data."""
        key = tuple(tuple(id(part) for part in parts) for parts in (loaded, held_out or ())), held_out is None
        if key not in self.sides:
            train, out = self._split(loaded) if held_out is None else (_samples(loaded), _samples(held_out))
            if texts:  # after the split: no window holds text of both sides
                train, out = [self._windows(part) for part in train], [self._windows(part) for part in out]
            self.sides[key] = (train, out), (loaded, held_out)  # what is held keeps its id
        return self.sides[key][0]

    def _split(self, loaded: Sequence[_Loaded]) -> _Sides:
        """What to train on and what to hold out, by source. Every job holds out the same, so that losses compare."""
        sizes = [len(part.samples) for part in loaded]
        if self.config.eval_split is None:
            held = held_by_chance(sum(sizes), self.config.eval_size, seed=0)
        else:
            held = held_by_hash((key for part in loaded for key in part.keys), self.config.eval_split)
        marks = np.split(np.frombuffer(held, bool), np.cumsum(sizes)[:-1])
        pairs = list(zip(_samples(loaded), marks, strict=True))
        return [picked(samples, ~out) for samples, out in pairs], [picked(samples, out) for samples, out in pairs]

    def _windows(self, samples: Sequence[Sample]) -> Sequence[Sample]:
        if self.renderer.limit.documents != "joined":
            return samples
        store = self.stores[1]
        start = len(store)
        for sample in self.renderer.join(samples):
            store.append(sample)
        return store.part(slice(start, None))

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
            self.problems.begin()
            store, keys = self.stores[0], _Keys()
            start = len(store)
            for made in iter_samples(
                self.places[source.path],
                recipe,
                problems=self.problems,
                limit=source.limit or config.limit,
                empty_answers=config.empty_answers,
                data_workers=config.data_workers,
            ):
                for sample in made.samples:
                    store.append(sample)
                    if recipe.keyed:
                        keys.append(made.key)
            self.files[key] = _Loaded(store.part(slice(start, None)), keys)
        return self.files[key]

    def _labelled(
        self, sources: Sequence[Source], job: JobConfig, labels: tuple[str, ...] | None
    ) -> tuple[list[_Loaded], tuple[str, ...]]:
        """Classification data; the classes are those of ``labels`` or of the first source."""
        loaded, names = [], labels
        for source in sources:
            key = (source.path, names, tuple(job.text_columns or ()), job.label_column, source.limit)
            if key not in self.files:
                self.problems.begin()
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
            loaded.append(_Loaded(samples, [token_key(sample) for sample in samples]))
        return loaded, names or ()


def token_key(sample: Sample) -> str:
    """A hash of a text's tokens: the same text is on the same side of a split, whatever its label."""
    return hashlib.sha256(repr(sample.input_ids).encode()).hexdigest()


def _samples(loaded: Sequence[_Loaded]) -> list[Sequence[Sample]]:
    return [part.samples for part in loaded]
