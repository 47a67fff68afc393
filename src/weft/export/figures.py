"""The distances between two models' logits, one function for each. The proof of a merge and `weft verify` use them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor


def same_tokens(wanted: Tensor, found: Tensor) -> int:
    """The number of positions with the same likeliest token, of logits [positions, tokens]."""
    return int((wanted.argmax(-1) == found.argmax(-1)).sum())


def relative_difference(wanted: Tensor, found: Tensor) -> float:
    """The largest difference of two logits [positions, tokens] over the largest logit."""
    largest = wanted.double().masked_fill(wanted.isinf(), 0).abs().max()
    return float(_apart(wanted, found).abs().max() / largest)


def divergence(wanted: Tensor, found: Tensor) -> float:
    """The sum over positions of the Kullback-Leibler divergence, in nats, of logits [positions, tokens] from others."""
    p, q = (logits.double().log_softmax(-1) for logits in (wanted, found))
    return float((p.exp() * _apart(p, q)).sum())


def squared_difference(wanted: Tensor, found: Tensor) -> float:
    """The sum of the squared differences of logits [positions, tokens]."""
    return float(_apart(wanted, found).square().sum())


def _apart(wanted: Tensor, found: Tensor) -> Tensor:
    # Some models bar a part of their vocabulary with -inf.
    return torch.where(wanted == found, 0.0, wanted.double() - found.double())


def clear_positions(wanted: Tensor, moved: float) -> Tensor:
    """The positions [positions] of logits [positions, tokens] whose likeliest token leads although two logits may each
    move so far."""
    best, second = wanted.double().topk(2, -1).values.unbind(-1)
    return best - second > 2 * moved


def at_answer(logits: Tensor, answer: Sequence[int]) -> Tensor:
    """The logits [answer length, tokens] that choose the tokens of an answer, of those [positions, tokens] of a text
    that ends with it."""
    end = len(logits)
    return logits[end - len(answer) - 1 : end - 1]


def larger(before: float, found: float) -> float:
    """The larger of two numbers; what is not a number stays."""
    return math.nan if math.isnan(before) or math.isnan(found) else max(before, found)


@dataclass
class Distances:
    """The distances of pairs of logits [positions, tokens], added up.

    Attributes:
        largest: the largest ``relative_difference`` of a pair.
        same: positions with the same likeliest token.
        divergence, squares: sums.
    """

    positions: int = 0
    same: int = 0
    _: KW_ONLY
    largest: float = 0.0
    divergence: float = 0.0
    squares: float = 0.0

    def add(self, wanted: Tensor, found: Tensor) -> None:
        """Take one more pair, logits [positions, tokens] both."""
        self.positions += len(wanted)
        self.same += same_tokens(wanted, found)
        self.largest = larger(self.largest, relative_difference(wanted, found))
        self.divergence += divergence(wanted, found)
        self.squares += squared_difference(wanted, found)
