"""Typed access to what a transformers model says of itself: its embeddings, head, stacks and configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol, cast

from torch import nn

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


class _Pretrained(Protocol):
    config: PreTrainedConfig

    def get_input_embeddings(self) -> nn.Embedding: ...

    def get_output_embeddings(self) -> nn.Linear | None: ...

    def get_encoder(self) -> nn.Module: ...

    def get_decoder(self) -> nn.Module: ...


def input_embeddings(model: nn.Module) -> nn.Embedding:
    """The table of token embeddings."""
    return cast(_Pretrained, model).get_input_embeddings()


def output_head(model: nn.Module) -> nn.Linear | None:
    """The output layer, a linear or its kin; None if the model has none."""
    return cast(_Pretrained, model).get_output_embeddings()


def stacks(model: nn.Module) -> tuple[nn.Module, nn.Module]:
    """The encoder and the decoder of an encoder-decoder."""
    pretrained = cast(_Pretrained, model)
    return pretrained.get_encoder(), pretrained.get_decoder()


def config_of(model: nn.Module) -> PreTrainedConfig:
    """The model's configuration."""
    return cast(_Pretrained, model).config
