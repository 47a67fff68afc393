"""A configuration's data as training would read and render it, with neither weights nor adapters: for previews."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from weft.core.heads import ClassificationTask
from weft.data import Renderer, Source, parse_sources, split_by_hash, split_holdout
from weft.data.auditing.base import Facts, Item, Split
from weft.data.auditing.items import read_items, read_labelled_items
from weft.data.reading.files import Place
from weft.data.sources import content_key
from weft.models.load import load_tokenizer, sketch_base
from weft.train.reader import data_files
from weft.train.run import make_renderer
from weft.train.settings import JobConfig, RunConfig


@dataclass(frozen=True)
class Examined:
    """The data that some of the jobs (``names``) share. ``left_out``: records with an empty answer that are skipped."""

    names: tuple[str, ...]
    items: list[Item]
    facts: Facts
    batch_size: int
    left_out: int = 0

    @property
    def renderer(self) -> Renderer:
        """What rendered it."""
        return self.facts.renderer


@dataclass(frozen=True)
class _Outline:
    """What of a base decides how text is rendered for it."""

    tokenizer: Any
    max_length: int | None
    task: Literal["causal_lm", "seq2seq"]
    bidirectional: bool


def examine(config: RunConfig) -> list[Examined]:
    """Read and render what the jobs train and evaluate on; jobs with the same data come together.

    Raises:
        UserError: the model's folder, a file or a setting cannot be used. A record that cannot is an Item that says so.
    """
    places, outline = data_files(config), _outline(config)
    renderer = make_renderer(config, outline.tokenizer, outline.max_length)
    unlimited = make_renderer(config.model_copy(update={"max_length": None}), outline.tokenizer, None)
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
    base = sketch_base(config.model, dtype=config.dtype, shape=config.shape, hub=config.hub)
    return _Outline(
        base.tokenizer, base.architecture.max_length, base.architecture.task, base.architecture.bidirectional
    )


class _Reader:
    def __init__(
        self, config: RunConfig, outline: _Outline, places: dict[str, Place], renderer: Renderer, unlimited: Renderer
    ) -> None:
        self.config, self.outline, self.places = config, outline, places
        self.renderer, self.unlimited = renderer, unlimited

    def group(self, jobs: list[JobConfig]) -> Examined:
        config, job = self.config, jobs[0]
        held = job.eval_data or config.eval_data
        items, left_out, classes = self._read(job.data or config.data, job, "train", None)
        if held is not None:
            more, skipped, _ = self._read(held, job, "eval", classes)
            items, left_out = items + more, left_out + skipped
        else:
            train, rest = self._split(items)
            for item in rest:
                item.split = "eval"
            items = train + rest
        own = self.outline.tokenizer.chat_template if config.chat_template else None
        task = "seq2seq" if self.outline.task == "seq2seq" else "causal_lm"
        facts = Facts(self.renderer, task, own or None, self.renderer.max_length)
        return Examined(tuple(job.name for job in jobs), items, facts, job.batch_size, left_out)

    def _split(self, items: list[Item]) -> tuple[list[Item], list[Item]]:
        config = self.config
        if config.eval_split is not None:
            return split_by_hash(items, [content_key(item.example or item.text) for item in items], config.eval_split)
        return split_holdout(items, config.eval_size if config.eval_size < len(items) else 0, seed=0)

    def _read(
        self, data: Any, job: JobConfig, split: Split, classes: ClassificationTask | None
    ) -> tuple[list[Item], int, ClassificationTask | None]:
        items: list[Item] = []
        left_out = 0
        for source in parse_sources(data):
            found, skipped, classes = self._source(source, job, split, classes)
            items, left_out = items + found, left_out + skipped
        return items, left_out, classes

    def _source(
        self, source: Source, job: JobConfig, split: Split, classes: ClassificationTask | None
    ) -> tuple[list[Item], int, ClassificationTask | None]:
        path, config = self.places[source.path], self.config
        if job.task != "sequence_classification":
            items, skipped = read_items(
                path,
                self.renderer,
                unlimited=self.unlimited,
                split=split,
                format=source.format or config.data_format,
                columns=source.columns or config.columns,
                limit=source.limit or config.limit,
                empty_answers=config.empty_answers,
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
            limit=source.limit or config.limit,
            encoder=self.outline.bidirectional,
        )
        return items, dropped, ClassificationTask(names) if len(names) > 1 else None
