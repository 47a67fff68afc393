"""Sequence classification: cross-entropy of the class of a whole sequence."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def classification(logits: Tensor, labels: Tensor) -> Tensor:
    """``-log softmax(logits)[label]`` per sequence, [n] (float32, or float64 for float64 input).

    Args:
        logits: [n, classes]; labels: [n] int64.
    """
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return F.cross_entropy(wide, labels, reduction="none")
