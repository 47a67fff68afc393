"""The key/value cache of a batch of requests."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.core.route import Route


class KeyValueCache:
    """Keys and values [B, kv_heads, capacity, head_dim] of each layer; row b holds ``lengths[b]`` of them.

    An adapter's prefix takes the first places of its rows, so from then on it is a key like any other.
    """

    def __init__(self, lengths: Tensor, prefix_lengths: Tensor, new_tokens: int) -> None:
        """``lengths`` [B]: the prompts' tokens, virtual ones included; ``prefix_lengths`` [B]: learned keys before."""
        self.lengths = lengths + prefix_lengths
        self.prefilled = False
        self._capacity = int(self.lengths.max()) + new_tokens
        rows = torch.arange(len(lengths), device=lengths.device)
        self._row = rows.repeat_interleave(lengths)
        starts = torch.cumsum(lengths, 0) - lengths
        self._place = torch.arange(int(lengths.sum()), device=lengths.device) - (starts - prefix_lengths)[self._row]
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def prefill(self, layer: int, k: Tensor, v: Tensor, route: Route) -> None:
        """Store the prompts' keys and values, [kv_heads, N, head_dim], each row's after its prefix."""
        pair = self.store(layer, k, v)
        first = 0
        for group, segment in enumerate(route.segments):
            rows = slice(first, first + segment.sequences)
            if group in route.prefixes:
                for side, learned in zip(pair, route.prefixes[group][layer], strict=True):
                    side[rows, :, : learned.shape[1]] = learned.to(side.dtype)
            first = rows.stop

    def end_prefill(self) -> None:
        """Every layer has stored the prompts; single tokens follow."""
        self.prefilled = True

    def store(self, layer: int, k: Tensor, v: Tensor, rows: slice | None = None) -> tuple[Tensor, Tensor]:
        """Store the prompts of these (or all) rows [kv_heads, N, head_dim]; returns the layer's keys and values."""
        if layer not in self._layers:
            shape = (len(self.lengths), k.shape[0], self._capacity, k.shape[2])
            self._layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        here = slice(None) if rows is None else (self._row >= rows.start) & (self._row < rows.stop)
        for side, x in zip(self._layers[layer], (k, v), strict=True):
            side[self._row[here], :, self._place[here]] = x.transpose(0, 1)
        return self._layers[layer]

    def part(self, first: int, count: int) -> CacheRows:
        """Rows ``first`` to ``first + count``, for layers that only these pass through."""
        return CacheRows(self, slice(first, first + count))

    def append(self, layer: int, k: Tensor, v: Tensor, part: slice = slice(None)) -> tuple[Tensor, Tensor, Tensor]:
        """Store one token per row of ``part``, k and v [kv_heads, B, head_dim]; as the router's ``KeyValueCache``.

        The caller calls ``advance`` after every layer has stored its token.
        """
        keys, values = (side[part] for side in self._layers[layer])
        lengths = self.lengths[part]
        rows = torch.arange(len(lengths), device=lengths.device)
        keys[rows, :, lengths] = k.transpose(0, 1)
        values[rows, :, lengths] = v.transpose(0, 1)
        longest = int(lengths.max()) + 1
        return keys[:, :, :longest], values[:, :, :longest], lengths + 1

    def advance(self) -> None:
        """Count the token, which every layer has stored."""
        self.lengths = self.lengths + 1

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these [n], in this order."""
        self.lengths = self.lengths[rows]
        self._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}


class CacheRows:
    """Some neighbouring rows of a cache. An inserted layer's keys and values lie in the cache of all rows, so that rows
    can be dropped without knowing who uses which layer; the other rows' places stay empty."""

    def __init__(self, whole: KeyValueCache, rows: slice) -> None:
        self.whole, self.rows = whole, rows

    @property
    def prefilled(self) -> bool:
        """Whether the prompts are in."""
        return self.whole.prefilled

    def prefill(self, layer: int, k: Tensor, v: Tensor, route: Route) -> None:
        """Store the rows' prompts, [kv_heads, N of these rows, head_dim]."""
        self.whole.store(layer, k, v, self.rows)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``KeyValueCache.append`` for these rows, with the same shapes."""
        return self.whole.append(layer, k, v, self.rows)

    def part(self, first: int, count: int) -> CacheRows:
        """Rows ``first`` to ``first + count`` of these rows."""
        return self.whole.part(self.rows.start + first, count)
