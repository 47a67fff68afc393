"""Prefix tuning (Li & Liang 2021): every layer gets learned keys and values that all tokens of a sequence attend to.

The rows are [n, layers * 2 * kv_heads * head_dim], in PEFT's layout. With ``prefix_projection`` they are the output of
a small network, ``P_i = MLP(P'_i)`` (embedding → linear → tanh → linear). Training changes the network; inference needs
only its output. Learned keys get no rotary position: they stand at positions 0 … n-1 as they are.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar, Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from weft.base.embeddings import config_of
from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.architecture import Architecture
from weft.core.route import PrefixStates
from weft.errors import UserError
from weft.libraries import cache_name
from weft.methods.encoder import EncodedRows, RowEncoder, linear, normal_rows, repeated, sampled_ids, text_ids


class DeepPromptConfig(MethodConfig):
    """Settings with PEFT's names, and the source of the first keys and values."""

    peft_type: ClassVar[str] = "PREFIX_TUNING"
    default_learning_rate: ClassVar[float] = 1e-2
    small_learning_rate: ClassVar[float | None] = 0.2
    harmless_keys: ClassVar[frozenset[str]] = frozenset(
        {"token_dim", "num_transformer_submodules", "num_attention_heads", "num_layers", "init_weights",
         "encoder_hidden_size", "prefix_projection"}
    )  # fmt: skip

    not_in_peft: ClassVar[frozenset[str]] = frozenset({"prefix_init", "prefix_init_text", "encoder_hidden_size"})
    peft_defaults: ClassVar[Mapping[str, object]] = {"num_virtual_tokens": None}

    num_virtual_tokens: int = Field(20, gt=0, description="learned keys and values in each layer")
    prefix_init: Literal["activations", "random", "zero"] = Field(
        "activations",
        description="where the first ones come from; `activations`: what the base computes for sampled tokens",
    )
    prefix_init_text: str | None = Field(None, description="with `activations`: compute them for this text instead")

    @model_validator(mode="after")
    def _text_goes_with_activations(self) -> DeepPromptConfig:
        if self.prefix_init_text is not None and self.prefix_init != "activations":
            raise ValueError("prefix_init_text is only read with prefix_init: activations")
        return self

    def encoder(self, context: BuildContext) -> RowEncoder | None:
        """The network that makes the rows; None if they are parameters themselves."""
        return None

    def build(self, name: str, context: BuildContext) -> Adapter:
        _check_cache(self.method, context)
        _check_places(self.method, context)
        return DeepPrompt(self, name, context)

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        return {
            "num_virtual_tokens": self.num_virtual_tokens,
            "num_layers": architecture.num_layers,
            # 2 makes PEFT give the keys to the decoder (see weft.layouts.encoder_decoder).
            "num_transformer_submodules": architecture.stacks,
            # PEFT's own reading under grouped-query attention: the width and heads of keys, not of queries.
            "num_attention_heads": architecture.num_kv_heads,
            "token_dim": architecture.num_kv_heads * architecture.head_dim,
            "encoder_hidden_size": architecture.hidden_size,
            "prefix_projection": False,
        }


class PrefixTuningConfig(DeepPromptConfig):
    """The settings of ``DeepPromptConfig``, and the reparameterisation.

    Its network learns at an eightieth of the default learning rate (measured on tiny-llama, width 128: 68 % exact at
    0.004 to 0.006, 64 % at 0.002, 40 % at 0.02, 0 % at 0.06).
    """

    method: ClassVar[str] = "prefix_tuning"

    prefix_projection: bool = Field(False, description="learn them through a network")
    encoder_hidden_size: int | None = Field(None, gt=0, description="width of that network")

    def encoder(self, context: BuildContext) -> RowEncoder | None:
        return PrefixEncoder(self, context) if self.prefix_projection else None

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        entries = super().to_peft(architecture)
        hidden = self.encoder_hidden_size or architecture.hidden_size
        return {**entries, "encoder_hidden_size": hidden, "prefix_projection": self.prefix_projection}

    @classmethod
    def from_peft(cls, entries: dict[str, object], keys: list[str]) -> MethodConfig:
        # PEFT's file holds the projected prefix but not the encoder, so it loads as a plain prefix.
        return super().from_peft({**entries, "prefix_projection": False, "encoder_hidden_size": None}, keys)


