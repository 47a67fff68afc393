"""Stochastic gradient descent with momentum, also Nesterov's: torch's own."""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from weft.training.optimizers.kind import Groups, OptimizerKind, Settings, tensor_bytes


class Sgd(OptimizerKind):
    """One number for each that is trained, or none without momentum."""

    name = "sgd"
    about = "torch's own, with `momentum`; option `nesterov` (false)"
    nesterov: bool = False

    def make(self, config: Settings, groups: Groups) -> torch.optim.Optimizer:
        """torch's SGD."""
        nesterov = self.nesterov and config.momentum > 0
        return torch.optim.SGD(list(groups), momentum=config.momentum, nesterov=nesterov, foreach=False)

    def state_bytes(self, config: Settings, parameters: Iterable[Tensor]) -> int:
        """The momentum."""
        return tensor_bytes(parameters) if config.momentum > 0 else 0
