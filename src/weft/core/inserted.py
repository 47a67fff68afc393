"""Blocks that an adapter inserts into the base: the copy of one, and its call with one segment's part of a batch."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from weft.core.route import Route


def segment_part(value: object, index: int, route: Route, hidden: Tensor) -> object:
    """The part of one of a block's arguments for segment ``index``; ``hidden`` is [1, N, d], padded [B, T, d].

    It is the segment's rows of a tensor, without the columns of neighbours' prefixes. The cache belongs to the base's
    layers, so inserted blocks get the route's cache for them, if any. Any other value goes to every segment whole.
    """
    if isinstance(value, tuple):
        return tuple(segment_part(inner, index, route, hidden) for inner in value)
    if not torch.is_tensor(value):
        is_cache = type(value).__name__.endswith("Cache")
        return route.inserted.get(route.segments[index].adapter) if is_cache else value
    if route.padded:
        return _padded_part(value, index, route, hidden)
    total = hidden.shape[1]
    dim = next((i for i in range(min(2, value.dim())) if value.shape[i] == total), None)
    if len(route.segments) == 1 or dim is None:
        return value
    # A copy, because a kernel's rounding may depend on the place of its rows in memory.
    return value.split(route.sizes, dim)[index].clone(memory_format=torch.contiguous_format)


def _padded_part(value: Tensor, index: int, route: Route, hidden: Tensor) -> Tensor:
    batch, width = hidden.shape[:2]
    if value.dim() < 2:
        return value
    rows, first = value.shape[0], sum(route.sizes[:index])
    # BLOOM's ALiBi is [B * heads, 1, T].
    each = rows // batch if value.dim() == 3 and rows % batch == 0 else int(rows == batch)
    before = max((states[0][0].shape[1] for states in route.prefixes.values()), default=0)
    # The angles of rotary positions [B, T, head_dim] are no mask, though their last side may happen to be as long.
    is_mask = value.dim() in (2, 4) or value.dtype == torch.bool or each > 1
    if before and is_mask and value.shape[-1] == before + width:
        value = value[..., before:]
    return value[first * each : (first + route.sizes[index]) * each] if each else value


def copy_block(block: nn.Module, shared: tuple[type, ...]) -> nn.Module:
    """A deep copy that shares the model's configuration and every object of the ``shared`` types (routers, sites)."""
    memo: dict[int, object] = {}
    for module in block.modules():
        for key, value in module.__dict__.items():
            if key == "config" or isinstance(value, shared):
                memo[id(value)] = value
    return copy.deepcopy(block, memo)
