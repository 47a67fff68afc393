"""From a data file to samples, and from samples to a training and a held-out part."""

from __future__ import annotations

import logging
import os
import random
from collections.abc import Mapping, Sequence
from typing import Literal, TypeVar, get_args

from weft.data.formats import EmptyAnswerError, to_example
from weft.data.records import read_records
from weft.data.render import Renderer, Sample, Task
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
    render = renderer.seq2seq if task == "seq2seq" else renderer.sample
    samples, skipped = [], []
    for record in read_records(path, limit=limit):
        try:
            example = to_example(record, format=format, columns=columns)
        except EmptyAnswerError:
            if empty_answers == "error":
                raise
            skipped.append(record.source)
            continue
        samples.append(render(example))
    if skipped:
        logger.warning("%s: left out %d records with an empty answer (the first: %s)", path, len(skipped), skipped[0])
    if not samples:
        raise UserError(f"{path}: every record has an empty answer, so there is nothing to learn.")
    return samples


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
