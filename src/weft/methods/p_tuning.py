"""P-tuning (Liu et al. 2021, "GPT understands, too"): virtual tokens that an encoder makes,
``h_i = MLP([LSTM→(h_0 … h_i) : LSTM←(h_i … h_n)])`` of learned inputs h [n, d], or an MLP of each h_i alone. Only
training needs the encoder: its last output is a soft prompt like any other."""

from __future__ import annotations

import itertools
from typing import ClassVar, Literal, cast

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.architecture import Architecture
from weft.methods.encoder import RowEncoder, drawn, linear, normal_rows, orthogonal, sampled_ids
from weft.methods.prompt_tuning import PromptTuning, SoftPromptConfig, embedded, embedding_width
from weft.ops.seeds import stable_seed


class PTuningConfig(SoftPromptConfig):
    """Settings with PEFT's names. Training begins at embeddings of sampled vocabulary."""

    method: ClassVar[str] = "p_tuning"
    peft_type: ClassVar[str] = "P_TUNING"
    default_learning_rate: ClassVar[float] = 1e-3
    small_learning_rate: ClassVar[float | None] = 1e-3

    not_in_peft: ClassVar[frozenset[str]] = SoftPromptConfig.not_in_peft | {"encoder_hidden_size"}

    num_virtual_tokens: int = Field(50, gt=0, description="learned tokens")
    encoder_reparameterization_type: Literal["MLP", "LSTM"] = Field(
        "MLP", description="network that the rows come from"
    )
    encoder_hidden_size: int | None = Field(
        None, gt=0, description="its width; default: the rows', for the MLP twice that"
    )
    encoder_num_layers: int = Field(2, gt=0, description="layers of the LSTM")
    encoder_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout between the LSTM's layers")

    @model_validator(mode="after")
    def _what_is_the_lstms(self) -> PTuningConfig:
        if self.encoder_reparameterization_type == "MLP" and self.encoder_num_layers != 2:
            fixed = "encoder_num_layers: the MLP has a fixed number of layers"
            raise ValueError(f"{fixed}; take encoder_reparameterization_type: LSTM")
        if self.encoder_dropout and (self.encoder_reparameterization_type == "MLP" or self.encoder_num_layers < 2):
            raise ValueError("encoder_dropout acts between the layers of an LSTM; there are none here")
        return self

    def build(self, name: str, context: BuildContext) -> Adapter:
        n, width = self.num_virtual_tokens, embedding_width(context)
        rows = context.zeros(n, width) if context.blank else embedded(sampled_ids(n, context), context)
        return PTuning(self, name, rows, PromptEncoder(self, width, context), context)

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        return {
            **super().to_peft(architecture),
            "num_virtual_tokens": self.num_virtual_tokens,
            "encoder_reparameterization_type": self.encoder_reparameterization_type,
            "encoder_hidden_size": self.hidden(architecture),
            "encoder_num_layers": self.encoder_num_layers,
            "encoder_dropout": self.encoder_dropout,
        }

    def hidden(self, architecture: Architecture) -> int:
        """The encoder's width."""
        double = 2 if self.encoder_reparameterization_type == "MLP" else 1
        return self.encoder_hidden_size or double * (architecture.embedding_size or architecture.hidden_size)

    @classmethod
    def from_peft(cls, entries: dict[str, object], keys: list[str]) -> MethodConfig:
        # PEFT's file holds the encoder's output but not the encoder, so it loads as a plain soft prompt.
        return super().from_peft({k: v for k, v in entries.items() if not k.startswith("encoder_")}, keys)


class PTuning(PromptTuning):
    """A soft prompt that an encoder makes."""

    def learning_rate_factor(self, parameter: str) -> float:
        # Adam moves every number by the rate. An input moves one virtual token, a weight of the encoder moves all.
        return 66.0 if parameter == "encoder.embedding" else 1.0


class PromptEncoder(RowEncoder):
    """PEFT's encoder: two-way LSTM layers and an MLP of two linear layers, or an MLP of three, all with ReLU."""

    def __init__(self, config: PTuningConfig, width: int, context: BuildContext) -> None:
        super().__init__()
        hidden = config.hidden(context.architecture)
        self.dropout = config.encoder_dropout
        self.embedding = normal_rows(config.num_virtual_tokens, width, context)
        self.lstm = nn.ModuleList()
        if config.encoder_reparameterization_type == "LSTM":
            for index in range(config.encoder_num_layers):
                # One by one, so that the dropout between them can be drawn from our seed.
                layer = nn.LSTM(
                    2 * hidden if index else width, hidden, bidirectional=True, dtype=context.dtype, device="meta"
                )
                self.lstm.append(drawn(layer, hidden, context))
            sizes = [2 * hidden, 2 * hidden]
        else:
            sizes = [width, hidden, hidden]
        self.mlp = nn.ModuleList(orthogonal(linear(a, b, context), context) for a, b in itertools.pairwise(sizes))
        self.last = linear(sizes[-1], width, context)

    @torch.no_grad()
    def begin_at(self, rows: Tensor) -> None:
        """With layers twice as wide as the rows [n, width], begin as the identity, ``x = relu(x) - relu(-x)``.

        Training then begins as that of a soft prompt. Other widths begin as in ``RowEncoder``.
        """
        width = rows.shape[1]
        if self.lstm or self.last.in_features < 2 * width:
            super().begin_at(rows)
            return
        first, second = (cast(nn.Linear, layer) for layer in self.mlp)
        both_signs = torch.cat([torch.eye(width), -torch.eye(width)]).to(self.last.weight)
        first.weight[: 2 * width] = both_signs
        second.weight.zero_().fill_diagonal_(1.0)
        self.last.weight.zero_()[:, : 2 * width] = both_signs.t()
        for layer in (first, second, self.last):
            layer.bias.zero_()
        self.embedding.copy_(rows)

    def features(self, seed: int | None) -> Tensor:
        x: Tensor = self.embedding
        for index, layer in enumerate(self.lstm):
            if index and self.dropout and seed is not None:
                generator = torch.Generator(device=x.device).manual_seed(stable_seed(seed, "p_tuning", index))
                keep = 1.0 - self.dropout
                x = x * torch.empty_like(x).bernoulli_(keep, generator=generator).div_(keep)
            x, _ = layer(x)
        for layer in self.mlp:
            x = torch.relu(layer(x))
        return x
