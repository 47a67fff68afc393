"""APOLLO (Zhu et al. 2025): AdamW's moments of a random projection of the gradient scale the gradient itself.

Of a matrix [m, n], m <= n, with P [r, m] of random numbers (variance 1 / r), renewed every ``update_proj_gap`` steps:

    R = P G,   M and V the moments of R,   N = M / (sqrt(V) + eps),
    s_j = |N_j| / |R_j|  over the columns j (``scale_type: channel``), or of the whole (``tensor``: APOLLO-Mini),
    W <- W - lr c sqrt(scale) G diag(s),   c = sqrt(1 - b2^t) / (1 - b1^t),

with the growth of |G diag(s)| from step to step limited to 1.01. What is no matrix, or has no more than r rows or
columns, takes AdamW's steps. P has no state: it comes from a seed made of the parameter's number and the step.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
from pydantic import Field
from torch import Tensor

from weft.errors import UserError
from weft.ops.seeds import stable_seed
from weft.training.optimizers.kind import Groups, OptimizerKind, Settings

_GROWTH = 1.01


class ApolloOptimizer(torch.optim.Optimizer):
    """The equations at the head of this module."""

    def __init__(self, groups: Groups, kind: Apollo, betas: tuple[float, float], eps: float, seed: int) -> None:
        super().__init__(list(groups), {"betas": betas, "eps": eps})
        self.kind, self.seed = kind, seed
        self._projections: dict[Tensor, tuple[int, Tensor]] = {}

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """Change every parameter that has a gradient."""
        for group in self.param_groups:
            for number, p in zip(group["numbers"], group["params"], strict=True):
                if p.grad is not None:
                    self._step(p, group, number)

    def _step(self, p: Tensor, group: dict[str, Any], number: int) -> None:
        (first, second), state, grad = group["betas"], self.state[p], p.grad
        assert grad is not None
        projected = self.kind.projects(p)
        turned = projected and p.shape[0] > p.shape[1]
        g = grad.t() if turned else grad
        if projected:
            done = 0 if not state else int(state["step"])
            g = self._projection(p, number, done // self.kind.update_proj_gap, len(g)) @ g
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float64)
            state["exp_avg"], state["exp_avg_sq"] = torch.zeros_like(g), torch.zeros_like(g)
        state["step"] += 1
        steps, moment, square = int(state["step"]), state["exp_avg"], state["exp_avg_sq"]
        moment.mul_(first).add_(g, alpha=1 - first)
        square.mul_(second).addcmul_(g, g, value=1 - second)
        change = moment / square.sqrt().add_(group["eps"])
        rate = group["lr"] * math.sqrt(1 - second**steps) / (1 - first**steps)
        if projected:
            change = self._scaled(grad, g, change, state, turned=turned)
        p.mul_(1 - group["lr"] * group["weight_decay"]).add_(change, alpha=-rate)

    def _scaled(self, grad: Tensor, g: Tensor, change: Tensor, state: dict[str, Any], *, turned: bool) -> Tensor:
        """The gradient [m, n], scaled by what the moments make of its projection, with limited growth."""
        if self.kind.scale_type == "channel":
            scale = torch.linalg.vector_norm(change, dim=0) / (torch.linalg.vector_norm(g, dim=0) + 1e-8)
            scale = scale[:, None] if turned else scale
        else:
            scale = torch.linalg.vector_norm(change) / (torch.linalg.vector_norm(g) + 1e-8)
        scaled = grad * scale * math.sqrt(self.kind.scale)
        norm = torch.linalg.vector_norm(scaled)
        if "scaled_norm" in state:
            limiter = (norm / (state["scaled_norm"] + 1e-8)).clamp_min(_GROWTH) / _GROWTH
            scaled, norm = scaled / limiter, norm / limiter
        state["scaled_norm"] = norm
        return scaled

    def _projection(self, p: Tensor, number: int, turn: int, rows: int) -> Tensor:
        """P [rank, rows] of this turn; kept until the next one."""
        if p not in self._projections or self._projections[p][0] != turn:
            generator = torch.Generator().manual_seed(stable_seed(self.seed, "apollo", number, turn))
            drawn = torch.randn(self.kind.rank, rows, generator=generator) / math.sqrt(self.kind.rank)
            self._projections[p] = (turn, drawn.to(p))
        return self._projections[p][1]


class Apollo(OptimizerKind):
    """For matrices that are trained whole: the state is that of ``rank`` rows."""

    name = "apollo"
    about = (
        "for full fine-tuning: AdamW's state of a random projection of each gradient; options `rank` (128), `scale` "
        "(1), `scale_type` (channel; `tensor` with rank 1 and scale 128 is APOLLO-Mini), `update_proj_gap` (200)"
    )
    rank: int = Field(128, gt=0)
    scale: float = Field(1.0, gt=0)
    scale_type: Literal["channel", "tensor"] = "channel"
    update_proj_gap: int = Field(200, gt=0)

    def projects(self, p: Tensor) -> bool:
        """Whether a parameter's gradient [m, n] is projected."""
        return p.dim() == 2 and min(p.shape) > self.rank

    def make(self, config: Settings, groups: Groups) -> torch.optim.Optimizer:
        """The optimizer.

        Raises:
            UserError: Nothing that is trained has more rows and columns than ``rank``.
        """
        parameters = [p for group in groups for p in group["params"]]
        if not any(map(self.projects, parameters)):
            largest = max((min(p.shape) for p in parameters if p.dim() == 2), default=0)
            raise UserError(
                f"optimizer: apollo saves nothing with method {config.method}: it projects gradients of matrices to "
                f"rank {self.rank}, and the largest here has {largest} rows or columns. Take adamw, or a smaller "
                "optim_args: {rank: …}."
            )
        return ApolloOptimizer(groups, self, config.adam_betas, config.adam_epsilon, config.seed)

    def state_bytes(self, config: Settings, parameters: Iterable[Tensor]) -> int:
        """Both moments of the projections, or of the whole."""
        return sum(
            2 * (self.rank * max(p.shape) if self.projects(p) else p.numel()) * p.element_size() for p in parameters
        )
