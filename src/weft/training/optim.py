"""A job's optimizer: its groups of parameters, and its state as tensors."""

from __future__ import annotations

from collections.abc import Sequence
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
    """The job's optimizer, over its parameters.

    Args:
        rates: the learning rate of each; a group's own, before the schedule, stands in its ``peak_lr``.
        decays: whether ``weight_decay`` pulls each to 0; default: all.

    Raises:
        UserError: As ``OptimizerKind.make``.
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
    return config.optimizer_kind.make(config, groups)


# Of a number that is no tensor, after its name.
_NUMBER = ":number"


def optimizer_tensors(optimizer: torch.optim.Optimizer) -> dict[str, Tensor]:
    """The optimizer's state as tensors ``<parameter's number>.<what>``, in their own shapes (a step is a scalar).

    No two of them share memory, which no file of tensors holds: bitsandbytes has one table for all parameters.
    """
    found: dict[str, Tensor] = {}
    places: set[int] = set()
    for group in optimizer.param_groups:
        for number, parameter in zip(group["numbers"], group["params"], strict=True):
            for key, value in optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    place = value.untyped_storage().data_ptr()
                    found[f"{number}.{key}"] = value.clone() if place and place in places else value
                    places.add(place)
                elif value is not None:
                    found[f"{number}.{key}{_NUMBER}"] = torch.tensor(value)
    return found


def restore_optimizer(optimizer: torch.optim.Optimizer, tensors: dict[str, Tensor]) -> None:
    """Put back the tensors of ``optimizer_tensors``, in the same shapes."""
    places = {number: place for place, number in _numbers(optimizer).items()}
    state: dict[int, dict[str, Any]] = {}
    for key, value in tensors.items():
        number, what = key.split(".", 1)
        plain = what.endswith(_NUMBER)
        state.setdefault(places[int(number)], {})[what.removesuffix(_NUMBER)] = value.item() if plain else value.clone()
    optimizer.load_state_dict({**optimizer.state_dict(), "state": state})


def _numbers(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """The number of each parameter in a checkpoint, by its number in torch's state dict."""
    groups = optimizer.state_dict()["param_groups"]
    return {place: number for group in groups for place, number in zip(group["params"], group["numbers"], strict=True)}
