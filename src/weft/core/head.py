"""A head: what turns hidden states into a loss and an answer.

An adapter without a head of its own has the base's, whose answers are tokens (``TokenHead``); a classification job
brings one (``weft.heads``). Who trains, evaluates, generates or merges asks the head and never which it is.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar, Protocol, final

import torch
from torch import Tensor


class Batch(Protocol):
    """What heads ask of a batch that was laid out (``weft.core.stream.Stream``)."""

    @property
    def input_ids(self) -> Tensor:
        """The tokens [N] of the batch."""

    @property
    def rows(self) -> Sequence[Sequence[int]]: ...
    @property
    def standing(self) -> Sequence[int]: ...
    def before(self, row: int) -> int:
        """The row before this one in its sequence."""


class Sample(Protocol):
    """What heads and passes ask of a sample (``weft.data.Sample``)."""

    @property
    def input_ids(self) -> Sequence[int]: ...
    @property
    def weights(self) -> Sequence[float]: ...
    @property
    def slots(self) -> Sequence[int]: ...
    @property
    def answer(self) -> int | None: ...
    @property
    def label(self) -> int | None: ...
    @property
    def target_ids(self) -> Sequence[int]: ...
    @property
    def token_types(self) -> Sequence[int]: ...
    @property
    def size(self) -> int: ...
    @property
    def written(self) -> tuple[Sequence[int], Sequence[float]]: ...
    @property
    def each(self) -> Sequence[Sample]:
        """A sample for each of its answers, where several were judged; else itself alone."""

    @property
    def shared(self) -> Sequence[int]:
        """How many of the first tokens of ``each`` are those of the first one, which shares none."""

    @property
    def given(self) -> float: ...


@dataclass(frozen=True)
class Supervised:
    """What is learned from some sequences of a batch.

    Attributes:
        rows: [S] int64, the row whose hidden state predicts the target.
        targets: [S] int64, a token or a class.
        weights: [S] float, what each target's loss counts.
        sequence: [S] int64, which of the ``num_sequences`` sequences it belongs to.
    """

    rows: Tensor
    targets: Tensor
    weights: Tensor
    _: KW_ONLY
    sequence: Tensor
    num_sequences: int

    def per_sequence(self, losses: Tensor) -> Tensor:
        """The weighted sum [num_sequences] of the losses [S] of each sequence's targets, in their dtype."""
        weighted = losses * self.weights.to(losses.dtype)
        return torch.zeros(self.num_sequences, dtype=losses.dtype, device=losses.device).index_add(
            0, self.sequence, weighted
        )


class Head(ABC):
    """What an adapter answers with.

    Attributes:
        labels: the classes, in the order of the answers; none where text is written.
        writes: whether its answers are text.
        peft_task: what PEFT's files call a task with this head; "": as the base's.
    """

    labels: tuple[str, ...] = ()
    writes: ClassVar[bool]
    peft_task: ClassVar[str] = ""

    @abstractmethod
    def rows(self, batch: Batch, sequences: Sequence[int]) -> list[int]:
        """The rows of the batch at which these sequences are answered."""

    @abstractmethod
    def learned(self, batch: Batch, samples: Sequence[Sample], sequences: Sequence[int]) -> Supervised:
        """What ``samples``, which are these sequences of the batch, teach."""

    @abstractmethod
    def loss_weight(self, sample: Sample) -> float:
        """What a sample counts in its job's mean."""

    @abstractmethod
    def logits(self, hidden: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        """Logits [n, answers] of the hidden states [n, d]; ``base`` gives those of the base's output layer."""

    @abstractmethod
    def losses(self, hidden: Tensor, targets: Tensor, base: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        """``-log p(target)`` [n] after the hidden states [n, d]; ``base`` gives those of the base's output layer."""

    @abstractmethod
    def answer(self, place: int | None, length: int) -> int | None:
        """Where the answer to a text of ``length`` tokens begins, if the sample says ``place``."""

    @abstractmethod
    def stored(self, prefix: str = "base_model.model.") -> Mapping[str, Tensor]:
        """The head's own tensors, in their own shapes, under the names that PEFT's files give them."""


@final
@dataclass(frozen=True)
class TokenHead(Head):
    """The base's own output layer: every learned token is predicted by the row before it."""

    writes = True

    def rows(self, batch: Batch, sequences: Sequence[int]) -> list[int]:
        return [row for number in sequences for row in batch.rows[number]]

    def learned(self, batch: Batch, samples: Sequence[Sample], sequences: Sequence[int]) -> Supervised:
        """A token at place t is predicted by the row before it; the first has no row before it of its own, so a
        renderer gives it weight 0. The rows of targets are a decoder's: each predicts its own."""
        rows: list[int] = []
        targets: list[int] = []
        weights: list[float] = []
        owner: list[int] = []
        for index, (sample, number) in enumerate(zip(samples, sequences, strict=True)):
            places = batch.rows[number]
            if sample.target_ids:
                rows.extend(places)
                targets.extend(sample.target_ids)
                weights.extend([1.0] * len(sample.target_ids))
            else:
                for place, weight in enumerate(sample.weights):
                    if weight and place:
                        # The row before it may be a virtual token's: generation goes on from there too.
                        rows.append(batch.before(places[place]))
                        targets.append(sample.input_ids[place])
                        weights.append(weight)
            owner.extend([index] * (len(rows) - len(owner)))
        return supervised(rows, targets, weights, owner=owner, count=len(samples), device=batch.input_ids.device)

    def loss_weight(self, sample: Sample) -> float:
        """Its learned tokens."""
        return sum(sample.written[1])

    def logits(self, hidden: Tensor, base: Callable[[Tensor], Tensor]) -> Tensor:
        return base(hidden)

    def losses(self, hidden: Tensor, targets: Tensor, base: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
        return base(hidden, targets)

    def answer(self, place: int | None, length: int) -> int | None:
        return place

    def stored(self, prefix: str = "base_model.model.") -> Mapping[str, Tensor]:
        return {}


def supervised(
    rows: Sequence[int],
    targets: Sequence[int],
    weights: Sequence[float],
    owner: Sequence[int],
    count: int,
    device: torch.device,
) -> Supervised:
    """``Supervised`` of ``count`` sequences, from plain numbers."""
    at, wanted, of = (torch.tensor(values, device=device, dtype=torch.int64) for values in (rows, targets, owner))
    return Supervised(
        at, wanted, torch.tensor(weights, device=device, dtype=torch.float64), sequence=of, num_sequences=count
    )
