"""AdamW (Loshchilov & Hutter 2019): torch's own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from weft.training.optimizers.kind import Groups, OptimizerKind, Settings, tensor_bytes


class AdamW(OptimizerKind):
    """Two numbers for each that is trained."""

    name = "adamw"
    about = "torch's own"

    def make(self, config: Settings, groups: Groups) -> torch.optim.Optimizer:
        """torch's fused AdamW."""
        return torch.optim.AdamW(list(groups), betas=config.adam_betas, eps=config.adam_epsilon, fused=True)

    def state_bytes(self, config: Settings, parameters: Iterable[Tensor]) -> int:
        """Both moments."""
        return 2 * tensor_bytes(parameters)
