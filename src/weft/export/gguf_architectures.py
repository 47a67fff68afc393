"""How llama.cpp keeps the architectures that Weft writes as GGUF: a record for each, and nothing for the others.

llama.cpp has its own name for an architecture, its own names for tensors, and for some its own layout: Llama's rows of
q and k stand in the order of the original checkpoints, where the two halves of a rotated pair lie side by side, and
Gemma's norms hold the whole factor instead of its distance from one. A setting that llama.cpp has no place for would be
dropped in silence there, so a record lists the settings that it takes.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class GgufArchitecture:
    """What llama.cpp calls an architecture, and how it keeps it.

    Attributes:
        name: the value of ``general.architecture``.
        activations: the names of the activation that it computes.
        pairs_together: whether rows of q and k lie with the two halves of a rotated pair side by side.
        norm_offset: what is added to the weights of norms.
        needs_tied: whether its output layer is always the table of embeddings.
    """

    name: str
    activations: tuple[str, ...] = ("silu",)
    _: KW_ONLY
    pairs_together: bool = False
    norm_offset: float = 0.0
    needs_tied: bool = False

    def laid_out(self, key: str, tensor: Tensor, config: PreTrainedConfig) -> Tensor:
        """A tensor of transformers' in llama.cpp's layout; of two dimensions or one, its shape stays."""
        module = key.rpartition(".")[0].rpartition(".")[2]
        if self.norm_offset and module.endswith("norm"):
            return tensor + self.norm_offset
        return pairs_together(tensor, heads_of(module, config)) if self._moved(module) else tensor

    def rows_laid_out(self, module: str, rows: Tensor, config: PreTrainedConfig) -> Tensor:
        """The rows [out, r] of a change of ``module``'s weight in llama.cpp's order."""
        return pairs_together(rows, heads_of(module, config)) if self._moved(module) else rows

    def _moved(self, module: str) -> bool:
        return self.pairs_together and module in ("q_proj", "k_proj")


ARCHITECTURES: dict[str, GgufArchitecture] = {
    "llama": GgufArchitecture("llama", pairs_together=True),
    "mistral": GgufArchitecture("llama", pairs_together=True),
    "qwen2": GgufArchitecture("qwen2"),
    "qwen3": GgufArchitecture("qwen3"),
    "gemma": GgufArchitecture("gemma", ("gelu_pytorch_tanh", "gelu_new", "gelu"), norm_offset=1.0, needs_tied=True),
}
# Settings that change what a model computes and that these architectures of llama.cpp do not know, with the values that
# change nothing.
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "partial_rotary_factor": (None, 1, 1.0),
    "use_sliding_window": (None, False),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "use_bidirectional_attention": (None, False),
}
_ROPE_TYPES = ("default", "linear", "llama3")


def check_type(kind: str) -> None:
    """Refuse a type of model that has no record.

    Raises:
        UserError: It has none.
    """
    if kind not in ARCHITECTURES:
        raise UserError(
            f"{kind} models are not written as GGUF; Weft can prove {', '.join(ARCHITECTURES)}. Export --to peft, or "
            "merge the adapter (weft merge) and serve the folder with transformers or vLLM."
        )


def architecture_of(config: PreTrainedConfig) -> GgufArchitecture:
    """The record of a model's architecture.

    Raises:
        UserError: There is none, or the model has a setting that llama.cpp would not honour.
    """
    kind = config.model_type
    check_type(kind)
    found = ARCHITECTURES[kind]
    for key, values in _NEUTRAL.items():
        value = getattr(config, key, None)
        if value not in values:
            raise UserError(_not_known(kind, key, value))
    activation = getattr(config, "hidden_activation", None) or config.hidden_act
    if activation not in found.activations:
        raise UserError(_not_known(kind, "hidden_act", activation))
    window = getattr(config, "sliding_window", None)
    layers = set(getattr(config, "layer_types", None) or ())
    if (window is not None and window < config.max_position_embeddings) or layers - {"full_attention"}:
        raise UserError(_not_known(kind, "sliding_window", window))
    rope = rope_settings(config)
    if rope["rope_type"] not in _ROPE_TYPES:
        raise UserError(_not_known(kind, "rope_type", rope["rope_type"]))
    if found.needs_tied and not config.tie_word_embeddings:
        raise UserError(_not_known(kind, "tie_word_embeddings", False))
    return found


def _not_known(kind: str, key: str, value: object) -> str:
    return (
        f"this {kind} model has {key}: {value}, which llama.cpp does not compute for {kind} models, so the GGUF would "
        "answer otherwise. Export --to peft, or merge the adapter (weft merge) and serve the folder elsewhere."
    )


def rope_settings(config: PreTrainedConfig) -> Mapping[str, Any]:
    """How positions turn queries and keys: ``rope_type``, ``rope_theta`` and what the type asks for."""
    given = dict(getattr(config, "rope_parameters", None) or {})
    return {"rope_type": "default", "rope_theta": 10000.0} | given


def heads_of(module: str, config: PreTrainedConfig) -> int:
    """The number of heads whose rows the module has."""
    return int(config.num_key_value_heads if module == "k_proj" else config.num_attention_heads)


def head_size(config: PreTrainedConfig) -> int:
    """The width of a head."""
    return int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)


def pairs_together(rows: Tensor, heads: int) -> Tensor:
    """Rows [heads * size, ...] in an order with row i and row i + size / 2 of each head side by side."""
    return rows.unflatten(0, (heads, 2, -1)).transpose(1, 2).flatten(0, 2).contiguous()


def rope_factors(config: PreTrainedConfig) -> Tensor | None:
    """By what Llama 3.1's scaling divides each frequency [head size / 2]; None for other kinds of positions.

    The paper's rule, as the configuration's four numbers say it: short waves stay, long ones are stretched by
    ``factor``, those between by what lies between.
    """
    rope = rope_settings(config)
    if rope["rope_type"] != "llama3":
        return None
    size = head_size(config)
    frequencies = 1.0 / rope["rope_theta"] ** (torch.arange(0, size, 2, dtype=torch.float64) / size)
    turns = rope["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    share = ((turns - low) / (high - low)).clamp(0.0, 1.0)
    return (1.0 / ((1.0 - share) / rope["factor"] + share)).to(torch.float32)
