"""The update of a stack of matrices against its reference; what else is in the file, LoRA's own tests see."""

from __future__ import annotations

import pytest
import torch
from tests import kit

from weft.ops.lowrank import stacked_low_rank_add, stacked_low_rank_add_ref


@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("count", [1, 3])
def test_stack_equals_its_reference(count: int, dtype: torch.dtype, transposed: bool) -> None:
    generator = torch.Generator().manual_seed(0)
    shape = (count, 5, 7) if transposed else (count, 7, 5)
    weight = torch.randn(shape, generator=generator).to(dtype)
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    found = []
    for function in (stacked_low_rank_add, stacked_low_rank_add_ref):
        a = torch.randn(count * 2, 5, generator=generator.manual_seed(1), dtype=wide).requires_grad_()
        b = torch.randn(7, 2 * count, generator=generator.manual_seed(2), dtype=wide).requires_grad_()
        y = function(weight, a, b, 0.5, transposed=transposed)
        assert y.dtype == dtype
        assert y.shape == shape
        y.square().sum().backward()
        found.append((y.detach(), a.grad, b.grad))
    for first, second in zip(*found, strict=True):
        # Sums of a few terms, each rounded: a handful of units of the largest.
        limit = 8 * torch.finfo(dtype).eps * float(second.abs().max())
        kit.measured("stack - reference", float((first - second).abs().max()), limit, derived=True)
