"""IA3 and layer-norm tuning: their equations, what they choose by default, quantised bases, bad settings."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests import kit
from torch import Tensor, nn

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.models import describe

KINDS = ["llama", "bloom", "gpt2", "qwen2", "mistral", "gemma", "gpt_neox", "opt", "falcon"]
FUSED = {"bloom": "query_key_value", "gpt_neox": "query_key_value", "gpt2": "c_attn", "falcon": "query_key_value"}
INNER = {"bloom": "dense_4h_to_h", "gpt_neox": "dense_4h_to_h", "gpt2": "c_proj", "opt": "fc2",
         "falcon": "dense_4h_to_h"}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_ia3_finds_keys_values_and_the_mlp(kind: str) -> None:
    model = kit.make_model(kind)
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", kit.METHODS["ia3"]())
    outputs = {path.rsplit(".", 1)[-1] for path in adapter.sites()}
    assert outputs == ({FUSED[kind]} if kind in FUSED else {"k_proj", "v_proj"})
    inner = list(adapter.input_sites())
    assert {path.rsplit(".", 1)[-1] for path in inner} == {INNER.get(kind, "down_proj")}
    assert len(inner) == model.config.num_hidden_layers
    assert not any("attn" in path or "attention" in path for path in inner)


@pytest.mark.parametrize("padded", [False, True], ids=["stream", "padded"])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "opt"])
def test_ia3_is_the_equation(kind: str, padded: bool) -> None:
    """The base with l_k, l_v multiplied into its weights' rows and l_ff into W_2's columns gives the same."""
    model = kit.make_model(kind, torch.float64)
    adapters = Adapters(model, describe(model), padded=padded)
    adapter = kit.randomize(adapters.add("it", kit.METHODS["ia3"]()), 3)
    texts = kit.texts(3)
    found = kit.hidden_of(adapters, [Part("it", texts), Part(None, texts)])
    assert kit.difference(found[:3], found[3:]) > 1e-3
    adapters.close()
    with torch.no_grad():
        for key, vector in adapter.tensors().items():
            path = key.removeprefix("base_model.model.").removesuffix(".ia3_l")
            module: Any = model.get_submodule(path)
            inner = vector.shape[0] == 1
            conv = not isinstance(module, nn.Linear)
            module.weight.mul_(vector.t() if conv else vector)
            if not inner and module.bias is not None:
                module.bias.mul_(vector.flatten())
    again = Adapters(model, describe(model), padded=padded)
    kit.measured("ia3 - merged", kit.difference(found[:3], kit.hidden_of(again, [Part(None, texts)])), 1e-12)


def test_ln_tuning_holds_every_norm_whole() -> None:
    for kind in KINDS:
        model = kit.make_model(kind)
        adapters = Adapters(model, describe(model))
        stored = adapters.add("it", kit.METHODS["ln_tuning"]()).tensors()
        norms = {name: p for name, p in model.named_parameters() if "norm" in name or ".ln_" in name}
        named = {
            key.removeprefix("base_model.model.").replace(".ln_tuning_layers", ""): value
            for key, value in stored.items()
        }
        assert named.keys() == norms.keys()
        assert all(torch.equal(named[key], norms[key]) for key in norms)
        adapters.close()


def test_ln_tuning_is_the_norm_with_other_weights() -> None:
    model = kit.make_model("bloom", torch.float64)
    adapters = Adapters(model, describe(model))
    adapter = kit.randomize(adapters.add("it", kit.METHODS["ln_tuning"](target_modules=["input_layernorm", "ln_f"])))
    texts = kit.texts(3)
    found = kit.hidden_of(adapters, [Part("it", texts), Part(None, texts)])
    assert kit.difference(found[:3], found[3:]) > 1e-3
    adapters.close()
    with torch.no_grad():
        for key, value in adapter.tensors().items():
            model.get_parameter(key.removeprefix("base_model.model.").replace(".ln_tuning_layers", "")).copy_(value)
    again = Adapters(model, describe(model))
    kit.measured("ln_tuning - merged", kit.difference(found[:3], kit.hidden_of(again, [Part(None, texts)])), 1e-12)


def quantise(model: nn.Module, kind: str) -> nn.Module:
    bnb = pytest.importorskip("bitsandbytes")
    for path, module in list(model.named_modules()):
        if not isinstance(module, nn.Linear) or path == "lm_head":
            continue
        sizes, weight = (module.in_features, module.out_features), module.weight.data
        if kind == "nf4":
            new = bnb.nn.Linear4bit(*sizes, bias=False, quant_type="nf4", compute_dtype=torch.float32)
            new.weight = bnb.nn.Params4bit(weight, requires_grad=False, quant_type="nf4")
        else:
            new = bnb.nn.Linear8bitLt(*sizes, bias=False, has_fp16_weights=False)
            new.load_state_dict({"weight": weight})
        parent, _, name = path.rpartition(".")
        setattr(model.get_submodule(parent), name, new.to("cpu"))
    return model


def test_ia3_does_not_take_keys_alone_for_keys_and_values() -> None:
    model = kit.make_model("llama")
    shape = describe(model)
    other = dataclasses.replace(shape, linears=tuple(path for path in shape.linears if not path.endswith("v_proj")))
    with pytest.raises(UserError, match="ia3 cannot tell which modules of this llama model give keys and values"):
        kit.METHODS["ia3"]().places(other)


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("kind", ["nf4", "int8"])
@pytest.mark.parametrize("method", ["ia3", "ln_tuning"])
def test_on_quantised_bases(kind: str, method: str) -> None:
    """Identity at the start, to the bit, and every parameter learns."""
    model = quantise(kit.make_model("llama", hidden_size=64, intermediate_size=128), kind)
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", kit.method_config(method))
    texts = kit.texts(3)
    before = kit.hidden_of(adapters, [Part("it", texts), Part(None, texts)])
    assert kit.difference(before[:3], before[3:]) == 0
    kit.randomize(adapter)
    after: list[Tensor] = kit.hidden_of(adapters, [Part("it", texts), Part(None, texts)])
    assert kit.difference(after[:3], after[3:]) > 1e-2
    assert kit.difference(after[3:], before[3:]) == 0
    torch.stack([h.square().mean() for h in after[:3]]).sum().backward()
    grads = kit.gradients(adapter)
    assert grads.keys() == dict(adapter.named_parameters()).keys()
    assert all(grad.any() for grad in grads.values())


def test_feedforward_modules_must_be_targets() -> None:
    with pytest.raises(UserError, match="feedforward_modules"):
        kit.METHODS["ia3"](target_modules=["k_proj"], feedforward_modules=["down_proj"])
