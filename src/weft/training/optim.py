"""Optimizers (torch's own) and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

if TYPE_CHECKING:
    from weft.training.settings import JobConfig


def make_optimizer(
    config: JobConfig, parameters: Sequence[nn.Parameter], rates: Sequence[float]
) -> torch.optim.Optimizer:
    """Make AdamW (Loshchilov & Hutter 2019) or SGD with momentum, for one job's parameters and their rates.

    The rate of a group before the schedule stands in its ``peak_lr``.
    """
    by_rate: dict[float, list[nn.Parameter]] = {}
    for parameter, rate in zip(parameters, rates, strict=True):
        by_rate.setdefault(rate, []).append(parameter)
    groups = [{"params": params, "lr": rate, "peak_lr": rate} for rate, params in by_rate.items()]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, weight_decay=config.weight_decay, foreach=False)
    return torch.optim.AdamW(
        groups,
        betas=config.adam_betas,
        eps=config.adam_epsilon,
        weight_decay=config.weight_decay,
        fused=True,
    )


def schedule_factor(kind: str, step: int, total: int, warmup: int) -> float:
    """The factor of the learning rate at ``step`` (from 0) of ``total``.

    Warm-up rises linearly and reaches 1 at its end; then ``constant``, ``linear`` to 0, or ``cosine`` (half a period,
    1 to 0; Loshchilov & Hutter 2017 without restarts).
    """
    if step < warmup:
        return (step + 1) / warmup
    if kind == "constant":
        return 1.0
    progress = (step - warmup) / max(1, total - warmup)
    return 1.0 - progress if kind == "linear" else 0.5 * (1.0 + math.cos(math.pi * progress))


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors ``<parameter's number>.<what>``, in their own shapes (a step is a scalar)."""
    state = optimizer.state_dict()["state"]
    return {f"{i}.{key}": value for i, entry in state.items() for key, value in entry.items() if value is not None}


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back the tensors of ``optimizer_tensors``, in the same shapes."""
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, what = key.split(".", 1)
        state.setdefault(int(number), {})[what] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})