class PrefixEncoder(RowEncoder):
    """The network embedding → linear → tanh → linear."""

    def __init__(self, config: PrefixTuningConfig, context: BuildContext) -> None:
        super().__init__()
        width = context.architecture.hidden_size
        hidden = config.encoder_hidden_size or width
        self.embedding = normal_rows(config.num_virtual_tokens, width, context)
        self.first = linear(width, hidden, context)
        self.last = linear(hidden, _row_width(context.architecture), context)

    def features(self, seed: int | None) -> Tensor:
        return torch.tanh(self.first(self.embedding))


class DeepPrompt(EncodedRows):
    """Learned keys and values for every layer."""

    def __init__(self, config: DeepPromptConfig, name: str, context: BuildContext) -> None:
        super().__init__(config, name, _initial_prefix(config, context), config.encoder(context), context)
        shape = context.architecture
        self.num_prefix_tokens = config.num_virtual_tokens
        self.shape = (config.num_virtual_tokens, 2 * shape.num_layers, shape.num_kv_heads, shape.head_dim)

    def default_learning_rate(self, parameter: str, writes: bool = True) -> float:
        rate = super().default_learning_rate(parameter, writes)
        # Each weight of the network moves all keys and values.
        return rate / 80 if self.encoder is not None and not parameter.startswith("head.") else rate

    def prefix_states(self) -> PrefixStates:
        by_layer = self.values().view(self.shape).permute(1, 2, 0, 3)
        return [(by_layer[2 * i], by_layer[2 * i + 1]) for i in range(len(by_layer) // 2)]


def _row_width(shape: Architecture) -> int:
    return 2 * shape.num_layers * shape.num_kv_heads * shape.head_dim


def _check_cache(method: str, context: BuildContext) -> None:
    """Refuse a model in which a layer cannot attend to keys and values before a sequence's own.

    Raises:
        UserError: A layer cannot; the message says why.
    """
    config = config_of(context.model)
    body = context.model.base_model
    assert isinstance(body, nn.Module)
    reason = None
    kinds = {str(kind) for kind in getattr(config, "layer_types", None) or ()}
    other = sorted(kind for kind in kinds if not kind.endswith("attention") or kind.startswith("linear"))
    no_cache = cache_name(body.forward) is None or not context.architecture.writes
    if context.architecture.install_attention is None and no_cache:
        reason = "takes no cache of keys and values, which is where learned ones go in"
    if other:
        reason = f"has layers without keys and values ({', '.join(other)})"
    elif getattr(config, "kv_lora_rank", None):
        reason = "compresses its keys and values (multi-head latent attention)"
    elif getattr(config, "num_kv_shared_layers", 0):
        reason = "has layers that share the keys and values of others"
    if reason:
        raise UserError(
            f"{method}: this {context.architecture.model_type} model {reason}. Take prompt_tuning or lora instead."
        )


def _check_places(method: str, context: BuildContext) -> None:
    """Refuse a model whose keys and values of a short text differ in number or size from the learned ones.

    Raises:
        UserError: They differ (layers that attend twice or not at all, values of another width than keys).
    """
    shape = context.architecture
    if context.keys_values is None or context.device.type == "meta":
        return
    try:
        pairs = context.keys_values(torch.tensor([1, 2, 3]))
    except UserError as error:
        raise UserError(f"{method}: {error} Take another method.") from None
    expected = (shape.num_kv_heads, 3, shape.head_dim)
    wrong = sorted({tuple(side.shape) for pair in pairs for side in pair} - {expected})
    if len(pairs) != shape.num_layers or wrong:
        found = f"keys or values {wrong[0]} where {expected} are expected" if wrong else f"{len(pairs)} pairs of them"
        raise UserError(
            f"{method}: the {shape.num_layers} layers of this {shape.model_type} model give {found}, so learned ones "
            "have no place before them. Take another method."
        )


def _initial_prefix(config: DeepPromptConfig, context: BuildContext) -> Tensor:
    n, width = config.num_virtual_tokens, _row_width(context.architecture)
    if context.blank or config.prefix_init == "zero":
        return context.zeros(n, width)
    if config.prefix_init == "random":
        return context.normal(n, width, std=0.02)
    assert context.keys_values is not None
    if config.prefix_init_text:
        ids = repeated(text_ids(config.prefix_init_text, "prefix_init_text", context), n)
    else:
        ids = sampled_ids(n, context)
    states = [side for pair in context.keys_values(ids) for side in pair]
    return torch.stack(states, dim=1).permute(2, 1, 0, 3).reshape(n, width)
