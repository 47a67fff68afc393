"""First values that several methods draw alike."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.core.adapter import BuildContext


def kaiming_uniform(context: BuildContext, *shape: int, inputs: int) -> Tensor:
    """Numbers of shape ``shape``, uniform within 1 / sqrt(inputs), from the context's generator.

    That is Kaiming-uniform with a = sqrt(5), torch's own choice for a linear of so many inputs.
    """
    values = torch.rand(*shape, generator=context.generator, dtype=torch.float32) * 2 - 1
    return (values / math.sqrt(inputs)).to(context.device, context.dtype)
