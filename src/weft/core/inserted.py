"""Blocks that an adapter inserts into the base."""

from __future__ import annotations

import copy

from torch import nn


def copy_block(block: nn.Module, shared: tuple[type, ...]) -> nn.Module:
    """A deep copy that shares the model's configuration and every object of the ``shared`` types (routers, sites)."""
    memo: dict[int, object] = {}
    for module in block.modules():
        for key, value in module.__dict__.items():
            if key == "config" or isinstance(value, shared):
                memo[id(value)] = value
    return copy.deepcopy(block, memo)
