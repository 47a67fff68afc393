"""Negative log-likelihood of what is learned: instruction tuning, continued pre-training and classification alike."""

from __future__ import annotations

from torch import Tensor

from weft.core.head import Supervised


def likelihood(losses: Tensor, batch: Supervised) -> Tensor:
    """Weighted sum of the losses [S] of each sequence's targets, [num_sequences], in their dtype.

    It is never a mean: only the step knows how many tokens a job's whole batch has, and it divides once.
    """
    return batch.per_sequence(losses)
