"""Lion (Chen et al. 2023, algorithm 2): the sign of a momentum."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from weft.training.optimizers.kind import Groups, OptimizerKind, Settings, tensor_bytes

_BETAS = (0.9, 0.99)  # the paper's; AdamW's second one is larger


class LionOptimizer(torch.optim.Optimizer):
    """``c = b1 m + (1 - b1) g;  p <- p - lr (sign(c) + decay p);  m <- b2 m + (1 - b2) g``."""

    def __init__(self, groups: Groups, betas: tuple[float, float]) -> None:
        super().__init__(list(groups), {"betas": betas})

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            first, second = group["betas"]
            for p in group["params"]:
                if p.grad is None:
                    continue
                state: dict[str, Any] = self.state[p]
                if not state:
                    state["exp_avg"] = torch.zeros_like(p)
                moment: Tensor = state["exp_avg"]
                direction = (moment * first).add_(p.grad, alpha=1 - first).sign_()
                p.mul_(1 - group["lr"] * group["weight_decay"]).add_(direction, alpha=-group["lr"])
                moment.mul_(second).add_(p.grad, alpha=1 - second)


class Lion(OptimizerKind):
    """One number for each that is trained. Its rate is a third to a tenth of AdamW's."""

    name = "lion"
    about = "one moment; wants a third to a tenth of AdamW's rate, `adam_betas` (0.9, 0.99)"

    def make(self, config: Settings, groups: Groups) -> torch.optim.Optimizer:
        """With the paper's betas, where none are given."""
        return LionOptimizer(groups, config.adam_betas if "adam_betas" in config.model_fields_set else _BETAS)

    def state_bytes(self, config: Settings, parameters: Iterable[Tensor]) -> int:
        """The moment."""
        return tensor_bytes(parameters)
