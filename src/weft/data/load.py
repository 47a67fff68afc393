"""From data files to samples, and from samples to a training and a held-out part."""

from __future__ import annotations

import logging
import os
import random
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeVar, get_args

from weft.data.formats.detect import EmptyAnswerError, to_example
from weft.data.formats.examples import SFT
from weft.data.problems import OnBadRecord, Problem, Problems, about_record
from weft.data.reading.records import iter_items
from weft.data.reading.rows import Record
from weft.data.rendering.render import Outcome, Renderer, Task
from weft.data.rendering.sample import Sample
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

    def make(self, items: Sequence[Record | Problem]) -> list[Made | Problem]:
        """Of each record what it became, or what is wrong with it. Raises UserError for settings that are wrong."""
        found: list[Made | Problem | None] = []
        examples: list[SFT] = []
        for item in items:
            example = item if isinstance(item, Problem) else self._example(item)
            found.append(example if isinstance(example, Problem) else None)
            if not isinstance(example, Problem):
                examples.append(example)
        rendered = zip(examples, self.renderer.outcomes(examples, self.task), strict=True)
        return [self._made(*next(rendered)) if one is None else one for one in found]

    def _example(self, record: Record) -> SFT | Problem:
        try:
            return to_example(record, format=self.format, columns=self.columns)
        except UserError as error:
            return _problem(error, record.source, "empty_answer" if isinstance(error, EmptyAnswerError) else "format")

    def _made(self, example: SFT, outcome: Outcome) -> Made | Problem:
        if isinstance(outcome, UserError):
            return _problem(outcome, example.source, "render")
        return Made(outcome, content_key(example) if self.keyed else "")


@dataclass(frozen=True)
class Made:
    """The samples of one record (a long text may become several, one that is dropped none), and its key."""

    samples: tuple[Sample, ...]
    key: str


def _problem(error: UserError, source: str, kind: str) -> Problem:
    problem = about_record(error, source, kind)
    if problem is None:
        raise error
    return problem


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

    Raises:
        UserError: Records cannot be used; the message lists up to 20, each at its file and line.
    """
    problems = Problems(on_bad_record, errors={"empty_answer": EmptyAnswerError})
    if bad_records_file is not None and on_bad_record != "report":
        raise UserError("bad_records_file is for on_bad_record: report; nothing else writes it.")
    recipe = Recipe(renderer, format, columns, task)
    found = [
        sample
        for made in iter_samples(
            path, recipe, limit=limit, empty_answers=empty_answers, problems=problems, data_workers=data_workers
        )
        for sample in made.samples
    ]
    problems.check(str(path))
    if bad_records_file is not None:
        problems.write(bad_records_file)
    return list(renderer.join(found))


def iter_samples(
    path: str | os.PathLike[str],
    recipe: Recipe,
    *,
    problems: Problems,
    limit: int | None = None,
    empty_answers: EmptyAnswers = "error",
    data_workers: int = 0,
) -> Iterator[Made]:
    """The outcome of each record of a path; problems go to ``problems``, which the caller checks.

    Records left out and samples cut are counted in the log.

    Raises:
        UserError: No sample is left, a setting is unknown, or ``problems`` raises.
    """
    if empty_answers not in get_args(EmptyAnswers):
        raise UserError(f"empty_answers is {empty_answers!r}; expected 'error' or 'skip'.")
    if recipe.task not in get_args(Task):
        raise UserError(
            f"task is {recipe.task!r}; expected {' or '.join(get_args(Task))}."
            f"{nearest(str(recipe.task), get_args(Task))}"
        )
    tally, first = Counter[str](), ""
    for made in in_order(iter_items(path, limit=limit), recipe, data_workers, _characters):
        if not isinstance(made, Problem):
            tally["read"] += 1
            tally["dropped"] += not made.samples
            tally["cut"] += any(sample.cut for sample in made.samples)
            yield made
        elif made.kind == "empty_answer" and empty_answers == "skip":
            tally["empty"], first = tally["empty"] + 1, first or made.place
        else:
            problems.add(made)
    _tell(path, tally, first, recipe.renderer)
    if tally["read"] == tally["dropped"]:
        if problems.count:
            raise problems.error()
        reason = f"longer than max_length {recipe.renderer.max_length}" if tally["dropped"] else "without an answer"
        raise UserError(f"{path}: every record is {reason}, so there is nothing to learn.")


def _characters(value: Any) -> int:
    """How much text there is in a record, or a field of it, roughly."""
    if isinstance(value, Record):
        return sum(map(_characters, value.fields.values()))
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(map(_characters, value.values()))
    if isinstance(value, list):
        return 4 * len(value) if value and isinstance(value[0], int) else sum(map(_characters, value))
    return 0


def _tell(path: str | os.PathLike[str], tally: Counter[str], first: str, renderer: Renderer) -> None:
    if tally["empty"]:
        logger.warning("%s: left out %d records with an empty answer (the first: %s)", path, tally["empty"], first)
    if tally["dropped"]:
        told = (path, tally["dropped"], tally["read"], renderer.max_length)
        logger.warning("%s: left out %d of %d records: longer than max_length %s", *told)
    if tally["cut"]:
        told = (path, tally["cut"], tally["read"], renderer.max_length)
        logger.warning("%s: %d of %d records cut to max_length %s (%s)", *told, renderer.truncation)


def split_holdout(samples: Sequence[T], n_eval: int, seed: int) -> tuple[list[T], list[T]]:
    """Choose ``n_eval`` samples at random (the same ones for the same seed and count): ``(train, eval)``.

    Both parts keep the order of ``samples``. Raises UserError when nothing would be left to train on.
    """
    held = held_by_chance(len(samples), n_eval, seed)
    train = [sample for sample, out in zip(samples, held, strict=True) if not out]
    return train, [sample for sample, out in zip(samples, held, strict=True) if out]


def held_by_chance(count: int, n_eval: int, seed: int) -> bytearray:
    """Which of ``count`` samples ``split_holdout`` holds out: 1 for each that it does.

    Raises:
        UserError: ``split_holdout`` refuses the numbers.
    """
    if not 0 <= n_eval < max(count, 1):
        raise UserError(f"cannot hold out {n_eval} of {count} samples: expected 0 or more, and fewer than all.")
    held = bytearray(count)
    if n_eval:
        order = array("q", range(count))  # a list would take five times the memory
        random.Random(seed).shuffle(order)
        for index in order[:n_eval]:
            held[index] = 1
    return held
