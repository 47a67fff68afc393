"""A classification job's own head, on a base that may be shared with jobs of other kinds."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.nn import functional

from weft.core.adapter import BuildContext
from weft.core.head import Batch, Head, Sample, Supervised, supervised
from weft.errors import UserError
from weft.ops.loss import losses_of_logits


class Outputs(Protocol):
    """What a head of this kind gives: a number for each of its labels, in their order."""

    @property
    def labels(self) -> tuple[str, ...]: ...


@dataclass(frozen=True)
class ClassificationTask:
    """The classes, in the order of the head's outputs."""

    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if len(self.labels) < 2:
            raise UserError(f"sequence classification needs two classes or more, not {list(self.labels)}.")

    def build(self, context: BuildContext) -> ClassificationHead:
        """The head for these classes on the base of ``context``."""
        return ClassificationHead(self, context)


@dataclass(frozen=True)
class _Kind:
    """PEFT's names for the last linear and a dense layer before it, and the activation between them."""

    last: str
    dense: str | None = None
    activation: Callable[[Tensor], Tensor] = torch.tanh
    bias: bool = True


KINDS: dict[str, _Kind] = {
    "score": _Kind("score", bias=False),
    "classifier": _Kind("classifier"),
    "dense_classifier": _Kind("classifier.out_proj", "classifier.dense"),
    "gelu_classifier": _Kind("classifier.out_proj", "classifier.dense", functional.gelu),
    "pre_classifier": _Kind("classifier", "pre_classifier", functional.relu),
}
# The start of every name in PEFT's files; the short one is of methods that wrap no module (prompts, prefixes).
PREFIXES = ("base_model.model.", "base_model.")


class ClassificationHead(nn.Module, Head):
    """``score(h)`` of the hidden state that stands for a sequence: transformers' ``...ForSequenceClassification``.

    One linear map without a bias, named ``score``. Encoders with a dense layer of their own in the head or a pooler in
    the base are described by ``kind``:

    - ``score``: W h
    - ``classifier``: W tanh(W_p h + b_p) + b with the base's pooler W_p, frozen
    - ``dense_classifier``: W tanh(W_d h + b_d) + b, all trained; ``gelu_classifier``, ``pre_classifier``: the same with
      GELU, with ReLU
    """

    writes = False
    peft_task = "SEQ_CLS"

    def __init__(self, task: Outputs, context: BuildContext) -> None:
        super().__init__()
        shape, kind = context.architecture, context.architecture.head_kind
        self.labels, self.kind = task.labels, kind
        self.__dict__["pooler"] = context.model.get_submodule(shape.pooler) if shape.pooler else None
        d, labels = shape.hidden_size, len(task.labels)
        if KINDS[kind].dense:
            self.dense_weight = nn.Parameter(context.normal(d, d, std=1 / math.sqrt(d)))
            self.dense_bias = nn.Parameter(context.zeros(d))
        self.weight = nn.Parameter(context.normal(labels, d, std=0.02))
        if KINDS[kind].bias:
            self.bias = nn.Parameter(context.zeros(labels))

    def forward(self, hidden: Tensor) -> Tensor:
        """Logits [n, labels] of the hidden states [n, d], in the head's own dtype."""
        kind, pooler = KINDS[self.kind], self.__dict__["pooler"]
        if pooler is not None:
            hidden = pooler(hidden[:, None])  # it takes the first token of [n, T, d]
        hidden = hidden.to(self.weight.dtype)
        if kind.dense:
            hidden = kind.activation(functional.linear(hidden, self.dense_weight, self.dense_bias))
        return functional.linear(hidden, self.weight, self.bias if kind.bias else None)

    def rows(self, batch: Batch, sequences: Sequence[int]) -> list[int]:
        return [batch.standing[number] for number in sequences]

    def learned(self, batch: Batch, samples: Sequence[Sample], sequences: Sequence[int]) -> Supervised:
        count, labels = len(samples), [-1 if sample.label is None else sample.label for sample in samples]
        rows, device = self.rows(batch, sequences), batch.input_ids.device
        return supervised(rows, labels, [1.0] * count, owner=range(count), count=count, device=device)

    def loss_weight(self, sample: Sample) -> float:
        return 1.0

    def logits(self, hidden: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return self(hidden)

    def losses(self, hidden: Tensor, targets: Tensor, base: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return losses_of_logits(self(hidden), targets)

    def answer(self, place: int | None, length: int) -> int | None:
        """What is classified is said at the end."""
        return length if place is None else place

    def stored(self, prefix: str = "base_model.model.") -> Mapping[str, Tensor]:
        kind = KINDS[self.kind]
        names = {"weight": f"{kind.last}.weight", "bias": f"{kind.last}.bias",
                 "dense_weight": f"{kind.dense}.weight", "dense_bias": f"{kind.dense}.bias"}  # fmt: skip
        return {prefix + names[part]: parameter for part, parameter in self.named_parameters()}


def labels_of_tensors(tensors: Mapping[str, Tensor]) -> tuple[tuple[str, ...], list[str]]:
    """The head in a file that peft wrote: its classes, which have no names there, and the names of its tensors.

    The number of classes is the first side of the head's weight, [labels, d]; none: there is no head.
    """
    parts = {kind.last for kind in KINDS.values()} | {kind.dense for kind in KINDS.values() if kind.dense}
    keys = [
        key for key in tensors if any(key.rpartition(".")[0] == prefix + part for part in parts for prefix in PREFIXES)
    ]
    weights = {f"{prefix}{kind.last}.weight" for kind in KINDS.values() for prefix in PREFIXES} & set(keys)
    if not weights:
        return (), []
    return tuple(f"LABEL_{i}" for i in range(len(tensors[weights.pop()]))), keys
