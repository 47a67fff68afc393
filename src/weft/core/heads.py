"""A classification job's own head, on a base that may be shared with jobs of other kinds."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from weft.core.config import BuildContext
from weft.errors import UserError


@dataclass(frozen=True)
class ClassificationTask:
    """The classes, in the order of the head's outputs."""

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise UserError(f"sequence classification needs two classes or more, not {list(self.labels)}.")


class ClassificationHead(nn.Module):
    """``score(h)`` of the hidden state that stands for a sequence: transformers' ``...ForSequenceClassification``.

    Decoders: one linear map without a bias, named ``score``, on the last token. Encoders with a dense layer of their
    own in the head (RoBERTa) or a pooler in the base (BERT) are described by ``kind``:

    - ``score``: W h
    - ``classifier``: W tanh(W_p h + b_p) + b with the base's pooler W_p, frozen (BERT)
    - ``dense_classifier``: W tanh(W_d h + b_d) + b, all trained (RoBERTa)
    """

    def __init__(self, task: ClassificationTask, kind: str, pooler: nn.Module | None, context: BuildContext) -> None:
        super().__init__()
        self.task, self.kind = task, kind
        self.__dict__["pooler"] = pooler
        d, labels = context.architecture.hidden_size, len(task.labels)
        if kind == "dense_classifier":
            self.dense_weight = nn.Parameter(context.normal(d, d, std=1 / math.sqrt(d)))
            self.dense_bias = nn.Parameter(context.zeros(d))
        self.weight = nn.Parameter(context.normal(labels, d, std=0.02))
        if kind != "score":
            self.bias = nn.Parameter(context.zeros(labels))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [n, labels] of the hidden states [n, d], in the head's own dtype."""
        if self.kind == "score":
            return hidden.to(self.weight.dtype) @ self.weight.t()
        if self.kind == "classifier":
            pooler = self.__dict__["pooler"]
            # A pooler takes the first token of [n, T, d].
            pooled = (pooler(hidden[:, None]) if pooler is not None else hidden).to(self.weight.dtype)
        else:
            dense = torch.nn.functional.linear(hidden.to(self.weight.dtype), self.dense_weight, self.dense_bias)
            pooled = torch.tanh(dense)
        return torch.nn.functional.linear(pooled, self.weight, self.bias)

    def stored(self) -> Mapping[str, Tensor]:
        """The tensors under the names that PEFT's files give them."""
        names = {
            "score": {"weight": "score.weight"},
            "classifier": {"weight": "classifier.weight", "bias": "classifier.bias"},
            "dense_classifier": {
                "dense_weight": "classifier.dense.weight",
                "dense_bias": "classifier.dense.bias",
                "weight": "classifier.out_proj.weight",
                "bias": "classifier.out_proj.bias",
            },
        }[self.kind]
        return {f"base_model.model.{name}": self.get_parameter(part) for part, name in names.items()}
