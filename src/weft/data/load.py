"""From data files to samples, and from samples to a training and a held-out part."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Literal, TypeVar, get_args

from weft.data.formats import EmptyAnswerError, to_example
from weft.data.problems import OnBadRecord, Problem, Problems, about_record
from weft.data.records import iter_items
from weft.data.render import Renderer, Sample, Task
from weft.data.rows import Record
from weft.data.sources import content_key
from weft.data.workers import in_order
from weft.errors import UserError, nearest

T = TypeVar("T")
EmptyAnswers = Literal["error", "skip"]
logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Recipe:
    """What becomes of every record: settings of ``load_samples`` that do not change from one to the next.

    ``keyed``: also hash what each record says (``content_key``).
    """

    renderer: Renderer
    format: str | None = None
    columns: Mapping[str, str] | None = None
    task: Task = "causal_lm"
    keyed: bool = False

    def make(self, item: Record | Problem) -> tuple[Sample, str] | Problem:
        """A sample and its key, or what is wrong with the record. Raises UserError for settings that are wrong."""
        if isinstance(item, Problem):
            return item
        kind = "format"
        try:
            example = to_example(item, format=self.format, columns=self.columns)
            kind = "render"
            sample = self.renderer.seq2seq(example) if self.task == "seq2seq" else self.renderer.sample(example)
        except UserError as error:
            kind = "empty_answer" if isinstance(error, EmptyAnswerError) else kind
            problem = about_record(error, item.source, kind)
            if problem is None:
                raise
            return problem
        return sample, content_key(example) if self.keyed else ""


def load_samples(
    path: str | os.PathLike[str],
    renderer: Renderer,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    empty_answers: EmptyAnswers = "error",
    task: Task = "causal_lm",
    on_bad_record: OnBadRecord = "error",
    bad_records_file: str | os.PathLike[str] | None = None,
    data_workers: int = 0,
) -> list[Sample]:
    """Read the first ``limit`` records of a path (see ``iter_records``, ``to_example``) and render each, in order.

    ``task`` chooses ``renderer.sample`` or ``renderer.seq2seq``; for classes see ``load_labelled``.
    ``empty_answers="skip"`` leaves records with an empty answer out, and logs how many and the first's place.
    ``on_bad_record`` says what becomes of other records that cannot be used (see ``Problems``); with ``report`` all of
    them are written to ``bad_records_file``. ``data_workers`` processes render; the samples are the same.
    Raises UserError that lists up to 20 records that cannot be used, each at its file and line.
    """
    problems = Problems(on_bad_record, errors={"empty_answer": EmptyAnswerError})
    if bad_records_file is not None and on_bad_record != "report":
        raise UserError("bad_records_file is for on_bad_record: report; nothing else writes it.")
    recipe = Recipe(renderer, format, columns, task)
    found = [
        sample
        for sample, _ in iter_samples(
            path, recipe, limit=limit, empty_answers=empty_answers, problems=problems, data_workers=data_workers
        )
    ]
    problems.check(str(path))
    if bad_records_file is not None:
        problems.write(bad_records_file)
    return found


def iter_samples(
    path: str | os.PathLike[str],
    recipe: Recipe,
    *,
    problems: Problems,
    limit: int | None = None,
    empty_answers: EmptyAnswers = "error",
    data_workers: int = 0,
) -> Iterator[tuple[Sample, str]]:
    """The samples of a path one by one, each with its key; problems go to ``problems``, which the caller checks.

    Raises UserError where no sample is left, and whatever ``problems`` raises.
    """
    if empty_answers not in get_args(EmptyAnswers):
        raise UserError(f"empty_answers is {empty_answers!r}; expected 'error' or 'skip'.")
    if recipe.task not in get_args(Task):
        raise UserError(
            f"task is {recipe.task!r}; expected {' or '.join(get_args(Task))}."
            f"{nearest(str(recipe.task), get_args(Task))}"
        )
    count, empty, first = 0, 0, ""
    for made in in_order(iter_items(path, limit=limit), recipe, data_workers):
        if not isinstance(made, Problem):
            count += 1
            yield made
        elif made.kind == "empty_answer" and empty_answers == "skip":
            empty, first = empty + 1, first or made.place
        else:
            problems.add(made)
    if empty:
        logger.warning("%s: left out %d records with an empty answer (the first: %s)", path, empty, first)
    if not count:
        if problems.count:
            raise problems.error()
        raise UserError(f"{path}: every record has an empty answer, so there is nothing to learn.")


def split_holdout(samples: Sequence[T], n_eval: int, seed: int) -> tuple[list[T], list[T]]:
    """Choose ``n_eval`` samples at random (the same ones for the same seed and count): ``(train, eval)``.

    Both parts keep the order of ``samples``. Raises UserError when nothing would be left to train on.
    """
    if not 0 <= n_eval < max(len(samples), 1):
        raise UserError(f"cannot hold out {n_eval} of {len(samples)} samples: expected 0 or more, and fewer than all.")
    order = list(range(len(samples)))
    random.Random(seed).shuffle(order)
    held = set(order[:n_eval])
    train = [sample for index, sample in enumerate(samples) if index not in held]
    return train, [samples[index] for index in sorted(held)]
