"""Negative log-likelihood of the supervised tokens: the objective of instruction tuning and of pre-training."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from weft.ops.loss import linear_cross_entropy


@dataclass(frozen=True)
class Head:
    """The base's output layer, frozen: logits are ``scale * (h Wᵀ + b)``, soft-capped if the architecture does so.

    Attributes:
        weight: [V, d].
        bias: [V].
    """

    weight: Tensor
    bias: Tensor | None = None
    softcap: float | None = None
    scale: float = 1.0


@dataclass(frozen=True)
class Supervised:
    """The tokens that are learned, of some sequences.

    Attributes:
        rows: [S] int64, the stream row whose hidden state predicts the token.
        targets: [S] int64.
        weights: [S] float, the factor of each token's loss.
        sequence: [S] int64, which of the ``num_sequences`` sequences it belongs to.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor
    sequence: Tensor
    num_sequences: int

    def per_sequence(self, losses: Tensor) -> Tensor:
        """The weighted sum [num_sequences] of the losses [S] of each sequence's tokens."""
        weighted = losses * self.weights.to(losses.dtype)
        return torch.zeros(self.num_sequences, dtype=losses.dtype, device=losses.device).index_add(
            0, self.sequence, weighted
        )


def likelihood(hidden: Tensor, head: Head, batch: Supervised) -> Tensor:
    """Weighted sum of the token losses of each sequence, [num_sequences] (float32, or float64 for float64 input).

    Args:
        hidden: [S, d], the hidden states at ``batch.rows``. The head sees no token from which nothing is learned.

    It is never a mean: only the step knows how many tokens a job's whole batch has, and it divides once.
    """
    losses = linear_cross_entropy(
        hidden, head.weight, batch.targets, bias=head.bias, softcap=head.softcap, logit_scale=head.scale
    )
    return batch.per_sequence(losses)


def likelihood_of_logits(logits: Tensor, batch: Supervised) -> Tensor:
    """``likelihood`` from logits [S, V], for an adapter that changes the head and so shares it with nobody."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return batch.per_sequence(F.cross_entropy(wide, batch.targets, reduction="none"))
