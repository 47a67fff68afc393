"""From data files to samples, and from samples to a training and a held-out part."""

from __future__ import annotations

import os
import random
from array import array
from collections.abc import Mapping, Sequence
from typing import TypeVar

from weft.data.formats.detect import EmptyAnswerError
from weft.data.pipeline import Fold, TextRecipe, outcomes
from weft.data.problems import OnBadRecord, Problems
from weft.data.rendering.render import Renderer, Task
from weft.data.rendering.sample import Sample
from weft.data.settings import EmptyAnswers, ReadSettings
from weft.errors import UserError

T = TypeVar("T")


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
    settings = ReadSettings.model_construct(
        data_format=format, columns=dict(columns) if columns else None, empty_answers=empty_answers
    )
    recipe = TextRecipe(renderer=renderer, settings=settings, task=task)
    fold = Fold(path, recipe, problems)
    found = [sample for sample, _ in fold.samples(outcomes(path, recipe, limit=limit, workers=data_workers))]
    recipe.end(fold)
    problems.check(str(path))
    if bad_records_file is not None:
        problems.write(bad_records_file)
    return list(renderer.join(found))


def split_holdout(samples: Sequence[T], n_eval: int, seed: int) -> tuple[list[T], list[T]]:
    """Choose ``n_eval`` samples at random (the same ones for the same seed and count): ``(train, eval)``.

    Both parts keep the order of ``samples``. Raises UserError when nothing would be left to train on.
    """
    held = held_by_chance(len(samples), n_eval, seed)
    train = [sample for sample, out in zip(samples, held, strict=True) if not out]
    return train, [sample for sample, out in zip(samples, held, strict=True) if out]


def held_by_chance(count: int, n_eval: int, seed: int) -> bytearray:
    """Which of ``count`` samples ``split_holdout`` holds out: 1 for each that it does. Raises UserError as that."""
    if not 0 <= n_eval < max(count, 1):
        raise UserError(f"cannot hold out {n_eval} of {count} samples: expected 0 or more, and fewer than all.")
    held = bytearray(count)
    if n_eval:
        order = array("q", range(count))  # a list would take five times the memory
        random.Random(seed).shuffle(order)
        for index in order[:n_eval]:
            held[index] = 1
    return held
