"""Memory for large tensors that is used again.

Steps make the same large tensors over and over. In the C library's heap those that stay, and small objects, come to lie
between them; a gap then fits none of the next ones, and the heap grows (``weft.machine.Rooms``).
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from weft.machine import ROOMS


def empty(like: Tensor, shape: Sequence[int] | None = None, dtype: torch.dtype | None = None) -> Tensor:
    """An empty tensor [*shape], by default of the shape of ``like`` [...] and in its dtype, on its device."""
    shape, dtype = like.shape if shape is None else shape, dtype or like.dtype
    plain = type(like) in (Tensor, torch.nn.Parameter) and not torch.compiler.is_compiling()
    if plain and like.device.type == "cpu":
        # A view of it would be a view for autograd too.
        return empty_numbers(math.prod(shape), dtype).resize_(*shape)
    return like.new_empty(shape, dtype=dtype)


def empty_numbers(count: int, dtype: torch.dtype = torch.float32) -> Tensor:
    """An empty tensor [count] on the CPU."""
    memory = ROOMS.take(count * dtype.itemsize)
    if memory is None:
        return torch.empty(count, dtype=dtype, device="cpu")
    return torch.frombuffer(memory, dtype=dtype, count=count)


class _Apart(torch.autograd.Function):
    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return empty(x).copy_(x)

    @staticmethod
    def backward(ctx: object, grad: Tensor) -> Tensor:
        return grad


def apart(x: Tensor) -> Tensor:
    """x [...], which stays until the way back, in such memory where there is some."""
    found: Tensor = _Apart.apply(x) if x.device.type == "cpu" and ROOMS.has(x.nbytes) else x
    return found
