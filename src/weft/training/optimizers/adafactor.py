"""Adafactor (Shazeer & Stern 2018): of a matrix's second moment only rows and columns are kept. transformers' own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from weft.training.optimizers.kind import Groups, OptimizerKind, Settings


class Adafactor(OptimizerKind):
    """With the rate of the schedule, as transformers' Trainer has it: no steps of its own making."""

    name = "adafactor"
    about = "rows and columns of the second moment; options `clip_threshold` (1), `decay_rate` (-0.8), `beta1` (none)"
    clip_threshold: float = 1.0
    decay_rate: float = -0.8
    beta1: float | None = None

    def make(self, config: Settings, groups: Groups) -> torch.optim.Optimizer:
        """transformers' Adafactor with ``scale_parameter`` and ``relative_step`` off."""
        from transformers.optimization import Adafactor as Theirs

        return Theirs(
            list(groups),
            lr=groups[0]["lr"],
            clip_threshold=self.clip_threshold,
            decay_rate=self.decay_rate,
            beta1=self.beta1,
            scale_parameter=False,
            relative_step=False,
        )

    def state_bytes(self, config: Settings, parameters: Iterable[Tensor]) -> int:
        """Rows and columns, or the whole second moment of what is no matrix; a first moment with ``beta1``."""
        sizes = [
            (p.numel() // p.shape[-1] + p.numel() // p.shape[-2] if p.dim() >= 2 else p.numel(), p) for p in parameters
        ]
        return sum((size + p.numel() * (self.beta1 is not None)) * p.element_size() for size, p in sizes)
