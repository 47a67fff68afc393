"""``shape: tiny``: every architecture shrunk, without a download."""

from __future__ import annotations

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig

from weft.errors import UserError
from weft.models import describe
from weft.models.shapes import random_model, tiny_config, tiny_tokenizer

IDS = {
    "Langboat/bloom-1b4-zh": "bloom",
    "modelscope/Llama-2-7b-ms": "llama",
    "Qwen/Qwen2.5-0.5B": "qwen2",
    "Qwen/Qwen3-0.6B": "qwen3",
    "google/gemma-2b": "gemma",
    "google/gemma-2-2b": "gemma2",
    "mistralai/Mistral-7B-v0.1": "mistral",
    "openai-community/gpt2": "gpt2",
    "EleutherAI/pythia-70m": "gpt_neox",
    "facebook/opt-125m": "opt",
    "tiiuae/falcon-7b": "falcon",
}


@pytest.mark.parametrize(("name", "kind"), IDS.items())
def test_ids_are_known_by_their_names(name: str, kind: str) -> None:
    tokenizer = tiny_tokenizer(name)
    config = tiny_config(name, tokenizer)
    assert config.model_type == kind
    model = random_model(AutoModelForCausalLM, config)
    shape = describe(model)
    assert (shape.num_layers, shape.hidden_size, shape.num_heads) == (2, 64, 4)
    with torch.no_grad():
        assert model(torch.tensor([[1, 2, 3]])).logits.shape == (1, 3, len(tokenizer))


def test_a_folders_own_configuration_is_shrunk(tmp_path) -> None:
    heads = {"num_attention_heads": 16, "num_key_value_heads": 4}
    LlamaConfig(hidden_size=512, rms_norm_eps=0.25, **heads).save_pretrained(tmp_path)
    config = tiny_config(str(tmp_path), tiny_tokenizer("none/such"))
    assert (config.hidden_size, config.num_attention_heads, config.num_key_value_heads) == (64, 4, 1)
    assert config.rms_norm_eps == 0.25


def test_the_weights_are_the_same_every_time_and_torchs_generator_is_left_alone() -> None:
    tokenizer = tiny_tokenizer("x/llama")
    before = torch.get_rng_state()
    one, two = (random_model(AutoModelForCausalLM, tiny_config("x/llama", tokenizer)) for _ in range(2))
    assert torch.equal(torch.get_rng_state(), before)
    assert all(torch.equal(a, b) for a, b in zip(one.parameters(), two.parameters(), strict=True))


def test_a_name_that_says_nothing_is_refused() -> None:
    with pytest.raises(UserError, match="its name does not tell its architecture"):
        tiny_config("owner/mystery", tiny_tokenizer("owner/mystery"))
