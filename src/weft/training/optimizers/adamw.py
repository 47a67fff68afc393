"""AdamW (Loshchilov & Hutter 2019): torch's own."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from weft.training.optimizers.kind import Groups, OptimizerKind, tensor_bytes

if TYPE_CHECKING:
    from weft.training.settings import JobConfig


class AdamW(OptimizerKind):
    """Two numbers for each that is trained."""

    name = "adamw"
    about = "torch's own"

    def make(self, config: JobConfig, groups: Groups) -> torch.optim.Optimizer:
        """torch's fused AdamW."""
        return torch.optim.AdamW(list(groups), betas=config.adam_betas, eps=config.adam_epsilon, fused=True)

    def state_bytes(self, config: JobConfig, parameters: Iterable[Tensor]) -> int:
        """Both moments."""
        return 2 * tensor_bytes(parameters)
