"""A configuration's data as training would read and render it, with neither weights nor adapters: for previews."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from weft.core import reach
from weft.core.adapters import Adapters
from weft.core.heads import ClassificationTask
from weft.core.reach import LeftOut
from weft.data import Mixture, Renderer, Sample, Source, parse_sources
from weft.data.auditing.base import Facts, Item, Split
from weft.data.auditing.items import TOO_LONG, read_items, read_labelled_items
from weft.data.load import held_by_chance
from weft.data.reading.files import Place
from weft.data.sources import content_key, held_by_hash
from weft.errors import UserError
from weft.models import Base
from weft.models.load import load_tokenizer
from weft.train.batches import Batches
from weft.train.packing import Packing
from weft.train.reader import check_evaluated, data_files, token_key
from weft.train.settings import JobConfig, RunConfig


@dataclass(frozen=True)
class Examined:
    """The data that some of the jobs (``names``) share, and how they pack it.

    ``left_out``: why how many records are not there. ``not_reached``: by job, what of the base its adapter leaves as it
    is though one may expect otherwise. ``windows``: with ``documents: joined`` what the model is given
    instead of the records.
    """

    names: tuple[str, ...]
    items: list[Item]
    facts: Facts
    packings: list[Packing] = field(default_factory=list)
    windows: list[Item] = field(default_factory=list)
    left_out: Counter[str] = field(default_factory=Counter)
    not_reached: dict[str, LeftOut] = field(default_factory=dict)

    @property
    def renderer(self) -> Renderer:
        """What rendered it."""
        return self.facts.renderer


@dataclass(frozen=True)
class _Outline:
    """What of a base decides how text is rendered for it, and ``sketch``: it without weights, if it is there."""

    tokenizer: Any
    max_length: int | None
    task: Literal["causal_lm", "seq2seq"]
    bidirectional: bool
    sketch: Base | None = None

    def adapter(self, job: JobConfig, classes: ClassificationTask | None) -> tuple[int, LeftOut | None]:
        """How many learned tokens the job's adapter puts into every sequence (0 if there is but a tokenizer), and what
        of the base it does not reach."""
        if self.sketch is None:
            return 0, None
        adapters = Adapters(self.sketch.model, self.sketch.architecture)
        try:
            method = job.method_config()
            made = adapters.add(job.name, method, tokenizer=self.tokenizer, classification=classes, blank=True)
            return made.num_virtual_tokens, reach.left_out(made, self.sketch.model, self.sketch.architecture)
        finally:
            adapters.close()


def examine(config: RunConfig) -> list[Examined]:
    """Read and render what the jobs train and evaluate on; jobs with the same data come together.

    Raises:
        UserError: the model's folder, a file or a setting cannot be used. A record that cannot is an Item that says so.
    """
    places, outline = data_files(config), _outline(config)
    renderer = config.renderer(outline.tokenizer, outline.max_length)
    unlimited = config.unlimited().renderer(outline.tokenizer)
    groups: dict[Any, list[JobConfig]] = {}
    for job in config.jobs:
        columns = (job.labels, job.text_columns, job.label_column) if job.task == "sequence_classification" else None
        key = (repr(job.data or config.data), repr(job.eval_data or config.eval_data), job.task, repr(columns))
        groups.setdefault(key, []).append(job)
    reader = _Reader(config, outline, places, renderer, unlimited)
    return [reader.group(jobs) for jobs in groups.values()]


def _outline(config: RunConfig) -> _Outline:
    """From config.json and the tokenizer; a folder with a tokenizer alone will do."""
    folder = Path(config.model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file():
        seq2seq = any(job.task == "seq2seq" for job in config.jobs)
        return _Outline(load_tokenizer(str(folder)), None, "seq2seq" if seq2seq else "causal_lm", False)
    base = config.sketch()
    known = base.architecture
    return _Outline(base.tokenizer, known.max_length, known.task, known.bidirectional, base)


class _Reader:
    def __init__(
        self, config: RunConfig, outline: _Outline, places: dict[str, Place], renderer: Renderer, unlimited: Renderer
    ) -> None:
        self.config, self.outline, self.places = config, outline, places
        self.renderer, self.unlimited = renderer, unlimited
        self.not_reached: dict[str, LeftOut] = {}

    def group(self, jobs: list[JobConfig]) -> Examined:
        config, job = self.config, jobs[0]
        held = job.eval_data or config.eval_data
        sources, left_out, classes = self._read(job.data or config.data, job, "train", None)
        evaluated: list[Item] = []
        # A source of which nothing is left ends the training, whatever is to become of bad records.
        whole = _something_of_each(sources)
        if held is not None:
            check_evaluated(parse_sources(held))
            more, skipped, _ = self._read(held, job, "eval", classes)
            evaluated, left_out = [item for source in more for item in source], left_out + skipped
            whole = whole and _something_of_each(more)
        else:
            sources, evaluated = self._hold_out(sources)
        items = [*(item for source in sources for item in source), *evaluated]
        own = self.outline.tokenizer.chat_template if config.chat_template else None
        task = "seq2seq" if self.outline.task == "seq2seq" else "causal_lm"
        skips = config.on_bad_record != "error" and whole
        facts = Facts(self.renderer, task, own or None, self.renderer.max_length, skips_bad_records=skips)
        trained = [[sample for item in source for sample in item.samples] for source in sources]
        windows: list[Item] = []
        if job.task != "sequence_classification" and config.documents == "joined":
            trained = [list(self.renderer.join(samples)) for samples in trained]
            windows = [Item("train", s.source, samples=(s,), length=len(s.input_ids)) for t in trained for s in t]
        packings = self._packings(jobs, trained, classes) if whole or all(trained) else []
        names = tuple(job.name for job in jobs)
        missed = {name: self.not_reached[name] for name in names if name in self.not_reached}
        return Examined(names, items, facts, packings, windows, left_out, missed)

    def _hold_out(self, sources: list[list[Item]]) -> tuple[list[list[Item]], list[Item]]:
        """What training trains on, by source, and what it evaluates on.

        A text in several windows may be on both sides, and is two Items then.
        """
        items = [item for source in sources for item in source]
        pairs = [(item, sample) for item in items for sample in item.samples]
        try:
            if self.config.eval_split is not None:
                held = held_by_hash((_key(item) for item, _ in pairs), self.config.eval_split)
            else:
                held = held_by_chance(len(pairs), self.config.eval_size, seed=0)
        except UserError:
            if self.config.on_bad_record != "error" or not any(item.problem for item in items):
                raise
            return sources, []  # training would end at these records first
        out = {id(sample) for (_, sample), one in zip(pairs, held, strict=True) if one}
        evaluated = []
        train: list[list[Item]] = []
        for source in sources:
            train.append([])
            for item in source:
                mine = tuple(sample for sample in item.samples if id(sample) in out)
                rest = tuple(sample for sample in item.samples if id(sample) not in out)
                if mine and rest:  # the texts of the record are looked at once
                    train[-1].append(replace(item, samples=rest, length=_tokens(rest)))
                    evaluated.append(Item("eval", item.source, samples=mine, length=_tokens(mine), torn=True))
                elif mine:
                    evaluated.append(replace(item, split="eval"))
                else:
                    train[-1].append(item)
        return train, evaluated

    def _packings(
        self, jobs: list[JobConfig], sources: list[list[Sample]], classes: ClassificationTask | None
    ) -> list[Packing]:
        """How the jobs pack the samples of these sources; those that do it alike come together."""
        samples = [sample for source in sources for sample in source]
        weights = tuple(
            source.weight for source in parse_sources(jobs[0].data or self.config.data) if source.weight is not None
        )
        if not samples:
            return []  # training would end at what is wrong with the records
        mixture = Mixture(tuple(map(len, sources)), weights or None)
        alike: dict[Any, list[JobConfig]] = {}
        for job in jobs:
            keys = (job.batch_size, job.gradient_accumulation_steps, job.batch_tokens, job.pack_tokens, job.seed)
            virtual, missed = self.outline.adapter(job, classes)
            if missed is not None:
                self.not_reached[job.name] = missed
            alike.setdefault((*keys, virtual), []).append(job)
        return [
            Packing(
                tuple(job.name for job in same),
                samples,
                Batches(same[0], samples, virtual=key[-1], mixture=mixture),
            )
            for key, same in alike.items()
        ]

    def _read(
        self, data: Any, job: JobConfig, split: Split, classes: ClassificationTask | None
    ) -> tuple[list[list[Item]], Counter[str], ClassificationTask | None]:
        """The records of each source, how many were left out, the classes."""
        items: list[list[Item]] = []
        left_out = Counter[str]()
        for source in parse_sources(data):
            found, skipped, classes = self._source(source, job, split, classes)
            if not found:  # here training ends as well
                told = ", ".join(f"{count:,} {why}" for why, count in skipped.items())
                raise UserError(f"{source.path}: no record is left: {told}.")
            items.append(found)
            left_out += skipped
        return items, left_out, classes

    def _source(
        self, source: Source, job: JobConfig, split: Split, classes: ClassificationTask | None
    ) -> tuple[list[Item], Counter[str], ClassificationTask | None]:
        path, config = self.places[source.path], self.config
        if job.task != "sequence_classification":
            items, skipped = read_items(
                path,
                self.renderer,
                config.of(source),
                unlimited=self.unlimited,
                split=split,
                task=self.outline.task,
            )
            return items, skipped, None
        labels = classes.labels if classes is not None else tuple(job.labels) if job.labels else None
        items, dropped, names = read_labelled_items(
            path,
            self.renderer,
            split=split,
            labels=labels,
            text_columns=job.text_columns,
            label_column=job.label_column,
            limit=config.of(source).limit,
            encoder=self.outline.bidirectional,
        )
        return (
            items,
            Counter({TOO_LONG: dropped} if dropped else {}),
            ClassificationTask(names) if len(names) > 1 else None,
        )


def _something_of_each(sources: Sequence[Sequence[Item]]) -> bool:
    return all(any(item.samples for item in source) for source in sources)


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.input_ids) for sample in samples)


def _key(item: Item) -> str:
    """What training splits by: a hash of what a record says, or of a labelled text's tokens."""
    return content_key(item.example) if item.example is not None else token_key(item.samples[0])
