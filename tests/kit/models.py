"""Tiny models with random weights."""

from __future__ import annotations

from typing import Any

import torch
from transformers import (
    AutoModelForCausalLM,
    BloomConfig,
    FalconConfig,
    GemmaConfig,
    GPT2Config,
    GPTNeoXConfig,
    LlamaConfig,
    MistralConfig,
    OPTConfig,
    PretrainedConfig,
    Qwen2Config,
)

VOCABULARY = 97


def model_config(kind: str, **more: Any) -> PretrainedConfig:
    """A tiny configuration: Llama, Qwen2 and Mistral with grouped-query attention, GPT-2 with Conv1D, BLOOM with ALiBi,
    Gemma with heads wider than hidden / heads and tied, scaled embeddings, GPT-NeoX with parallel residuals, OPT with
    embeddings narrower than its blocks."""
    special = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
    if kind == "llama":
        sizes = {"hidden_size": 32, "intermediate_size": 48, **more}
        return LlamaConfig(
            vocab_size=VOCABULARY, num_hidden_layers=3, num_attention_heads=4, num_key_value_heads=2,
            max_position_embeddings=128, **special, **sizes,
        )  # fmt: skip
    if kind == "qwen2":
        return Qwen2Config(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=2, max_position_embeddings=128, **special, **more,
        )  # fmt: skip
    if kind == "mistral":
        sizes = {"hidden_size": 32, "intermediate_size": 48, "num_key_value_heads": 2, "sliding_window": None, **more}
        return MistralConfig(
            vocab_size=VOCABULARY, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=128, **special,
            **sizes,
        )  # fmt: skip
    if kind == "gemma":
        return GemmaConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=1, head_dim=16, max_position_embeddings=128, **special, **more,
        )  # fmt: skip
    if kind == "gpt_neox":
        return GPTNeoXConfig(
            vocab_size=VOCABULARY, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=128, **special, **more,
        )  # fmt: skip
    if kind == "opt":
        return OPTConfig(
            vocab_size=VOCABULARY, hidden_size=32, ffn_dim=48, num_hidden_layers=2, num_attention_heads=4,
            max_position_embeddings=64, **special, **{"word_embed_proj_dim": 24, **more},
        )  # fmt: skip
    if kind == "bloom":
        return BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=3, n_head=4, **special, **more)
    if kind == "falcon":
        return FalconConfig(
            vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, alibi=False,
            new_decoder_architecture=True, num_kv_heads=2, **special, **more,
        )  # fmt: skip
    assert kind == "gpt2"
    return GPT2Config(
        vocab_size=VOCABULARY, n_layer=2, n_head=4, n_positions=64,
        **{"n_embd": 32, **special, "pad_token_id": None, **more},
    )  # fmt: skip


def make_model(kind: str, dtype: torch.dtype = torch.float32, **more: Any) -> Any:
    """A model with random weights, the same at every call; biases and norms are random too, so that they matter."""
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(model_config(kind, **more))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            noise = torch.randn(parameter.shape) * 0.1
            parameter.add_(noise if parameter.ndim == 1 or "embed" not in name else 4 * noise)
    return model.to(dtype).eval()
