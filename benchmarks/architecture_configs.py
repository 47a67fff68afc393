"""Tiny configurations of every causal language model that transformers has, and variants that change its mathematics.

A configuration is derived from the fields of its class: sizes by their names (``SIZES``), windows short enough for the
texts, the layers of every kind that the class' own default mixes. What a class needs besides stands in ``EXCEPTIONS``,
each with its reason; ``VARIANTS`` are named ``type:variant``.
"""

from __future__ import annotations

import dataclasses
from typing import Any

from benchmarks.architecture_table import DROP, EXCEPTIONS, NOT_TINY, VARIANTS, Override

VOCABULARY = 320
# The longest is longer than every window and every original_max_position_embeddings of these configurations.
LENGTHS = (1, 3, 9, 20, 40)
POSITIONS = 128
WINDOW = 6

_WIDTH = ("hidden_size", "d_model", "n_embd", "lru_width", "emb_dim", "d_embed", "embedding_dim", "dim_model")
_INNER = ("intermediate_size", "ffn_dim", "decoder_ffn_dim", "encoder_ffn_dim", "n_inner", "ffn_hidden_size", "dff",
          "dim_ff", "d_inner", "feed_forward_size", "intermediate_size_mlp", "dense_intermediate_size",
          "prefix_dense_intermediate_size")  # fmt: skip
_LAYERS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers", "encoder_layers",
           "num_decoder_layers", "num_encoder_layers")  # fmt: skip
_HEADS = ("num_attention_heads", "n_head", "n_heads", "num_heads", "attention_heads", "decoder_attention_heads",
          "encoder_attention_heads", "num_decoder_attention_heads", "num_encoder_attention_heads",
          "swa_num_attention_heads", "linear_num_heads", "linear_num_value_heads")  # fmt: skip
_KV_HEADS = ("num_key_value_heads", "num_kv_heads", "swa_num_key_value_heads", "linear_num_key_heads",
             "num_global_key_value_heads")  # fmt: skip
_HEAD_DIM = ("head_dim", "swa_head_dim", "v_head_dim", "qk_nope_head_dim", "linear_key_head_dim", "dim_head",
             "linear_value_head_dim", "linear_head_dim", "global_head_dim", "kv_channels", "d_head", "index_head_dim",
             "attention_head_size", "swa_v_head_dim", "indexer_head_dim")  # fmt: skip
_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
_EXPERT_WIDTH = ("moe_intermediate_size", "shared_expert_intermediate_size", "shared_intermediate_size",
                 "expert_ffn_hidden_size", "moe_shared_expert_intermediate_size", "shared_experts_intermediate_size",
                 )  # fmt: skip
_CHOSEN = ("num_experts_per_tok", "moe_topk", "moe_k", "top_k_experts", "index_topk_blocks",
           "centroid_intermediate_top_k")  # fmt: skip
_POSITIONS = ("max_position_embeddings", "n_positions", "max_seq_len", "n_ctx", "context_length", "rel_extent",
              "max_source_positions", "max_target_positions", "relative_max_distance", "position_bias_max_distance",
              )  # fmt: skip
_ONE = ("n_group", "topk_group", "n_shared_experts", "num_shared_experts", "first_k_dense_replace", "mamba_n_groups",
        "mamba_ngroups", "n_groups", "num_mem_blocks", "moe_num_shared_experts")  # fmt: skip
_EIGHT = ("qk_rope_head_dim", "state_size", "time_step_rank", "mamba_n_heads", "mamba_d_state", "mamba_dt_rank",
          "ssm_state_size", "chunk_size", "mamba_chunk_size", "rotary_dim", "laurel_rank", "mamba_num_heads",
          "adapter_rank", "gated_norm_rank", "loop_gate_rank", "d_rel", "block_size", "attention_chunk_size",
          "index_topk", "hc_lowrank", "num_buckets", "position_bias_num_buckets")  # fmt: skip
_SIXTEEN = ("kv_lora_rank", "o_lora_rank", "mamba_d_head", "mamba_headdim", "mamba_head_dim", "num_centroids",
            "hidden_size_per_layer_input", "router_hidden_size", "block_multiple_of")  # fmt: skip

