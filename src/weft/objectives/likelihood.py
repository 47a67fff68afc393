"""Negative log-likelihood of what is learned: instruction tuning, continued pre-training and classification alike."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.core.head import Supervised


def likelihood(losses: Tensor, batch: Supervised) -> Tensor:
    """Weighted sum of the losses [S] of each sequence's targets, [num_sequences], in their dtype.

    Never a mean: how many tokens a job's whole batch has is known to the step, which divides once.
    """
    weighted = losses * batch.weights.to(losses.dtype)
    return torch.zeros(batch.num_sequences, dtype=losses.dtype, device=losses.device).index_add(
        0, batch.sequence, weighted
    )
