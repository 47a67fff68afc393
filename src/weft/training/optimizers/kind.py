"""What an optimizer is to a job: its options, how it is made, and what its state takes."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any, ClassVar, Protocol

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor

# Parameters with one rate and one weight decay: {"params", "numbers", "lr", "peak_lr", "weight_decay"}.
Groups = Sequence[dict[str, Any]]


class Settings(Protocol):
    """What optimizers ask of a job's settings (``weft.training.settings.JobConfig``)."""

    @property
    def method(self) -> str: ...
    @property
    def seed(self) -> int: ...
    @property
    def adam_betas(self) -> tuple[float, float]: ...
    @property
    def adam_epsilon(self) -> float: ...
    @property
    def momentum(self) -> float: ...
    @property
    def model_fields_set(self) -> set[str]:
        """What the user has said."""


class OptimizerKind(BaseModel):
    """One optimizer; its fields are its options (``optim_args``)."""

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)
    name: ClassVar[str]
    about: ClassVar[str]

    def check_packages(self) -> None:
        """Refuse what cannot be made on this machine.

        Raises:
            ValueError: A package is missing.
        """

    def make(self, config: Settings, groups: Groups) -> torch.optim.Optimizer:
        """The optimizer of a job over these groups.

        Raises:
            UserError: A package is missing, or it cannot train these parameters.
        """
        raise NotImplementedError

    def state_bytes(self, config: Settings, parameters: Iterable[Tensor]) -> int:
        """The bytes of its state for parameters of any shape, once it has one."""
        raise NotImplementedError


def tensor_bytes(tensors: Iterable[Tensor]) -> int:
    """The bytes of tensors of any shape."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
