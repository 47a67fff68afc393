"""How a job's parameters take a step: all of them after the backward pass, or each within it.

Within the backward pass a tensor is updated, and its gradient freed, as soon as that is complete, so there is hardly
more than one gradient at a time (LOMO, Lv et al. 2023, does so with SGD). Here the optimizer is the job's own: it
changes what has a gradient, and when it is asked that is one tensor. No number changes.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter
from weft.errors import UserError


class Updates:
    """The step after the backward pass."""

    def __init__(
        self, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer, max_norm: float = 0.0
    ) -> None:
        """``max_norm``: clip the gradients to that norm; 0: do not."""
        self.parameters, self.optimizer, self.max_norm = parameters, optimizer, max_norm

    def begin_last_pass(self, factor: float) -> None:
        """Take note that the coming backward pass completes the gradients of a step with this factor of the rates."""

    def forget_pass(self) -> None:
        """Forget all gradients of a step, which begins again.

        Raises:
            UserError: It has changed tensors already.
        """
        for parameter in self.parameters:
            parameter.grad = None

    def step(self, factor: float, loss_scale: float) -> float:
        """Clip, change the parameters and free the gradients, with this factor of the rates.

        Returns:
            The norm of the gradients before clipping, without the scale of the loss. If it is not finite, nothing
            changes.
        """
        gradients = [p.grad for p in self.parameters if p.grad is not None]
        if loss_scale != 1.0:
            torch._foreach_div_(gradients, loss_scale)
        norm = _norm([torch.linalg.vector_norm(g) for g in gradients])
        if math.isfinite(norm):
            if self.max_norm and norm > self.max_norm:
                torch._foreach_mul_(gradients, self.max_norm / (norm + 1e-6))
            self._set_rates(factor)
            self.optimizer.step()
        return norm

    def _set_rates(self, factor: float) -> None:
        for group in self.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor


class LayerwiseUpdates(Updates):
    """Steps within the last backward pass of a step. In passes before, gradients are kept and added up as usual."""

    def __init__(self, adapter: Adapter, parameters: Sequence[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
        """Raises UserError if the adapter's method looks at all gradients after a step."""
        super().__init__(parameters, optimizer)
        for part in adapter.parts:
            if type(part).after_step is not Adapter.after_step:
                raise UserError(
                    f"job '{adapter.name}': layerwise_updates does not go with method {part.config.method}, which "
                    "looks at all gradients after each step. Leave it out."
                )
        self.job, self._armed = adapter.name, False
        self._norms: dict[int, Tensor] = {}
        # Gradients of earlier passes. The optimizer must not see them before their tensor's turn.
        self._waiting: dict[int, Tensor] = {}
        for number, parameter in enumerate(parameters):
            parameter.register_post_accumulate_grad_hook(partial(self._complete, number))

    def begin_last_pass(self, factor: float) -> None:
        self._set_rates(factor)
        self._armed = True
        for number, parameter in enumerate(self.parameters):
            if parameter.grad is not None:
                self._waiting[number], parameter.grad = parameter.grad, None

    def forget_pass(self) -> None:
        if self._norms:
            raise UserError(
                f"out of memory in a backward pass of job '{self.job}', which had updated a part of its tensors "
                "(layerwise_updates), so the step cannot begin again in smaller passes. Set a smaller pack_tokens."
            )
        self._armed = False
        self._waiting.clear()
        super().forget_pass()

    def step(self, factor: float, loss_scale: float) -> float:
        """Update what no gradient of the last pass has reached, if anything; the norm of all gradients.

        What is not finite has changed the parameters by now: the job ends by it.
        """
        for number, parameter in enumerate(self.parameters):
            self._update(number, parameter)
        norm = _norm([self._norms[number] for number in sorted(self._norms)])
        self._armed = False
        self._norms.clear()
        return norm

    def _complete(self, number: int, parameter: Tensor) -> None:
        # Autograd adds up all that one backward pass has for a tensor before it comes here.
        if self._armed:
            self._update(number, parameter)

    @torch.no_grad()
    def _update(self, number: int, parameter: Tensor) -> None:
        if (before := self._waiting.pop(number, None)) is not None:
            parameter.grad = before if parameter.grad is None else before.add_(parameter.grad)
        if parameter.grad is None:
            return
        self._norms[number] = torch.linalg.vector_norm(parameter.grad)
        self.optimizer.step()
        parameter.grad = None


def _norm(norms: Sequence[Tensor]) -> float:
    """The norm of all numbers of tensors with these norms, scalars; it does not depend on how they are grouped."""
    return float(torch.linalg.vector_norm(torch.stack(list(norms))))
