"""Bases and adapters that once slipped through the proof, or that it once refused for no fault of theirs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.models.test_proof import SIZES, moved
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM

from weft.core.architecture import HeadForm
from weft.models import describe


class Scaled(LlamaForCausalLM):
    """Logits times a factor that no configuration names."""

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.85
        return out


def scaled(dtype: torch.dtype) -> Any:
    torch.manual_seed(0)
    return moved(Scaled(LlamaConfig(**SIZES)).eval()).to(dtype)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_rounding_of_a_narrow_dtype_hides_nothing(dtype: torch.dtype) -> None:
    model = scaled(dtype)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    places = [p.data_ptr() for p in model.parameters()]
    assert describe(model).head_form == HeadForm(pytest.approx(0.85))
    assert [p.data_ptr() for p in model.parameters()] == places
    now: dict[str, Tensor] = model.state_dict()
    assert all(now[name].dtype == dtype and torch.equal(now[name], tensor) for name, tensor in before.items())
