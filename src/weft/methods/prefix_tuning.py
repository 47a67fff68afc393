"""Prefix tuning (Li & Liang 2021): every layer gets learned keys and values that all tokens of a sequence attend to.

The parameters are [n, layers * 2 * kv_heads * head_dim], laid out as PEFT lays them out. With ``prefix_projection``
they are the output of a small network (embedding → linear → tanh → linear), which is what training moves; inference and
the saved file only need its output. Learned keys get no rotary position: they stand at positions 0 … n-1 as they are.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.core.adapter import Adapter, checked
from weft.core.architecture import Architecture
from weft.core.config import BuildContext, MethodConfig
from weft.core.route import PrefixStates
from weft.errors import UserError

KEY = "prompt_embeddings"


class PrefixTuningConfig(MethodConfig):
    """PEFT's names, and ``prefix_init``: where the first keys and values come from. ``activations`` takes those that
    the base itself computes for sampled tokens (or for ``prefix_init_text``), which trains far better than noise."""

    method: ClassVar[str] = "prefix_tuning"
    peft_type: ClassVar[str] = "PREFIX_TUNING"
    default_learning_rate: ClassVar[float] = 1e-2
    harmless_keys: ClassVar[frozenset[str]] = frozenset(
        {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "init_weights",
         "encoder_hidden_size", "prefix_projection"}
    )  # fmt: skip

    num_virtual_tokens: int = Field(default=20, gt=0)
    prefix_projection: bool = False
    encoder_hidden_size: int | None = Field(default=None, gt=0)
    prefix_init: Literal["activations", "random", "zero"] = "activations"
    prefix_init_text: str | None = None

    def build(self, name: str, context: BuildContext) -> Adapter:
        return PrefixTuning(self, name, context)

    def to_peft(self, architecture: Architecture) -> dict[str, Any]:
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_layers": architecture.num_layers,
            # 2 makes PEFT give the keys to the decoder (see weft.core.seq2seq).
            "num_transformer_submodules": 2 if architecture.task == "seq2seq" else 1,
            # PEFT's own reading under grouped-query attention: the width and heads of keys, not of queries.
            "num_attention_heads": architecture.num_kv_heads,
            "token_dim": architecture.num_kv_heads * architecture.head_dim,
            "encoder_hidden_size": self.encoder_hidden_size or architecture.hidden_size,
            "prefix_projection": self.prefix_projection,
        }

    @classmethod
    def from_peft(cls, entries: dict[str, Any], keys: list[str]) -> MethodConfig:
        # PEFT's file holds the projected prefix and has lost the encoder: what loads is a plain prefix.
        return super().from_peft({**entries, "prefix_projection": False, "encoder_hidden_size": None}, keys)


class PrefixTuning(Adapter):
    """Learned keys and values for every layer."""

    def __init__(self, config: PrefixTuningConfig, name: str, context: BuildContext) -> None:
        super().__init__(config, name)
        shape = context.architecture
        self.num_prefix_tokens = config.num_virtual_tokens
        self.shape = (config.num_virtual_tokens, 2 * shape.num_layers, shape.num_kv_heads, shape.head_dim)
        width = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
        self.encoder: nn.Sequential | None = None
        if not config.prefix_projection:
            self.prefix = nn.Parameter(_initial_prefix(config, context).to(context.device, context.dtype, copy=True))
            return
        hidden = config.encoder_hidden_size or shape.hidden_size
        self.prefix = nn.Parameter(context.normal(config.num_virtual_tokens, shape.hidden_size, std=1.0))
        self.encoder = nn.Sequential(nn.Linear(shape.hidden_size, hidden), nn.Tanh(), nn.Linear(hidden, width))
        self.encoder.to(context.device, context.dtype)
        for layer in self.encoder:
            if isinstance(layer, nn.Linear):
                layer.weight.data.copy_(context.normal(*layer.weight.shape, std=1 / math.sqrt(layer.in_features)))
                layer.bias.data.zero_()

    def flat(self) -> Tensor:
        """[n, layers * 2 * kv_heads * head_dim], as PEFT stores it."""
        return self.prefix if self.encoder is None else self.encoder(self.prefix)

    def prefix_states(self) -> PrefixStates:
        by_layer = self.flat().view(self.shape).permute(1, 2, 0, 3)
        return [(by_layer[2 * i], by_layer[2 * i + 1]) for i in range(len(by_layer) // 2)]

    def tensors(self) -> Mapping[str, Tensor]:
        return {KEY: self.flat()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        # A file holds what the encoder gave, not the encoder: what loads is a plain prefix.
        flat = checked(tensors, KEY, (self.shape[0], math.prod(self.shape[1:])))
        self.encoder = None
        self.prefix = nn.Parameter(flat.to(self.prefix.device, self.prefix.dtype, copy=True))


def _initial_prefix(config: PrefixTuningConfig, context: BuildContext) -> Tensor:
    shape, n = context.architecture, config.num_virtual_tokens
    width = 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim
    if context.blank or config.prefix_init == "zero":
        return context.zeros(n, width)
    if config.prefix_init == "random":
        return context.normal(n, width, std=0.02)
    assert context.keys_values is not None
    if config.prefix_init_text:
        if context.tokenizer is None:
            raise UserError("prefix_init_text needs the tokenizer: pass tokenizer= to Adapters.add.")
        found = context.tokenizer(config.prefix_init_text)["input_ids"]
        ids = torch.tensor((found * (n // len(found) + 1))[:n])
    else:
        vocabulary = context.model.get_input_embeddings().weight.shape[0]  # type: ignore[operator]
        ids = torch.randint(vocabulary, (n,), generator=context.generator)
    states = [side for pair in context.keys_values(ids) for side in pair]
    return torch.stack(states, dim=1).permute(2, 1, 0, 3).reshape(n, width)
