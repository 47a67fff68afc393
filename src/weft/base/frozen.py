"""A base that nothing trains."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn


def freeze(model: nn.Module) -> Callable[[], None]:
    """Switch off gradients and dropout of the base; returns the function that restores both."""
    trained = [p for p in model.parameters() if p.requires_grad]
    training = [m for m in model.modules() if m.training]
    model.requires_grad_(False)
    model.eval()

    def undo() -> None:
        for parameter in trained:
            parameter.requires_grad_(True)
        for module in training:
            module.training = True

    return undo
