"""The objectives that a job can name (``objective``)."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from typing import TypeVar

from torch import Tensor

from weft.core.head import Supervised
from weft.errors import UserError
from weft.extensions import Registry

# (logits [S, vocabulary] at the rows that are learned from, what is learned there) -> a loss per sequence
# [num_sequences]: the sum over its tokens, which the step divides by the tokens of the job's whole batch. Keyword
# arguments are the objective's settings.
Objective = Callable[..., Tensor]
_Function = TypeVar("_Function", bound=Objective)
OBJECTIVES: Registry[Objective] = Registry("objective")


def register_objective(name: str) -> Callable[[_Function], _Function]:
    """A decorator of an ``Objective``.

    Raises:
        UserError: The name is taken.
    """
    return OBJECTIVES.register(name, lambda function: function)


def make_objective(name: str, settings: Mapping[str, object]) -> Objective:
    """The objective of this name with its settings.

    Raises:
        UserError: There is no such objective, or it has no such setting; when called: it gives another shape.
    """
    function = OBJECTIVES.find(name)
    try:
        inspect.signature(function).bind(None, None, **settings)
    except TypeError as error:
        raise UserError(f"objective_settings do not fit the objective {name!r}: {error}.") from None

    def objective(logits: Tensor, batch: Supervised) -> Tensor:
        losses = function(logits, batch, **settings)
        if losses.shape != (batch.num_sequences,):
            raise UserError(
                f"the objective {name!r} must give one loss per sequence, of shape ({batch.num_sequences},); it gave "
                f"{tuple(losses.shape)}. Sum the tokens of each sequence: batch.per_sequence(losses)."
            )
        return losses

    return objective
