"""The data of a configuration as training would read and render it, without weights: for previews."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import KW_ONLY, dataclass, replace
from itertools import compress
from pathlib import Path
from typing import Any, Literal

import numpy as np

from weft.adapters import Adapters
from weft.data import Renderer
from weft.data.auditing.base import Facts, Finding, Item
from weft.data.auditing.items import collect, tokens_in
from weft.data.pipeline import Acceptance, Outcome
from weft.data.views import Array
from weft.errors import UserError
from weft.models import Base, reach
from weft.models.load import load_tokenizer
from weft.models.reach import Omission
from weft.models.tasks import check_job
from weft.models.token_rows import add_tokens
from weft.preview.packing import Packing
from weft.training.batches import Batches
from weft.training.reader import JobData, JobSources, Reader, SourceSamples, data_files, nothing_left
from weft.training.run import blank_adapter
from weft.training.settings import JobConfig, RunConfig


@dataclass(frozen=True)
class DataSet:
    """The data that some of the jobs (``names``) share, and how they pack it.

    ``windows``: with ``documents: joined``, what the model is given instead of the records. ``left_out`` counts the
    records that are missing, by reason. ``not_reached``: by job, what its adapter leaves unchanged in the base,
    though one may expect otherwise. ``notes``: by job, what its method has decided for this base. ``read``: what became
    of each record of ``data``, in order.
    """

    names: tuple[str, ...]
    items: list[Item]
    facts: Facts
    _: KW_ONLY
    packings: list[Packing]
    windows: list[Item]
    left_out: Counter[str]
    not_reached: dict[str, Omission]
    notes: dict[str, str]
    read: list[Outcome]

    @property
    def renderer(self) -> Renderer:
        """The renderer of its samples."""
        return self.facts.renderer

    def clean(self, findings: Iterable[Finding]) -> list[Mapping[str, Any]]:
        """The fields of the training records that became samples and have no error among these findings."""
        wrong = {finding.number for finding in findings if finding.severity == "error"}
        good = [one for number, one in enumerate(self.read, start=1) if number not in wrong]
        return [one.fields for one in good if isinstance(one, Acceptance) and one.fields]


@dataclass(frozen=True)
class _Outline:
    """What decides how text is rendered for a base. ``sketch`` is the base without weights, if its folder has one."""

    tokenizer: Any
    max_length: int | None
    task: Literal["causal_lm", "seq2seq"]
    _: KW_ONLY
    bidirectional: bool
    sketch: Base | None = None

    def adapter(self, job: JobConfig, data: JobData) -> tuple[int, Omission | None, str]:
        """The number of virtual tokens of the job's adapter (0 without a sketch), what it does not reach, its note.

        Raises:
            UserError: Training would refuse the adapter.
        """
        if self.sketch is None:
            return 0, None, ""
        model, architecture = self.sketch.model, self.sketch.architecture
        with closing(Adapters(model, architecture)) as adapters:
            adapter = blank_adapter(adapters, job, data, self.sketch)
            return adapter.num_virtual_tokens, reach.left_out(adapter, model, architecture), adapter.note


def examine(config: RunConfig) -> list[DataSet]:
    """Read and render what the jobs train and evaluate on. Jobs with the same data share a ``DataSet``.

    Raises:
        UserError: The model's folder, a file or a setting cannot be used. (A bad record is an Item with a problem.)
    """
    places, outline = data_files(config), _outline(config)
    renderer = config.renderer(outline.tokenizer, outline.max_length)
    unlimited = config.unlimited().renderer(outline.tokenizer)
    groups: dict[Any, list[JobConfig]] = {}
    for job in config.jobs:
        columns = (job.labels, job.text_columns, job.label_column) if job.classifies else None
        files = repr(job.data or config.data), repr(job.eval_data or config.eval_data)
        key = (*files, job.task, repr(columns), _judgement(job))
        groups.setdefault(key, []).append(job)
    rows = None if outline.sketch is None else outline.sketch.token_rows
    reader = Reader(config, renderer, outline, places, token_rows=rows, watched=True)
    return [_Group(config, outline, reader, unlimited, jobs).data_set() for jobs in groups.values()]


def _judgement(job: JobConfig) -> str:
    """The kind of judged answers that the job learns from; "": none."""
    return "" if (judged := job.judged) is None else judged.judgement


def _outline(config: RunConfig) -> _Outline:
    """The outline from config.json and the tokenizer. A folder with a tokenizer alone is enough."""
    folder = Path(config.model)
    if folder.is_dir() and not (folder / "config.json").is_file() and (folder / "tokenizer.json").is_file():
        seq2seq = any(job.task == "seq2seq" for job in config.jobs)
        tokenizer = load_tokenizer(str(folder))
        add_tokens(tokenizer, config.add_tokens)
        return _Outline(tokenizer, None, "seq2seq" if seq2seq else "causal_lm", bidirectional=False)
    base = config.sketch()
    known = base.architecture
    for job in config.jobs:
        check_job(job.name, job.task, config.model, known)
    return _Outline(base.tokenizer, known.max_length, known.task, bidirectional=known.bidirectional, sketch=base)


class _Group:
    """Jobs with the same data."""

    def __init__(
        self, config: RunConfig, outline: _Outline, reader: Reader, unlimited: Renderer, jobs: list[JobConfig]
    ) -> None:
        self.config, self.outline, self.reader, self.unlimited, self.jobs = config, outline, reader, unlimited, jobs
        self.left_out, self.not_reached, self.notes = Counter[str](), dict[str, Omission](), dict[str, str]()
        self.count = 0  # of the records that were read

    def data_set(self) -> DataSet:
        config, reader, job = self.config, self.reader, self.jobs[0]
        read = reader.read(job)
        sources = [self._items(part, None) for part in read.sources]
        evaluated = [
            replace(item, eval_set=name)
            for name, part in zip(read.sets, read.evaluated or (), strict=True)
            for item in self._items(part, name)
        ]
        # Training ends at these records before it comes to anything behind them.
        bad = config.on_bad_record == "error" and any(item.problem for part in (*sources, evaluated) for item in part)
        held = self._held_out(read, bad)
        data = reader.data(job, read, held)
        train: list[Item] = []
        for items, marks in zip(sources, held, strict=True):
            train += _parted(items, marks, evaluated)
        # A source without any sample ends the training, whatever `on_bad_record` says.
        whole = all(len(part.samples) for part in (*read.sources, *(read.evaluated or ())))
        own = (self.outline.tokenizer.chat_template or None) if config.chat_template else None
        skips = config.on_bad_record != "error" and whole
        prompts = _judgement(job) == "prompts"
        facts = Facts(
            reader.renderer, self.outline.task, own_template=own, skips_bad_records=skips, prompts=prompts
        )
        windows: list[Item] = []
        if not job.classifies and config.documents == "joined":
            windows = [Item("train", s.source, samples=(s,), length=tokens_in([s])) for s in data.train]
        # Without samples, training would end at the problems of the records.
        packings: list[Packing] = []
        try:
            packings = self._packings(data) if data.train and (whole or all(data.mixture.sizes)) else []
        except UserError:
            if not bad:
                raise
        return DataSet(
            tuple(job.name for job in self.jobs),
            [*train, *evaluated],
            facts,
            packings=packings,
            windows=windows,
            left_out=self.left_out,
            not_reached=self.not_reached,
            read=[one for part in read.sources for one in part.outcomes],
            notes=self.notes,
        )

    def _items(self, part: SourceSamples, name: str | None) -> list[Item]:
        """The records of a source to train on (None), or to evaluate on in the set ``name``."""
        items, left_out = collect(
            part.outcomes,
            self.reader.renderer,
            unlimited=self.unlimited,
            split="train" if name is None else "eval",
            task=self.outline.task,
            classes=part.names,
            first=self.count + 1,
        )
        self.count += len(part.outcomes)
        if not items:  # training ends here as well
            reasons = ", ".join(f"{count:,} {why}" for why, count in left_out.items())
            raise UserError(f"{part.path}: no record is left: {reasons}, so there is {nothing_left(name)}.")
        self.left_out += left_out
        return items

    def _held_out(self, read: JobSources, bad: bool) -> list[Array]:
        try:
            return self.reader.split(read)
        except UserError:
            if not bad:
                raise
            return [np.zeros(len(part.samples), bool) for part in read.sources]

    def _packings(self, data: JobData) -> list[Packing]:
        """The packs of what the jobs train on. Jobs that pack alike share them."""
        alike: dict[Any, list[JobConfig]] = {}
        for job in self.jobs:
            keys = (job.batch_size, job.gradient_accumulation_steps, job.batch_tokens, job.pack_tokens, job.seed)
            virtual, missed, note = self.outline.adapter(job, data)
            if missed is not None:
                self.not_reached[job.name] = missed
            if note:
                self.notes[job.name] = note
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
    """The items to train on. The others, whose samples ``held`` marks, go to ``evaluated``.

    A text in several windows may be on both sides. It becomes two items then.
    """
    at = 0
    for item in items:
        marks, at = held[at : at + len(item.samples)], at + len(item.samples)
        if not marks.any():
            yield item
        elif marks.all():
            evaluated.append(replace(item, split="eval"))
        else:  # the texts of the record are checked once, in the training part
            mine, rest = (tuple(compress(item.samples, side)) for side in (marks, ~marks))
            evaluated.append(
                Item("eval", item.source, samples=mine, length=tokens_in(mine), torn=True, number=item.number)
            )
            yield replace(item, samples=rest, length=tokens_in(rest))
