"""Every architecture in the table: the stream gives the model's own logits, all methods find their places, and the
padded path agrees with the stream where prefixes and virtual tokens come in."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from tests import kit
from transformers import AutoConfig, AutoModelForCausalLM

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.generation import Request, generate
from weft.layouts.packed import Packed
from weft.models import describe
from weft.models.facts import FACTS

# What differs from the common tiny sizes. Windows are shorter than the texts, so that they matter.
SPECIAL: dict[str, dict[str, Any]] = {
    "mistral": {"sliding_window": 6},
    "gemma": {"head_dim": 16},
    "gemma2": {"head_dim": 16, "sliding_window": 6, "query_pre_attn_scalar": 16, "final_logit_softcapping": 3.0},
    "qwen3": {"head_dim": 16},
    "phi3": {"sliding_window": 6, "partial_rotary_factor": 1.0},
    "granite": {
        "logits_scaling": 2.0,
        "embedding_multiplier": 3.0,
        "residual_multiplier": 0.7,
        "attention_multiplier": 0.2,
    },
    "cohere": {"logit_scale": 0.3, "use_qk_norm": True},
    "stablelm": {"qk_layernorm": True},
    "phi": {"qk_layernorm": True},
    "starcoder2": {"sliding_window": 6},
    "falcon": {"new_decoder_architecture": True, "num_kv_heads": 2, "alibi": False},
    "gpt2": {"scale_attn_by_inverse_layer_idx": True, "n_inner": 48},
    "opt": {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 64},
}
COMMON: dict[str, Any] = {
    "vocab_size": kit.VOCABULARY, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64, "pad_token_id": 0,
    "bos_token_id": 1, "eos_token_id": 2,
}  # fmt: skip


def make(kind: str, **more: Any) -> Any:
    """A tiny model with random weights."""
    given = {**COMMON, **SPECIAL.get(kind, {}), **more}
    if kind in ("gpt2", "gpt_neox", "opt", "bloom", "falcon", "persimmon"):  # no grouped queries, or words of their own
        del given["num_key_value_heads"]
    if kind in ("bloom", "falcon"):
        del given["max_position_embeddings"], given["intermediate_size"]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(AutoConfig.for_model(kind, **given), attn_implementation="eager")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.eval()


@pytest.mark.parametrize("kind", sorted(FACTS))
def test_the_plain_model_is_what_transformers_computes(kind: str) -> None:
    model = make(kind)
    architecture = describe(model)
    texts = kit.texts(5, 2, 20, seed=1)
    with torch.no_grad():
        wanted = [model(torch.tensor([ids])).logits[0] for ids in texts]
    before = model.config._attn_implementation
    adapters = Adapters(model, architecture)
    with torch.no_grad():
        found = [adapters.logits(h, [(None, len(h))]) for h in kit.hidden_of(adapters, [Part(None, texts)])]
    adapters.close()
    assert model.config._attn_implementation == before
    kit.measured(f"{kind}: stream - transformers", kit.difference(wanted, found), 1e-5)
    assert len(architecture.attention_output) == len(architecture.mlp_output) == architecture.num_layers == 2
    assert architecture.num_layers == len(architecture.blocks)
    assert architecture.max_length == {"bloom": None, "falcon": 2048}.get(kind, 64)


def by_turns(kinds: list[str], turn: int) -> list[Any]:
    """Every second architecture, and those that lie furthest apart; the others are slow."""
    always = ("llama", "gpt2", "bloom")
    return [
        pytest.param(kind, id=kind, marks=[] if kind in always or place % 2 == turn else pytest.mark.slow)
        for place, kind in enumerate(kinds)
    ]


@pytest.mark.parametrize("kind", [kind for kind in by_turns(sorted(FACTS), 0) if kind.id != "falcon"])
def test_all_methods_in_the_stream_and_padded(kind: str) -> None:
    model = make(kind)
    parts = [Part(name, kit.texts(3, 2, 16, seed=i)) for i, name in enumerate([*kit.ALL, None])]
    found = []
    for options in ({}, {"padded": True}, {"exact": True}):
        adapters = kit.open_with_all(model, **options)
        hidden = kit.hidden_of(adapters, parts)
        torch.autograd.backward([h.square().mean() for h in hidden if h.requires_grad])
        grads = [g for name in kit.ALL for g in kit.gradients(adapters[name]).values()]
        found.append((hidden, grads))
        adapters.close()
    for which, limit in ((0, 2e-5), (1, 2e-5)):
        kit.measured(f"{kind}: stream - exact, {which}", kit.difference(found[0][which], found[2][which]), limit)
    kit.measured(f"{kind}: stream - padded", kit.difference(found[0][0], found[1][0]), 2e-5)
    if found[0][1]:
        kit.measured(f"{kind}: stream - padded, gradients", kit.difference(found[0][1], found[1][1]), 2e-5)


@pytest.mark.parametrize("kind", by_turns(sorted(FACTS), 1))
def test_generation_is_teacher_forcing(kind: str) -> None:
    adapters = kit.open_with_all(make(kind).double())
    asked = [Request(ids, name, 5) for name in [None, *kit.ALL] for ids in kit.texts(2, 1, 12, seed=len(name or ""))]
    for request, answer in zip(asked, generate(adapters, asked, stop_ids=()), strict=True):
        with torch.no_grad():
            (hidden,) = kit.hidden_of(adapters, [Part(request.adapter, [[*request.prompt, *answer.ids]])])
            told = adapters.logits(hidden, [(request.adapter, len(hidden))]).argmax(-1)
            told = told[len(request.prompt) - 1 : -1].tolist()
        assert told == answer.ids, request.adapter
    adapters.close()


def test_an_unknown_architecture_is_proved() -> None:
    """One that is in nobody's table: its places are found by inspection, and it runs in the stream if that is right."""
    model = make("persimmon")
    architecture = describe(model)
    assert architecture.install_attention is not None
    assert len(architecture.attention_output) == len(architecture.mlp_output) == 2
    texts = kit.texts(4, seed=1)
    with torch.no_grad():
        wanted = [model(torch.tensor([ids])).logits[0] for ids in texts]
    adapters = kit.open_with_all(model)
    assert isinstance(adapters.layout, Packed)
    with torch.no_grad():
        found = [adapters.logits(h, [(None, len(h))]) for h in kit.hidden_of(adapters, [Part(None, texts)])]
        for name in kit.ALL:
            kit.hidden_of(adapters, [Part(name, texts), Part(None, texts)])
    kit.measured("persimmon: stream - transformers", kit.difference(wanted, found), 1e-5)
    adapters.close()
    only_padded = dataclasses.replace(architecture, install_attention=None)
    with pytest.raises(UserError, match="can only run padded"):
        Adapters(model, only_padded, padded=False)
