"""Predictions of a classification adapter."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.core.adapters import Adapters
from weft.data import Sample
from weft.errors import UserError
from weft.heads.reward import SCORE
from weft.objectives.passes import logits_of, passes


@dataclass(frozen=True)
class Predictions:
    """The index of each text's class, and the probabilities [n, classes] in the order of ``names``."""

    labels: list[int]
    probabilities: Tensor
    names: tuple[str, ...]


def classes_of(adapters: Adapters, name: str) -> tuple[str, ...]:
    """The classes of adapter ``name``.

    Raises:
        UserError: It was not trained to classify.
    """
    labels = adapters[name].head.labels
    if not labels:
        raise UserError(f"adapter '{name}' has no classes: it was not trained with task: sequence_classification.")
    if labels == SCORE:
        raise UserError(
            f"adapter '{name}' scores answers and names no classes. It gives rewards: objective_settings: {{rewards: "
            "[{adapter: FOLDER}]} (docs/preferences.md)."
        )
    return labels


@torch.no_grad()
def predict(adapters: Adapters, name: str, samples: Sequence[Sample], *, max_tokens: int = 4096) -> Predictions:
    """Classify samples with adapter ``name``, in passes of at most ``max_tokens`` tokens.

    Raises:
        UserError: The adapter has no classes, or a sample is longer than the model's positions.
    """
    names, adapter, limit = classes_of(adapters, name), adapters[name], adapters.architecture.max_length
    learned = adapter.num_learned_tokens
    for sample in samples:
        if limit is not None and len(sample.input_ids) + learned > limit:
            raise UserError(
                f"{sample.source}: {len(sample.input_ids)} tokens and the adapter's {learned} exceed the model's "
                f"{limit} positions. Shorten the text."
            )
    logits = [logits_of(adapters, name, batch) for batch in passes(samples, max_tokens)]
    found = torch.cat(logits).softmax(-1) if logits else torch.empty(0, len(names))
    return Predictions(found.argmax(-1).tolist(), found, names)
