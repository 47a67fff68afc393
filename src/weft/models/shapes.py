"""``shape: tiny``: a base of the same architecture, shrunk and with random weights, to try a whole run in seconds."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING

import torch

from weft.assets import EMBEDDED_MODELS, model_path
from weft.errors import UserError
from weft.models import gate
from weft.models.vetting import check_budget

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

WIDTH, LAYERS, HEADS, MLP = 64, 2, 4, 128
# Architectures by words in a hub id, where its config.json is not at hand.
_TYPES = (
    ("bloom", "bloom"), ("qwen3", "qwen3"), ("qwen", "qwen2"), ("mistral", "mistral"), ("gemma-?2(?!b)", "gemma2"),
    ("gemma", "gemma"), ("llama|vicuna|alpaca|yi-", "llama"), ("gpt2", "gpt2"), ("pythia|neox", "gpt_neox"),
    ("opt-", "opt"), ("falcon", "falcon"), ("roberta", "roberta"), ("bert", "bert"), ("mt5|mt0", "mt5"), ("t5", "t5"),
)  # fmt: skip


def tiny_config(source: str, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    """The model's configuration, two layers of width 64 and the tokenizer's vocabulary.

    ``source`` is a folder or an id. For an id the cached configuration counts, else the architecture in its name:
    nothing is downloaded.

    Raises:
        UserError: Neither names the architecture.
    """
    from transformers import AutoConfig

    try:
        config = gate.load_config(source, local_files_only=True)
    except UserError:
        raise
    except (OSError, ValueError):
        kind = next((kind for name, kind in _TYPES if re.search(name, source.rsplit("/", 1)[-1].lower())), None)
        if kind is None:
            raise UserError(
                f"shape: tiny: {source!r} is not on this machine and its name does not tell its architecture. Download "
                "its config.json, or name a folder."
            ) from None
        config = AutoConfig.for_model(kind)
    return _shrink(config, tokenizer)


def _shrink(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase) -> PreTrainedConfig:
    text = config.get_text_config()
    kv_heads = getattr(text, "num_key_value_heads", None)
    if kv_heads is not None:
        ratio = max(1, text.num_attention_heads // kv_heads)
        text.num_key_value_heads = max(1, HEADS // min(ratio, HEADS))
    text.hidden_size, text.num_hidden_layers, text.num_attention_heads = WIDTH, LAYERS, HEADS
    for key in ("intermediate_size", "ffn_dim", "d_ff", "n_inner", "encoder_ffn_dim", "decoder_ffn_dim"):
        if getattr(text, key, None) is not None:
            setattr(text, key, MLP)
    sizes = {"head_dim": WIDTH // HEADS, "d_kv": WIDTH // HEADS, "word_embed_proj_dim": WIDTH}
    sizes |= dict.fromkeys(("num_decoder_layers", "encoder_layers", "decoder_layers"), LAYERS)
    for key, value in sizes.items():
        computed = isinstance(getattr(type(text), key, None), property)
        if getattr(text, key, None) is not None and not computed:
            setattr(text, key, value)
    # Some types compute it from the number of layers.
    if getattr(text, "layer_types", None) and not isinstance(getattr(type(text), "layer_types", None), property):
        text.layer_types = list(text.layer_types)[:LAYERS]
    text.vocab_size = len(tokenizer)
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        setattr(text, key, getattr(tokenizer, key))
    if getattr(config, "is_encoder_decoder", False) and getattr(config, "decoder_start_token_id", None) is None:
        config.decoder_start_token_id = (
            tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
        )
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    return config


def tiny_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """The model's own tokenizer if it is on this machine, else the embedded bilingual one."""
    try:
        return gate.load_tokenizer(source, local_files_only=True)
    except UserError:
        raise
    except (OSError, ValueError):
        return gate.load_tokenizer(model_path(EMBEDDED_MODELS[-1]))


def random_model(auto_class: object, config: PreTrainedConfig) -> PreTrainedModel:
    """A model of that configuration in float32.

    Every call gives the same weights and does not change torch's generator.
    """
    check_budget(gate.empty_model(auto_class, config), 0, "the configuration for shape: tiny")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return gate.build_model(auto_class, config, torch.float32)
