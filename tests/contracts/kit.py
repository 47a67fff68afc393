"""What the contract tests share: tiny models with random weights, a configuration per method, samples.

A new method needs one line in ``SETTINGS`` only if its defaults do not fit a model of width 32; it then inherits every
contract, for they are all parametrised over ``METHODS``.
"""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
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

from weft.api import Adapters
from weft.core.adapter import Adapter, MethodConfig
from weft.core.stream import Part
from weft.data import Sample
from weft.methods import METHODS
from weft.models import describe

VOCABULARY = 97
ALL = sorted(METHODS)

# Per method, what its tests set.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    # As many ranks as the budget: what AdaLoRA's file holds when it drops some, its own tests see.
    "adalora": {"init_r": 4, "target_r": 4},
    "bitfit": {"add_missing": True},
    "prompt_tuning": {"num_virtual_tokens": 5},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "bottleneck": {"reduction_factor": 4},
    "hard_prompt": {"prompt_ids": [5, 17, 17, 40]},
    "p_tuning": {"num_virtual_tokens": 4},
    "p_tuning_v2": {"num_virtual_tokens": 3},
}
# Every method's fields of that name.
DROPOUT: dict[str, dict[str, Any]] = {
    method: found
    for method, config in METHODS.items()
    if (found := {name: 0.2 for name in config.model_fields if name.endswith("dropout")})
}
# The dropout of an encoder lies between the layers of its LSTM.
DROPOUT["p_tuning"] |= {"encoder_reparameterization_type": "LSTM"}
# Methods that do not promise to begin as the identity: they put something new before the text.
NOT_IDENTITY = {"prompt_tuning", "prefix_tuning", "hard_prompt", "p_tuning", "p_tuning_v2"}
# Methods whose effect no weights of the base can have; all others merge (``test_merge``).
NOT_MERGEABLE = {"prompt_tuning", "prefix_tuning", "hard_prompt", "p_tuning", "p_tuning_v2", "bottleneck"}
# Methods that train nothing; those that do.
UNTRAINED = {"hard_prompt"}
TRAINED = [method for method in ALL if method not in UNTRAINED]


def method_config(method: str, *, dropout: bool = False, **more: Any) -> MethodConfig:
    """The method's configuration for tests."""
    return METHODS[method](**{**SETTINGS.get(method, {}), **(DROPOUT.get(method, {}) if dropout else {}), **more})


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
        vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, n_positions=64,
        **{**special, "pad_token_id": None}, **more,
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


def randomize(adapter: Adapter, seed: int = 0, scale: float = 0.1) -> Adapter:
    """Move every parameter away from where it began: zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter))
    return adapter


def open_with_all(model: nn.Module, *, dropout: bool = False, **options: Any) -> Adapters:
    """One randomised adapter of every method, named like its method."""
    adapters = Adapters(model, describe(model), **options)
    for index, method in enumerate(ALL):
        randomize(adapters.add(method, method_config(method, dropout=dropout), seed=index), index)
    return adapters


def texts(count: int, low: int = 2, high: int = 14, seed: int = 0) -> list[list[int]]:
    """Token ids of random lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))] for _ in range(count)]


def samples(count: int, low: int = 3, high: int = 14, seed: int = 0) -> list[Sample]:
    """Texts whose second half is learned."""
    out = []
    for index, ids in enumerate(texts(count, max(low, 2), high, seed)):
        begin = max(1, len(ids) // 2)
        out.append(Sample(ids, [0.0] * begin + [1.0] * (len(ids) - begin), f"sample {index}"))
    return out


def hidden_of(adapters: Adapters, parts: list[Part]) -> list[Tensor]:
    """Hidden states of every part's own tokens (virtual rows left out), one tensor per sequence."""
    stream = adapters.stream(parts)
    hidden = adapters.forward(stream)
    return [hidden[torch.tensor(list(rows))] for rows in stream.rows]


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    """The gradients of all parameters, cleared on the way out."""
    found = {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad(set_to_none=True)
    return found


def parameters(adapter: Adapter) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def difference(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Largest difference of two lists of tensors, as a share of the largest wanted value where that is above one: the
    distance of neighbouring floats, and with it what rounding may change, grows with the values (Bloom's and Gemma's
    logits reach 30)."""
    pairs = [(x.detach().double(), y.detach().double()) for x, y in zip(found, wanted, strict=True)]
    largest = max((float(y.abs().max()) for _, y in pairs), default=0.0)
    return max((float((x - y).abs().max()) for x, y in pairs), default=0.0) / max(1.0, largest)


def sha256(tensors: Iterable[Tensor]) -> str:
    """Of all bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measured(name: str, value: float, limit: float, derived: bool = False) -> None:
    """Assert, and print the figure for whoever runs with -s. A limit that was ``derived`` (from eps and sizes, or from
    what rounding does on the spot) may be near; any other must be ten times what was seen on other machines."""
    print(f"[measured] {name}: {value:.3g} (limit {limit:.0e})")
    assert value <= limit, f"{name}: {value} > {limit}"
