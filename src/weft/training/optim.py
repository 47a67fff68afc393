"""Optimizers (torch's own) and learning-rate schedules."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter

if TYPE_CHECKING:
    from weft.training.settings import JobConfig


def decays(adapter: Adapter, parameter: str) -> bool:
    """Whether weight decay pulls one parameter to 0.

    Not what a layer stores whole (``stored_whole``: its parameters' names, or True for all): a norm's gain, a scale and
    a copy of a weight begin where the base is, not at 0.
    """
    path, _, name = parameter.rpartition(".")
    layers = [path[:end] for end in range(len(path) + 1) if end == len(path) or path[end] == "."]
    whole = [getattr(adapter.get_submodule(layer), "stored_whole", ()) for layer in layers]
    return not any(found is True or name in (found or ()) for found in whole)


def make_optimizer(
    config: JobConfig, parameters: Sequence[nn.Parameter], rates: Sequence[float], decays: Sequence[bool] = ()
) -> torch.optim.Optimizer:
    """AdamW (Loshchilov & Hutter 2019) or SGD with momentum, over one job's parameters.

    Args:
        rates: the learning rate of each; a group's own, before the schedule, stands in its ``peak_lr``.
        decays: whether ``weight_decay`` pulls each to 0; default: all.
    """
    # A checkpoint numbers the parameters by rate alone: as it did before some of them did not decay.
    order = sorted(range(len(parameters)), key=lambda i: rates.index(rates[i]))
    alike: dict[tuple[float, float], list[int]] = {}
    for number, i in enumerate(order):
        decay = config.weight_decay if not decays or decays[i] else 0.0
        alike.setdefault((rates[i], decay), []).append(number)
    groups: list[dict[str, Any]] = [
        {"params": [parameters[order[n]] for n in numbers], "numbers": numbers, "lr": rate, "peak_lr": rate,
         "weight_decay": decay}
        for (rate, decay), numbers in alike.items()
    ]  # fmt: skip
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=config.momentum, foreach=False)
    return torch.optim.AdamW(groups, betas=config.adam_betas, eps=config.adam_epsilon, fused=True)


def state_copies(config: JobConfig) -> int:
    """How many numbers the optimizer keeps for each one that it trains."""
    return int(config.momentum > 0) if config.optimizer == "sgd" else 2


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors of any shape."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


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
    state, numbers = optimizer.state_dict()["state"], _numbers(optimizer)
    return {
        f"{numbers[i]}.{key}": value for i, entry in state.items() for key, value in entry.items() if value is not None
    }


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back the tensors of ``optimizer_tensors``, in the same shapes."""
    places = {number: place for place, number in _numbers(optimizer).items()}
    state: dict[int, dict[str, Tensor]] = {}
    for key, value in tensors.items():
        number, what = key.split(".", 1)
        state.setdefault(places[int(number)], {})[what] = value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _numbers(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """The number of each parameter in a checkpoint, by its number in torch's state dict."""
    groups = optimizer.state_dict()["param_groups"]
    return {place: number for group in groups for place, number in zip(group["params"], group["numbers"], strict=True)}
