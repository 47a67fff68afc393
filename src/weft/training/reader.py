"""The data of the jobs: its places, and the samples in it."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from weft.data import Mixture, Problems, Renderer, Sample, Source, parse_sources
from weft.data.formats.turns import EmptyAnswerError
from weft.data.judged import JudgedRecipe
from weft.data.labelled import ClassRecipe, given_labels
from weft.data.pipeline import Fold, Outcome, Recipe, TextRecipe, outcomes
from weft.data.problems import OnBadRecord
from weft.data.prompts import PromptRecipe
from weft.data.reading.files import Place, Shards, find_files, unique
from weft.data.rendering.render import Task
from weft.data.settings import ReadSettings
from weft.data.sources import held_by_chance, held_by_hash, parse_sets
from weft.data.store import MEMORY, SampleStore
from weft.data.views import Array, Samples, chained
from weft.errors import UserError
from weft.heads.reward import OwnHead, RewardTask, task_of
from weft.models.hub import fetch_dataset, is_dataset_id
from weft.training.settings import OWN_TEXT, JobConfig, RunConfig


@dataclass(frozen=True)
class JobData:
    """The samples that a job trains on and those that evaluate it; its classes, if any; the mixture of its sources.

    ``sizes`` are those of the named sets that ``held`` consists of, in order; without names it is empty.
    """

    train: Sequence[Sample]
    held: Sequence[Sample]
    classes: OwnHead | None = None
    _: KW_ONLY
    mixture: Mixture = field(default_factory=lambda: Mixture(()))
    sizes: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class SourceSamples:
    """The samples of one source, a hash of what each says where a split asks for it, and the names of its classes.

    ``outcomes`` are those of all its records, where they are watched.
    """

    path: str
    samples: Samples
    keys: Sequence[int]
    _: KW_ONLY
    names: tuple[str, ...]
    outcomes: Sequence[Outcome]

    @property
    def several(self) -> tuple[str, ...] | None:
        """The names of the classes, if there are several."""
        return self.names if len(self.names) > 1 else None


Sides = tuple[list[Samples], list[Samples]]  # to train on, to evaluate on, by source


class JobSources(NamedTuple):
    """The samples read for a job, by source: those to train on, and those to evaluate on (None: they are split off).

    ``sets`` are the names of the sets that the sources to evaluate on belong to, one per source.
    """

    sources: tuple[SourceSamples, ...]
    evaluated: tuple[SourceSamples, ...] | None
    sets: tuple[str, ...]


def data_files(config: RunConfig) -> dict[str, Place]:
    """The places of the data that the jobs name. Data on a hub is fetched.

    Raises:
        UserError: A file is not there, or one job would read it twice.
    """
    places: dict[str, Place] = {}
    for job in config.jobs:
        for sources in (
            parse_sources(job.data or config.data),
            *parse_sets(job.eval_data or config.eval_data).values(),
        ):
            for source in sources:
                if source.path not in places:
                    places[source.path] = _place(source.path, config)
            unique([file for source in sources for file in find_files(places[source.path])])
    for source in general_sources(config):
        if source.path not in places:
            places[source.path] = _place(source.path, config)
        find_files(places[source.path])
    return places


def general_sources(config: RunConfig) -> tuple[Source, ...]:
    """The sources of general text; none where the base writes it, or none is wanted."""
    return () if config.forgetting_eval in (None, OWN_TEXT) else parse_sources(config.forgetting_eval)


def _place(path: str, config: RunConfig) -> Place:
    if is_dataset_id(path):
        found = fetch_dataset(path, config.data_hub or config.hub)
        return found if isinstance(found, Path) else Shards(found.name, found.files)
    return Path(path)


def nothing_left(name: str | None) -> str:
    """What there is where no sample is left: to train on (None), or to evaluate on in the set ``name``."""
    if name is None:
        return "nothing to learn"
    return f"nothing to evaluate on (eval_data{f', the set {name}' * bool(name)})"


class Base(Protocol):
    """The facts of a base that decide how data is read for it."""

    @property
    def task(self) -> Task: ...

    @property
    def bidirectional(self) -> bool: ...


class Reader:
    """Reads the jobs' files; what several jobs read alike is read once. ``problems`` are those of all of them.

    Samples go to a ``SampleStore`` as they are made. What is made of them in turn (documents joined, classes numbered
    anew) goes to another, which lives longer: the first ones are not needed any more when the Reader is gone.
    ``watched``, for a preview: outcomes are kept, and reading goes on where training would end.
    """

    def __init__(
        self, config: RunConfig, renderer: Renderer, base: Base, places: Mapping[str, Place],
        *, token_rows: int | None = None, watched: bool = False,
    ) -> None:  # fmt: skip
        self.token_rows = token_rows
        self.config, self.renderer, self.base, self.places, self.watched = config, renderer, base, places, watched
        self.files: dict[Any, SourceSamples] = {}
        self.stores = SampleStore(MEMORY // 2), SampleStore(MEMORY // 2)
        self.made: dict[JobSources, Sides] = {}
        mode: OnBadRecord = "skip" if watched else config.on_bad_record
        self.problems = Problems(mode, errors={"empty_answer": EmptyAnswerError})

    def job(self, job: JobConfig) -> JobData:
        """The job's samples to train on and to evaluate on."""
        read = self.read(job)
        self.problems.check("the data")
        return self.data(job, read)

    def read(self, job: JobConfig) -> JobSources:
        """The records of the job's sources.

        Raises:
            UserError: A record cannot be used, and ``on_bad_record`` demands it; or ``eval_data`` has weights.
        """
        sources = parse_sources(job.data or self.config.data)
        sets = parse_sets(job.eval_data or self.config.eval_data)
        names, evaluated = [name for name, own in sets.items() for _ in own], [*chain.from_iterable(sets.values())]
        if any(source.weight is not None for source in evaluated):
            raise UserError("eval_data has weights; every record of it is evaluated once. Leave them out.")
        loaded: list[SourceSamples] = []
        labels = given_labels(job.labels)
        for number, (source, name) in enumerate(
            zip((*sources, *evaluated), (*[None] * len(sources), *names), strict=True)
        ):
            settings = self.config.of(source, evaluated=number >= len(sources))
            loaded.append(self._source(source, settings, job, labels, nothing=nothing_left(name)))
            labels = labels or loaded[0].several
        parts = tuple(loaded[: len(sources)]), tuple(loaded[len(sources) :])
        return JobSources(parts[0], parts[1] if sets else None, tuple(names))

    def general(self) -> Samples | None:
        """The general text that forgetting is measured on; None: no file of it is named.

        Raises:
            UserError: A text cannot be used, or there is none.
        """
        sources = general_sources(self.config)
        if not sources:
            return None
        read = [
            self._source(source, self.config.of(source, evaluated=True), None, None,
                         nothing="nothing to measure forgetting on (forgetting_eval)").samples
            for source in sources
        ]  # fmt: skip
        self.problems.check("forgetting_eval")
        if self.renderer.settings.documents == "joined":
            read = [self._stored(self.renderer.join(part)) for part in read]
        return chained(read)

    def split(self, read: JobSources) -> list[Array]:
        """The marks (bool) of the samples held out, by source. All jobs have the same, so that losses compare.

        Raises:
            UserError: All would be held out, or none where some are wanted.
        """
        sizes = [len(part.samples) for part in read.sources]
        if read.evaluated is not None:
            return [np.zeros(size, bool) for size in sizes]
        if self.config.eval_split is None:
            if 0 < sum(sizes) <= self.config.eval_size:
                files = " + ".join(part.path for part in read.sources)
                raise UserError(
                    f"{files}: eval_size {self.config.eval_size} leaves nothing to train on, of {sum(sizes)} samples. "
                    "Take a smaller eval_size, eval_split: 0.1 (a share), or eval_data (another file)."
                )
            held = held_by_chance(sum(sizes), self.config.eval_size, seed=0)
        else:
            held = held_by_hash((key for part in read.sources for key in part.keys), self.config.eval_split)
        return np.split(np.frombuffer(held, bool), np.cumsum(sizes)[:-1])

    def _sides(self, read: JobSources, held: Sequence[Array]) -> Sides:
        """The samples to train on and to evaluate on; ``held`` marks those of the sources that are held out."""
        pairs = [(part.samples, out) for part, out in zip(read.sources, held, strict=True)]
        train = [samples.picked(~out) for samples, out in pairs]
        if read.evaluated is not None:
            evaluated = [part.samples for part in read.evaluated]
        else:
            evaluated = [samples.picked(out) for samples, out in pairs]
        if read.sources[0].names or self.renderer.settings.documents != "joined":
            return train, evaluated
        # Documents are joined after the split, so that no window holds text of both sides.
        train, evaluated = ([self._stored(self.renderer.join(part)) for part in side] for side in (train, evaluated))
        return train, evaluated

    def data(self, job: JobConfig, read: JobSources, held: Sequence[Array] | None = None) -> JobData:
        """The job's data. ``held`` marks the samples of the sources that are held out; default: as ``split`` does."""
        if read not in self.made:
            self.made[read] = self._sides(read, self.split(read) if held is None else held)
        train, evaluated = self.made[read]
        weights = [source.weight for source in parse_sources(job.data or self.config.data) if source.weight is not None]
        mixture = Mixture(tuple(map(len, train)), tuple(weights) or None)
        names, sizes = read.sources[0].several, Counter[str]()
        for name, part in zip(read.sets, evaluated, strict=bool(read.sets)):
            sizes.update({name: len(part)} if name else {})
        judged = job.judged
        classes = RewardTask() if judged is not None and judged.scores else task_of(names) if names else None
        return JobData(chained(train), chained(evaluated), classes, mixture=mixture, sizes=sizes)

    def _stored(self, samples: Iterable[Sample]) -> Samples:
        store = self.stores[1]
        start = len(store)
        for sample in samples:
            store.append(sample)
        return store[start:]

    def _recipe(self, settings: ReadSettings, job: JobConfig | None, labels: tuple[str, ...] | None) -> Recipe:
        """How records are read for a job; None: as texts to measure on."""
        keyed = self.config.eval_split is not None
        if job is not None and job.classifies:
            return ClassRecipe(
                renderer=self.renderer,
                token_rows=self.token_rows,
                labels=labels,
                text_columns=job.text_columns,
                label_column=job.label_column,
                encoder=self.base.bidirectional,
                keyed=keyed,
                watched=self.watched,
            )
        common: dict[str, Any] = {
            "renderer": self.renderer, "token_rows": self.token_rows, "settings": settings, "keyed": keyed,
            "watched": self.watched,
        }  # fmt: skip
        if job is None or (judged := job.judged) is None:
            return TextRecipe(task=self.base.task, **common)
        return PromptRecipe(**common) if judged.judgement == "prompts" else JudgedRecipe(
            judgement=judged.judgement, **common
        )

    def _source(
        self,
        source: Source,
        settings: ReadSettings,
        job: JobConfig | None,
        labels: tuple[str, ...] | None,
        *,
        nothing: str,
    ) -> SourceSamples:
        recipe, place, limit = self._recipe(settings, job, labels), self.places[source.path], settings.limit
        key = (source.path, repr(recipe), limit)
        if key not in self.files:
            self.problems.begin()
            store, keys, fold = self.stores[0], array("Q"), Fold(place, recipe, self.problems, nothing=nothing)
            start = len(store)
            workers = 0 if self.watched else self.config.data_workers
            found: Iterable[Outcome] = outcomes(place, recipe, limit=limit, workers=workers)
            seen = list(found) if self.watched else ()
            for sample, said in fold.samples(seen or found):
                store.append(sample)
                if recipe.keyed:
                    keys.append(said)
            if not self.watched:
                recipe.end(fold)
            samples = store[start:]
            if not fold.settled:
                samples = self._stored(fold.numbered(samples))
            self.files[key] = SourceSamples(source.path, samples, keys, names=fold.names, outcomes=seen)
        return self.files[key]
