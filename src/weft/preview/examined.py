"""A configuration's data as training would read and render it, with neither weights nor adapters: for previews."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from weft.adapters import Adapters
from weft.data import Renderer, Sample
from weft.data.auditing.base import Facts, Item, Split
from weft.data.auditing.items import collect
from weft.data.views import Array
from weft.errors import UserError
from weft.heads.classification import ClassificationTask
from weft.models import Base, reach
from weft.models.load import load_tokenizer
from weft.models.reach import LeftOut
from weft.preview.packing import Packing
from weft.training.batches import Batches
from weft.training.reader import JobData, Loaded, Read, Reader, data_files
from weft.training.settings import JobConfig, RunConfig


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
    _: KW_ONLY
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
    _: KW_ONLY
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
            made = adapters.add(job.name, method, tokenizer=self.tokenizer, head=classes, blank=True)
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
        columns = (job.labels, job.text_columns, job.label_column) if job.classifies else None
        key = (repr(job.data or config.data), repr(job.eval_data or config.eval_data), job.task, repr(columns))
        groups.setdefault(key, []).append(job)
    reader = Reader(config, renderer, outline, places, watched=True)
    return [_Group(config, outline, reader, unlimited, jobs).examined() for jobs in groups.values()]


def _outline(config: RunConfig) -> _Outline:
    """From config.json and the tokenizer; a folder with a tokenizer alone will do."""
    folder = Path(config.model).expanduser()
    if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file():
        seq2seq = any(job.task == "seq2seq" for job in config.jobs)
        return _Outline(load_tokenizer(str(folder)), None, "seq2seq" if seq2seq else "causal_lm", bidirectional=False)
    base = config.sketch()
    known = base.architecture
    return _Outline(base.tokenizer, known.max_length, known.task, bidirectional=known.bidirectional, sketch=base)


class _Group:
    """Jobs with the same data."""

    def __init__(
        self, config: RunConfig, outline: _Outline, reader: Reader, unlimited: Renderer, jobs: list[JobConfig]
    ) -> None:
        self.config, self.outline, self.reader, self.unlimited, self.jobs = config, outline, reader, unlimited, jobs
        self.left_out, self.not_reached = Counter[str](), dict[str, LeftOut]()

    def examined(self) -> Examined:
        config, reader, job = self.config, self.reader, self.jobs[0]
        read = reader.read(job)
        sources = [self._items(part, "train") for part in read.sources]
        evaluated = [item for part in read.evaluated or () for item in self._items(part, "eval")]
        held = self._held_out(read, sources)
        data = reader.data(job, read, reader.sides(read, held))
        train: list[Item] = []
        for items, marks in zip(sources, held, strict=True):
            train += _parted(items, marks, evaluated)
        # A source of which nothing is left ends the training, whatever is to become of bad records.
        whole = all(len(part.samples) for part in (*read.sources, *(read.evaluated or ())))
        own = self.outline.tokenizer.chat_template if config.chat_template else None
        skips = config.on_bad_record != "error" and whole
        facts = Facts(
            reader.renderer,
            self.outline.task,
            own or None,
            max_length=reader.renderer.max_length,
            skips_bad_records=skips,
        )
        windows: list[Item] = []
        if not job.classifies and config.documents == "joined":
            windows = [Item("train", s.source, samples=(s,), length=len(s.input_ids)) for s in data.train]
        # Where nothing is left, training would end at what is wrong with the records.
        packings = self._packings(data) if data.train and (whole or all(data.mixture.sizes)) else []
        names = tuple(job.name for job in self.jobs)
        items = [*train, *evaluated]
        return Examined(
            names,
            items,
            facts,
            packings=packings,
            windows=windows,
            left_out=self.left_out,
            not_reached=self.not_reached,
        )

    def _items(self, part: Loaded, split: Split) -> list[Item]:
        items, left_out = collect(
            part.outcomes,
            self.reader.renderer,
            unlimited=self.unlimited,
            split=split,
            task=self.outline.task,
            classes=part.names,
        )
        if not items:  # here training ends as well
            told = ", ".join(f"{count:,} {why}" for why, count in left_out.items())
            raise UserError(f"{part.path}: no record is left: {told}.")
        self.left_out += left_out
        return items

    def _held_out(self, read: Read, sources: Sequence[Sequence[Item]]) -> list[Array]:
        try:
            return self.reader.split(read)
        except UserError:
            if self.config.on_bad_record != "error" or not any(item.problem for items in sources for item in items):
                raise
            return [np.zeros(len(part.samples), bool) for part in read.sources]  # training ends at these records first

    def _packings(self, data: JobData) -> list[Packing]:
        """How the jobs pack what they train on; those that do it alike come together."""
        alike: dict[Any, list[JobConfig]] = {}
        for job in self.jobs:
            keys = (job.batch_size, job.gradient_accumulation_steps, job.batch_tokens, job.pack_tokens, job.seed)
            virtual, missed = self.outline.adapter(job, data.classes)
            if missed is not None:
                self.not_reached[job.name] = missed
            alike.setdefault((*keys, virtual), []).append(job)
        return [
            Packing(
                tuple(job.name for job in same),
                data.train,
                Batches(same[0], data.train, virtual=key[-1], mixture=data.mixture),
            )
            for key, same in alike.items()
        ]


def _parted(items: Sequence[Item], held: Array, evaluated: list[Item]) -> Iterator[Item]:
    """Those to train on; the others, of which ``held`` marks the samples, go to ``evaluated``.

    A text in several windows may be on both sides, and is two Items then.
    """
    at = 0
    for item in items:
        marks, at = held[at : at + len(item.samples)], at + len(item.samples)
        if not marks.any():
            yield item
        elif marks.all():
            evaluated.append(replace(item, split="eval"))
        else:  # the texts of the record are looked at once
            mine, rest = (tuple(compress(item.samples, side)) for side in (marks, ~marks))
            evaluated.append(Item("eval", item.source, samples=mine, length=_tokens(mine), torn=True))
            yield replace(item, samples=rest, length=_tokens(rest))


def _tokens(samples: Sequence[Sample]) -> int:
    return sum(len(sample.input_ids) for sample in samples)
