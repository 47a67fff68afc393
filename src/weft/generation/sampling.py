"""Choosing the next token."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from weft.errors import UserError


@dataclass(frozen=True)
class Sampling:
    """Temperature 0 is greedy; otherwise softmax(logits / temperature), cut to ``top_k`` and then to ``top_p``."""

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not -(2**63) <= self.seed < 2**63:
            raise UserError(f"seed {self.seed} does not fit into 64 bits.")
        if not 0 <= self.temperature < math.inf:
            raise UserError(f"temperature is {self.temperature}; it must be 0 (greedy) or more.")
        if not self.top_k >= 0:
            raise UserError(f"top_k is {self.top_k}; it must be 0 (all tokens) or more.")
        if not 0 <= self.top_p <= 1:
            raise UserError(f"top_p is {self.top_p}; it must lie between 0 and 1 (all tokens).")

    def generator(self) -> torch.Generator:
        """The request's own generator: what its neighbours draw does not change it."""
        return torch.Generator().manual_seed(self.seed)


def choose(logits: Tensor, samplings: Sequence[Sampling], generators: Sequence[torch.Generator]) -> Tensor:
    """One token id per row, [B] int64, from logits [B, vocabulary]."""
    tokens = logits.argmax(-1)
    for row, sampling in enumerate(samplings):
        if sampling.temperature > 0:
            tokens[row] = _sample(logits[row], sampling, generators[row])
    return tokens


def _sample(logits: Tensor, sampling: Sampling, generator: torch.Generator) -> int:
    scaled, ids = (logits.double().cpu() / sampling.temperature).sort(descending=True)
    probabilities = scaled.softmax(-1)
    if sampling.top_k > 0:
        probabilities[sampling.top_k :] = 0
    if sampling.top_p < 1.0:
        # A token stays if what lies above it does not yet make up top_p; so the first always stays.
        above = probabilities.cumsum(-1) - probabilities
        cut = above >= sampling.top_p * probabilities.sum()
        cut[0] = False  # also with top_p 0
        probabilities[cut] = 0
    return int(ids[torch.multinomial(probabilities, 1, generator=generator)])
