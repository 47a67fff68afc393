"""The objectives that a job can name (``objective``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from weft.core.head import Supervised
from weft.errors import UserError
from weft.extensions import Registry
from weft.objectives.answers import AnswerObjective
from weft.objectives.dpo import DPO
from weft.objectives.grpo import GRPO
from weft.objectives.kto import KTO
from weft.objectives.orpo import ORPO
from weft.objectives.ppo import PPO, Value
from weft.objectives.regression import Regression
from weft.objectives.reward import Reward
from weft.objectives.rloo import RLOO
from weft.objectives.simpo import SimPO

# (logits [S, vocabulary] at the rows that are learned from, what is learned there) -> a loss per sequence
# [num_sequences]: the sum over its tokens, which the step divides by the tokens of the job's whole batch. Keyword
# arguments are the objective's settings.
Objective = Callable[..., Tensor]
_Function = TypeVar("_Function", bound=Objective)
OBJECTIVES: Registry[Objective | type[AnswerObjective]] = Registry(
    "objective",
    {
        "dpo": DPO, "grpo": GRPO, "kto": KTO, "orpo": ORPO, "ppo": PPO, "regression": Regression, "reward": Reward,
        "rloo": RLOO, "simpo": SimPO, "value": Value,
    },
)


def register_objective(name: str) -> Callable[[_Function], _Function]:
    """A decorator of an ``Objective``.

    Raises:
        UserError: The name is taken.
    """
    return OBJECTIVES.register(name, lambda function: function)


def make_objective(name: str, settings: Mapping[str, object]) -> Objective | AnswerObjective:
    """The objective of this name with its settings.

    Raises:
        UserError: There is no such objective, or it has no such setting.
    """
    function = OBJECTIVES.find(name)
    if isinstance(function, type):
        return function(**settings)
    try:
        inspect.signature(function).bind(None, None, **settings)
    except TypeError as error:
        raise UserError(f"objective_settings do not fit the objective {name!r}: {error}.") from None

    def objective(logits: Tensor, batch: Supervised) -> Tensor:
        return function(logits, batch, **settings)

    objective.__name__ = name
    return objective


def losses_of(objective: Objective, logits: Tensor, batch: Supervised) -> Tensor:
    """The losses [num_sequences] that an objective gives.

    Raises:
        UserError: It gives another shape, or what no gradient can come from.
    """
    losses: object = objective(logits, batch)
    name = getattr(objective, "__name__", type(objective).__name__)
    if not isinstance(losses, Tensor) or losses.shape != (batch.num_sequences,):
        given = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise UserError(
            f"the objective {name!r} must give one loss per sequence, of shape ({batch.num_sequences},); it gave "
            f"{given}. Sum the tokens of each sequence: batch.per_sequence(losses)."
        )
    if logits.requires_grad and not losses.requires_grad:
        raise UserError(
            f"the objective {name!r} gives losses without a gradient, so nothing would be learned: it must compute "
            "them from the logits, without detach, item or no_grad."
        )
    return losses
