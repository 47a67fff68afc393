"""Adapters with values of their own, and what comes of them."""

from __future__ import annotations

from typing import Any

import torch
from tests.kit.methods import ALL, method_config
from torch import Tensor, nn

from weft.api import Adapters
from weft.core.adapter import Adapter
from weft.core.stream import Part
from weft.models import describe


def randomize(adapter: Adapter, seed: int = 0, scale: float = 0.1) -> Adapter:
    """Move every parameter away from where it began: zeros hide mistakes."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_((torch.randn(parameter.shape, generator=generator) * scale).to(parameter))
    return adapter


def open_with_all(model: nn.Module, *, dropout: bool = False, **options: Any) -> Adapters:
    """One randomised adapter of every method, named like its method."""
    adapters = Adapters(model, describe(model), **options)
    for index, method in enumerate(ALL):
        randomize(adapters.add(method, method_config(method, dropout=dropout), seed=index), index)
    return adapters


def hidden_of(adapters: Adapters, parts: list[Part]) -> list[Tensor]:
    """Hidden states of every part's own tokens (virtual rows left out), one tensor per sequence."""
    stream = adapters.stream(parts)
    hidden = adapters.forward(stream)
    return [hidden[torch.tensor(list(rows))] for rows in stream.rows]


def gradients(adapter: Adapter) -> dict[str, Tensor]:
    """The gradients of all parameters, cleared on the way out."""
    found = {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
    adapter.zero_grad(set_to_none=True)
    return found


def parameters(adapter: Adapter) -> dict[str, Tensor]:
    """A copy of all parameters."""
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}
