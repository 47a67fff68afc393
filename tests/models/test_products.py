"""A base in 16 bits on a machine that multiplies slowly in them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import kit

from weft import Adapters, LoraConfig
from weft.core.stream import Part
from weft.libraries import multiplies_sixteen_bits
from weft.models import describe, products
from weft.ops import products as ops


@pytest.mark.parametrize("instructions", [True, False])
@pytest.mark.parametrize("model_type", ["llama", "gpt2", "bloom"])
def test_swapped_and_given_back(model_type: str, instructions: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Logits and the gradients of LoRA are no farther from those in float32 than torch's own products bring them."""
    pieces = []
    monkeypatch.setattr(ops, "_SMALL", 0)
    monkeypatch.setattr(ops, "widened", lambda a, run=ops.widened: pieces.append(1) or run(a))

    def run(dtype: torch.dtype, there: bool) -> list[torch.Tensor]:
        for module in (products, ops):
            monkeypatch.setattr(
                module, "faster_wide_from", lambda _, dtype: 1 if dtype.itemsize == 2 and not there else math.inf
            )
        model: Any = kit.make_model(model_type, torch.bfloat16).to(dtype)
        classes = [type(module) for module in model.modules()]
        with Adapters(model, describe(model)) as adapters:
            adapter = adapters.add("a", LoraConfig(r=8))
            kit.randomize(adapter)
            (first, second) = kit.hidden_of(
                adapters, [Part("a", [list(range(5, 25))]), Part(None, [list(range(3, 15))])]
            )
            logits = adapters.logits(torch.cat([first, second]), [("a", 20), (None, 12)])
            logits.float().log_softmax(-1)[:, 7].sum().backward()
            found = [logits.detach(), *(p.grad for _, p in sorted(adapter.named_parameters()) if p.grad is not None)]
        assert [type(module) for module in model.modules()] == classes
        return found

    exact = run(torch.float32, True)
    plain = run(torch.bfloat16, True)
    assert not pieces
    ours = run(torch.bfloat16, instructions)
    assert bool(pieces) != instructions
    shares = []
    for number, (found, other, wanted) in enumerate(zip(ours, plain, exact, strict=True)):
        far, theirs = (float((one.double() - wanted.double()).norm()) for one in (found, other))
        # Both round as often, in other places: one tensor may be lucky, all together are not.
        assert far <= 3 * theirs + 1e-6, f"{number}: {far} beside {theirs}"
        shares.append((far / float(wanted.norm() + 1e-6), theirs / float(wanted.norm() + 1e-6)))
    assert sum(far for far, _ in shares) <= 1.25 * sum(theirs for _, theirs in shares) + 1e-6


def test_what_is_asked() -> None:
    cpu = torch.device("cpu")
    assert multiplies_sixteen_bits(cpu, torch.float32)
    assert multiplies_sixteen_bits(torch.device("cuda"), torch.bfloat16)
    for dtype, kind in ((torch.bfloat16, "bf16"), (torch.float16, "fp16")):
        asked = getattr(torch.ops.mkldnn, f"_is_mkldnn_{kind}_supported")
        assert multiplies_sixteen_bits(cpu, dtype) == asked()