SIZES: dict[str, int] = {
    **dict.fromkeys(_WIDTH, 64),
    **dict.fromkeys(_INNER, 96),
    **dict.fromkeys(_LAYERS, 2),
    **dict.fromkeys(_HEADS, 4),
    **dict.fromkeys(_KV_HEADS, 2),
    **dict.fromkeys(_HEAD_DIM, 16),
    **dict.fromkeys(_EXPERTS, 4),
    **dict.fromkeys(_EXPERT_WIDTH, 48),
    **dict.fromkeys(_CHOSEN, 2),
    **dict.fromkeys(_POSITIONS, POSITIONS),
    **dict.fromkeys(_ONE, 1),
    **dict.fromkeys(_EIGHT, 8),
    **dict.fromkeys(_SIXTEEN, 16),
    "q_lora_rank": 24,
    "mamba_d_ssm": 128,
    "index_n_heads": 2,
    "o_groups": 2,
    "vocab_size": VOCABULARY,
    "vocab_size_per_layer_input": VOCABULARY,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": 2,
}
# Fields with these names are windows, if the class' default has one.
_WINDOWS = ("sliding_window", "window_size", "attention_window_size", "local_attention", "sliding_window_size")
_KINDS = ("layer_types", "mlp_layer_types")


def types() -> list[str]:
    """Every model type that ``AutoModelForCausalLM`` maps, in alphabetical order."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def names() -> list[str]:
    """Every configuration: each type's own, then its variants."""
    known = set(types())
    strange = {name.split(":")[0] for name in (*VARIANTS, *EXCEPTIONS, *NOT_TINY)} - known
    # Types of the table that an older transformers has not are left out; a typo would be seen in the matrix's count.
    found = [name for name in (*known, *VARIANTS) if name.split(":")[0] not in strange]
    return sorted(found)


def _default(cls: Any) -> Any:
    try:
        return cls()
    except Exception:  # some classes have no valid default: their kinds of layer stand in EXCEPTIONS
        return None


def _derived(cls: Any) -> Override:
    """Overrides from the names of the class' fields and the values of its default."""
    fields = {field.name for field in dataclasses.fields(cls)}
    found: Override = {name: size for name, size in SIZES.items() if name in fields}
    default = _default(cls)
    given = vars(default) if default is not None else {}
    for name in _WINDOWS:
        if name in fields and given.get(name):
            found[name] = WINDOW
    kinds = {name: list(dict.fromkeys(given[name])) for name in _KINDS if name in fields and given.get(name)}
    layers = max([2, *(len(values) for values in kinds.values())])
    for name, values in kinds.items():
        # In turn, and turned the other way: a dense MLP is not always beside the first kind of attention.
        found[name] = [values[i % len(values)] for i in range(layers)]
    if kinds and "num_hidden_layers" in fields:
        found["num_hidden_layers"] = layers
    for alias, real in (cls.attribute_map or {}).items():
        if alias in found and real in found and alias != real:
            del found[alias]
    return found


def make_config(name: str) -> Any:
    """The configuration called ``name``: a type, or ``type:variant``.

    Raises:
        Exception: whatever the class raises at values that it does not take.
    """
    from transformers import CONFIG_MAPPING

    kind = name.split(":")[0]
    cls = CONFIG_MAPPING[kind]
    return _make(cls, {**EXCEPTIONS.get(kind, ({}, ""))[0], **VARIANTS.get(name, {})})


def _make(cls: Any, more: Override) -> Any:
    from transformers import CONFIG_MAPPING

    given = _derived(cls)
    for name, sub in (cls.sub_configs or {}).items():
        spec = (cls.sub_configs_defaults or {}).get(name)
        kind = getattr(spec, "model_type", None)
        if kind or name in more:
            own = {**EXCEPTIONS.get(kind or "", ({}, ""))[0], **more.get(name, {})}
            given[name] = _make(CONFIG_MAPPING.get(kind or "", sub), own).to_dict()
    given.update({key: value for key, value in more.items() if key not in (cls.sub_configs or {})})
    return cls(**{key: value for key, value in given.items() if value is not DROP})
