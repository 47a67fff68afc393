"""The type of the ``ctx`` that torch gives to an autograd function."""

from __future__ import annotations

from typing import Protocol

from torch import Tensor


class Context(Protocol):
    """The part of a forward pass that the backward pass needs. (torch's own stubs name tuples of one entry.)"""

    saved_tensors: tuple[Tensor, ...]
    needs_input_grad: tuple[bool, ...]

    def save_for_backward(self, *tensors: Tensor | None) -> None:
        """Keep tensors, of any shape."""
