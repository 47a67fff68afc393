"""Tiny mixtures of experts: what their tests share."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tests import kit
from torch import Tensor
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from weft.api import Adapters
from weft.core.stream import Part
from weft.models import describe

# Whatever a type calls its sizes; it is given those that it knows.
_SIZES: dict[str, Any] = {
    "vocab_size": kit.VOCABULARY, "hidden_size": 32, "intermediate_size": 40, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128,
    "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4, "moe_num_experts": 4, "num_experts_per_tok": 2,
    "moe_k": 2, "moe_topk": 2, "moe_intermediate_size": 24, "shared_expert_intermediate_size": 24,
    "n_shared_experts": 1, "num_shared_experts": 1, "moe_num_shared_experts": 1, "n_group": 1, "topk_group": 1,
    "first_k_dense_replace": 1, "moe_layer_start_index": 1, "kv_lora_rank": 8, "q_lora_rank": 12,
    "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8, "pad_token_id": 0, "bos_token_id": 1,
    "eos_token_id": 2,
}  # fmt: skip
_SPECIAL: dict[str, dict[str, Any]] = {
    "deepseek_v3": {"num_key_value_heads": 4},
    "minimax_m2": {"rotary_dim": 4},
    "gpt_oss": {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 6},
    "jamba": {
        "attn_layer_period": 2, "attn_layer_offset": 1, "expert_layer_period": 2, "expert_layer_offset": 1,
        "use_mamba_kernels": False, "mamba_d_state": 4, "mamba_dt_rank": 4,
    },
}  # fmt: skip
# Bases that PEFT takes for one of its older kinds (Mixtral, Qwen2-MoE), and others; with shared experts, biases,
# transposed matrices, a router that is an nn.Linear by birth, attention in some layers only.
TYPES = (
    "deepseek_v3", "dots1", "ernie4_5_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe", "hunyuan_v1_moe",
    "jamba", "minimax_m2", "mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe",
)  # fmt: skip
EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
TEXTS = [[5, 6, 7, 8, 9, 11], [3, 4, 5], [60, 61, 62, 63]]


def moe_config(kind: str, **more: Any) -> Any:
    """A tiny configuration of the type."""
    cls = CONFIG_MAPPING[kind]
    known = {field.name for field in dataclasses.fields(cls)} if dataclasses.is_dataclass(cls) else set(_SIZES)
    # An alias and the name it stands for are one setting.
    known -= {alias for alias, name in (cls.attribute_map or {}).items() if {alias, name} <= known & _SIZES.keys()}
    return cls(**{k: v for k, v in _SIZES.items() if k in known} | _SPECIAL.get(kind, {}) | more)


def make_moe(kind: str, dtype: torch.dtype = torch.float64, **more: Any) -> Any:
    """A model with random weights, the same at every call. In double precision, in which transformers' grouped products
    cannot compute, its experts are called one by one."""
    torch.manual_seed(0)
    own = {"experts_implementation": "eager"} if dtype == torch.float64 else {}
    model = AutoModelForCausalLM.from_config(moe_config(kind, **more), **own)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.1)
    return model.to(dtype).eval()


def open_moe(kind: str, dtype: torch.dtype = torch.float64, **more: Any) -> Adapters:
    """The same, open for adapters."""
    model = make_moe(kind, dtype)
    return Adapters(model, describe(model), **more)


def our_logits(adapters: Adapters, name: str | None) -> list[Tensor]:
    """Of all texts, in one pass."""
    return [adapters.logits(hidden, [(name, len(hidden))]) for hidden in kit.hidden_of(adapters, [Part(name, TEXTS)])]


def their_logits(model: Any) -> list[Tensor]:
    """Of each text by itself."""
    return [model(input_ids=torch.tensor([text])).logits[0] for text in TEXTS]


def their_gradients(model: Any) -> dict[str, Tensor | None]:
    """peft's gradients by the names of its file."""
    return {n.replace(".default", ""): p.grad for n, p in model.named_parameters() if p.requires_grad}


def largest(a: list[Tensor], b: list[Tensor]) -> float:
    """Largest difference of two lists of tensors."""
    return kit.difference([x.detach() for x in a], [x.detach() for x in b])
