"""Rows that an encoder makes while they are trained (P-tuning, prefix tuning's projection).

Inference needs only the rows, and PEFT's file holds only them. The encoder lies beside it, so that training can go on.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeVar

import torch
from torch import Tensor, nn

from weft.base.embeddings import input_embeddings
from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.errors import UserError
from weft.methods.initial import kaiming_uniform
from weft.ops.copying import copy_into

KEY = "prompt_embeddings"
_ENCODER = "encoder."
M = TypeVar("M", bound=nn.Module)


class RowEncoder(nn.Module):
    """A network without an input, whose output is the rows [n, width]. ``features`` are its last layer's input."""

    last: nn.Linear

    def features(self, seed: int | None) -> Tensor:
        """The last layer's input, [n, last.in_features]; ``seed`` fixes dropout's choice (None: no dropout)."""
        raise NotImplementedError

    def forward(self, seed: int | None = None) -> Tensor:
        """The rows, [n, width]."""
        return self.last(self.features(seed))

    @torch.no_grad()
    def begin_at(self, rows: Tensor) -> None:
        """Choose the last layer so that the output is ``rows`` [n, width]: exact while n <= last.in_features, else the
        nearest in the sense of least squares."""
        features = self.features(None).double()
        # The smallest of the many solutions, or training would begin with huge weights.
        weight = torch.linalg.lstsq(features, rows.to(features), driver="gelsd").solution
        self.last.weight.copy_(weight.t())
        self.last.bias.zero_()


class EncodedRows(Adapter):
    """Learned rows [n, width]: parameters of their own, or the output of an encoder.

    Loaded with its encoder, the adapter answers by the rows of its file to the bit, until it is trained again.
    """

    def __init__(
        self, config: MethodConfig, name: str, rows: Tensor, encoder: RowEncoder | None, context: BuildContext
    ) -> None:
        super().__init__(config, name)
        self.row_shape = tuple(rows.shape)
        self.encoder = encoder
        self.rows: nn.Parameter | None = None
        self.loaded: Tensor | None = None
        if encoder is None:
            self.rows = nn.Parameter(rows.to(context.device, context.dtype, copy=True))
            return
        if not context.blank:
            encoder.begin_at(rows.cpu())
        encoder.to(context.device, context.dtype)

    def values(self, seed: int | None = None) -> Tensor:
        """The rows, [n, width]; ``seed`` fixes the choice of the encoder's dropout."""
        if self.rows is not None:
            return self.rows
        if self.loaded is not None and not torch.is_grad_enabled():
            return self.loaded
        assert self.encoder is not None
        with torch.enable_grad():  # without gradients an LSTM takes another kernel, which rounds differently
            rows = self.encoder(seed)
        return rows if torch.is_grad_enabled() else rows.detach()

    def begin_training(self, total_steps: int) -> None:
        self.loaded = None

    def tensors(self) -> Mapping[str, Tensor]:
        return {KEY: self.loaded if self.loaded is not None else self.values()}

    def extra_tensors(self) -> Mapping[str, Tensor]:
        return {} if self.encoder is None else {_ENCODER + n: p for n, p in self.encoder.named_parameters()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        rows = next(self.parameters()).new_empty(self.row_shape)
        encoder = self.extra_tensors() if any(key.startswith(_ENCODER) for key in tensors) else {}
        copy_into({KEY: rows, **encoder}, tensors)
        if encoder:
            self.loaded = rows
        else:
            # peft's file has lost the encoder: what loads is plain rows.
            self.encoder, self.rows = None, nn.Parameter(rows)


def linear(inputs: int, outputs: int, context: BuildContext) -> nn.Linear:
    """A linear layer on the CPU with torch's first values, uniform within 1 / sqrt(inputs), from the adapter's own
    generator."""
    return drawn(nn.Linear(inputs, outputs, dtype=context.dtype, device="meta"), inputs, context)


def drawn(module: M, inputs: int, context: BuildContext) -> M:
    """Give the parameters of a module on the meta device values, uniform within 1 / sqrt(inputs)."""
    if context.device.type == "meta":
        return module
    module = module.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.copy_(kaiming_uniform(context, *parameter.shape, inputs=inputs))
    return module


def orthogonal(layer: nn.Linear, context: BuildContext) -> nn.Linear:
    """Make the weight orthogonal times sqrt(2), the bias zero.

    Before a ReLU that keeps the size of the signal (Saxe et al. 2014, He et al. 2015), so that the inputs of a deep
    encoder learn as fast as its outputs.
    """
    if not context.blank:
        nn.init.orthogonal_(layer.weight, gain=2**0.5, generator=context.generator)
        nn.init.zeros_(layer.bias)
    return layer


def normal_rows(count: int, width: int, context: BuildContext) -> nn.Parameter:
    """The first inputs of an encoder: standard normal, [count, width]."""
    return nn.Parameter(torch.randn(count, width, generator=context.generator).to(context.dtype))


def real_tokens(context: BuildContext) -> Tensor:
    """Ids, [n] int64, that stand for text: neither special tokens nor rows that only fill the table."""
    rows = input_embeddings(context.model).weight.shape[0]
    tokenizer = context.tokenizer
    known = len(tokenizer) if tokenizer is not None and hasattr(tokenizer, "__len__") else rows
    special = set(getattr(tokenizer, "all_special_ids", ()))
    return torch.tensor([i for i in range(min(rows, known)) if i not in special])


def sampled_ids(count: int, context: BuildContext) -> Tensor:
    """Ids of real tokens, [count] int64, drawn from the adapter's own generator."""
    real = real_tokens(context)
    return real[torch.randint(len(real), (count,), generator=context.generator)]


def text_ids(text: str, key: str, context: BuildContext) -> list[int]:
    """The ids of ``text`` without special tokens.

    Raises:
        UserError: There is no tokenizer, or the text has no tokens.
    """
    if context.tokenizer is None:
        raise UserError(f"{key} needs the tokenizer: pass tokenizer= to Adapters.add.")
    special = set(getattr(context.tokenizer, "all_special_ids", ()))
    ids = [i for i in context.tokenizer(text)["input_ids"] if i not in special]
    if not ids:
        raise UserError(f"{key} {text!r} holds no tokens; write a text.")
    return ids


def repeated(ids: list[int], count: int) -> Tensor:
    """The first ``count`` ids of the text repeated, [count] int64."""
    return torch.tensor((ids * (count // len(ids) + 1))[:count])
