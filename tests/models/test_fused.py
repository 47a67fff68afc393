"""Fused modules give what the model's own give, under any route, and leave no trace."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForCausalLM, LlamaConfig, MistralConfig, Qwen2Config

import weft.models.proof
from weft.api import Adapters
from weft.core.stream import Part
from weft.methods import BitFitConfig, BottleneckConfig, LoraConfig
from weft.models import describe
from weft.models.fused import recognise

SIZES: dict[str, Any] = {
    "vocab_size": 60,
    "hidden_size": 32,
    "intermediate_size": 40,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
}
CONFIGS = {"llama": LlamaConfig, "mistral": MistralConfig, "qwen2": Qwen2Config}


def make(family: str, dtype: torch.dtype = torch.float64) -> Any:
    """A random model; Mistral with a window shorter than the sequences."""
    torch.manual_seed(0)
    extra = {"sliding_window": 5} if family == "mistral" else {}
    model = AutoModelForCausalLM.from_config(CONFIGS[family](**SIZES, **extra)).to(dtype)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.2)
    return model


def run(model: Any, parts: list[Part], **options: Any) -> tuple[Tensor, list[Tensor | None]]:
    """Last hidden states and all adapters' gradients."""
    adapters = Adapters(model, describe(model), **options)
    adapters.add("a", LoraConfig(r=3, init_lora_weights=False), seed=1)
    adapters.add("b", BitFitConfig(add_missing=True), seed=2)
    adapters.add("c", LoraConfig(r=2, target_modules=["q_proj", "down_proj"], init_lora_weights=False), seed=3)
    adapters.add("d", BottleneckConfig(), seed=4)
    adapters.add("e", LoraConfig(r=2, init_lora_weights=False, lora_dropout=0.3), seed=5)
    parameters = [p for name in adapters.names for p in adapters[name].parameters()]
    hidden = adapters.forward(adapters.stream(parts))
    gradients = torch.autograd.grad(hidden.square().sum(), parameters, allow_unused=True)
    adapters.close()
    return hidden.detach(), list(gradients)


SEQUENCES = [[3, 7, 9, 11, 2, 5, 8, 1], [4, 4, 6], [10]]


def norms(model: Any) -> dict[str, type]:
    return {path: kind for path, kind in recognise(model).items() if "Norm" in kind.__name__}


ROUTES = {
    "base": [Part(None, SEQUENCES)],
    "one": [Part("a", SEQUENCES)],
    "part of the linears": [Part("c", SEQUENCES)],
    "mixed": [Part(name, SEQUENCES, seed=7) for name in ("b", "a", None, "d", "c", "e")],
}


@pytest.mark.parametrize("family", CONFIGS)
@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize(
    ("dtype", "checkpointing"), [(torch.float64, False), (torch.float64, True), (torch.float32, False)]
)
def test_fused_equals_own(
    family: str, route: str, dtype: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """In fp64 to the last digits, with our norms in both (transformers' compute in fp32); in fp32 with its own."""
    model, parts = make(family, dtype), ROUTES[route]
    bound = 1e-10 if dtype == torch.float64 else 2e-4
    if route == "base":
        parts = [*parts, Part("a", [[1, 2]])]  # something must need a gradient
    hidden, gradients = run(model, parts, checkpointing=checkpointing)
    monkeypatch.setattr(weft.models.proof, "recognise", lambda model: norms(model) if dtype == torch.float64 else {})
    own_hidden, own_gradients = run(model, parts, checkpointing=checkpointing)
    torch.testing.assert_close(hidden, own_hidden, rtol=bound, atol=bound)
    for a, b in zip(gradients, own_gradients, strict=True):
        assert (a is None) == (b is None) or not (a if b is None else b).any()  # None and zero say the same
        if a is not None and b is not None:
            torch.testing.assert_close(a, b, rtol=bound, atol=bound * max(1.0, b.abs().max().item()))


@pytest.mark.parametrize("family", CONFIGS)
def test_close_leaves_no_trace(family: str) -> None:
    model = make(family)
    before = {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()}
    ids = torch.tensor([[1, 2, 3, 4]])
    logits = model(ids).logits
    adapters = Adapters(model, describe(model))
    assert any(type(m).__name__.startswith("Fused") for m in model.modules())
    adapters.add("b", BitFitConfig(add_missing=True))
    adapters.close()
    assert {name: (type(m), set(m.__dict__)) for name, m in model.named_modules()} == before
    torch.testing.assert_close(model(ids).logits, logits, rtol=0, atol=0)
