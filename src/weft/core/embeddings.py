"""Typed access to the parts that a transformers model finds by itself: its embeddings, its head and its stacks."""

from __future__ import annotations

from typing import Protocol, cast

from torch import nn


class _Pretrained(Protocol):
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
