"""From a data file to samples, and from samples to a training and a held-out part."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Iterator, Mapping, Sequence
from typing import Literal, TypeVar, get_args

from weft.data.formats import EmptyAnswerError, to_example
from weft.data.records import read_records
from weft.data.render import Example, Renderer, Task
from weft.data.sample import Sample
from weft.errors import UserError, nearest

T = TypeVar("T")
logger = logging.getLogger(__name__)


def load_samples(
    path: str | os.PathLike[str],
    renderer: Renderer,
    *,
    format: str | None = None,
    columns: Mapping[str, str] | None = None,
    limit: int | None = None,
    empty_answers: Literal["error", "skip"] = "error",
    task: Task = "causal_lm",
) -> list[Sample]:
    """Read the first ``limit`` records of a file (see ``read_records``, ``to_example``) and render each, in order.

    ``task`` chooses ``renderer.sample`` or ``renderer.seq2seq``; for classes see ``load_labelled``.
    ``empty_answers="skip"`` leaves records with an empty answer out, and logs how many and the first's place.
    Raises UserError, naming file and line, for the first record that cannot be used.
    """
    if empty_answers not in ("error", "skip"):
        raise UserError(f"empty_answers is {empty_answers!r}; expected 'error' or 'skip'.")
    if task not in get_args(Task):
        raise UserError(
            f"task is {task!r}; expected {' or '.join(get_args(Task))}.{nearest(str(task), get_args(Task))}"
        )
    skipped: list[str] = []
    dropped = read = 0

    def examples() -> Iterator[Example]:
        for record in read_records(path, limit=limit):
            try:
                example = to_example(record, format=format, columns=columns)
            except EmptyAnswerError:
                if empty_answers == "error":
                    raise
                skipped.append(record.source)
                continue
            yield example

    samples: list[Sample] = []
    for outcome in renderer.outcomes(examples(), task):
        if isinstance(outcome, UserError):
            raise outcome
        read, dropped = read + 1, dropped + (not outcome)
        samples += outcome
    if skipped:
        logger.warning("%s: left out %d records with an empty answer (the first: %s)", path, len(skipped), skipped[0])
    if dropped:
        logger.warning(
            "%s: left out %d of %d records: longer than max_length %s", path, dropped, read, renderer.max_length
        )
    cut = sum(sample.cut > 0 for sample in samples)
    if cut:
        logger.warning(
            "%s: %d of %d records cut to max_length %s (%s)", path, cut, read, renderer.max_length, renderer.truncation
        )
    if not samples:
        reason = f"longer than max_length {renderer.max_length}" if dropped else "without an answer"
        raise UserError(f"{path}: every record is {reason}, so there is nothing to learn.")
    return list(renderer.join(samples))


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
