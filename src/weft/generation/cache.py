"""The key/value cache of a batch of requests."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.core.route import Route


class KeyValueCache:
    """Per layer, keys and values [B, kv_heads, capacity, head_dim]; row b holds ``lengths[b]`` of them.

    An adapter's prefix takes the first places of its rows, so from then on it is a key like any other.
    """

    def __init__(self, lengths: Tensor, prefix_lengths: Tensor, new_tokens: int) -> None:
        """``lengths`` [B]: the prompts' tokens, virtual ones included; ``prefix_lengths`` [B]: learned keys before."""
        self.lengths = lengths + prefix_lengths
        self.prefilled = False
        self._prefix_lengths = prefix_lengths
        self._capacity = int(self.lengths.max()) + new_tokens
        rows = torch.arange(len(lengths), device=lengths.device)
        self._row = rows.repeat_interleave(lengths)
        starts = torch.cumsum(lengths, 0) - lengths
        self._place = torch.arange(int(lengths.sum()), device=lengths.device) - (starts - prefix_lengths)[self._row]
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def prefill(self, layer: int, k: Tensor, v: Tensor, route: Route) -> None:
        """Store the prompts' keys and values, [kv_heads, N, head_dim], each row's after its prefix."""
        heads, _, dim = k.shape
        pair = []
        for side, x in enumerate((k, v)):
            store = x.new_zeros(len(self.lengths), heads, self._capacity, dim)
            store[self._row, :, self._place] = x.transpose(0, 1)
            first = 0
            for group, segment in enumerate(route.segments):
                if group in route.prefixes:
                    learned = route.prefixes[group][layer][side]
                    store[first : first + segment.sequences, :, : learned.shape[1]] = learned.to(x.dtype)
                first += segment.sequences
            pair.append(store)
        self._layers[layer] = (pair[0], pair[1])

    def part(self, first: int, count: int) -> PartOfCache:
        """Rows ``first`` to ``first + count``, for layers that only these pass through."""
        return PartOfCache(self, slice(first, first + count))

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Store one token per row, k and v [kv_heads, B, head_dim]; as ``weft.core.route.KeyValueCache.append``.

        The caller calls ``advance`` after every layer has stored its token.
        """
        keys, values = self._layers[layer]
        rows = torch.arange(len(self.lengths), device=self.lengths.device)
        keys[rows, :, self.lengths] = k.transpose(0, 1)
        values[rows, :, self.lengths] = v.transpose(0, 1)
        longest = int(self.lengths.max()) + 1
        return keys[:, :, :longest], values[:, :, :longest], self.lengths + 1

    def advance(self) -> None:
        """Every layer has stored its token."""
        self.lengths = self.lengths + 1

    def keep(self, rows: Tensor) -> None:
        """Drop all rows but these [n], in this order."""
        self.lengths = self.lengths[rows]
        self._layers = {layer: (k[rows], v[rows]) for layer, (k, v) in self._layers.items()}


class PartOfCache:
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
        whole = self.whole
        here = (whole._row >= self.rows.start) & (whole._row < self.rows.stop)
        pair = whole._layers.get(layer)
        if pair is None:
            shape = (len(whole.lengths), k.shape[0], whole._capacity, k.shape[2])
            pair = whole._layers[layer] = (k.new_zeros(shape), v.new_zeros(shape))
        for store, x in zip(pair, (k, v), strict=True):
            store[whole._row[here], :, whole._place[here]] = x.transpose(0, 1)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """``KeyValueCache.append`` for these rows, with the same shapes."""
        keys, values = (side[self.rows] for side in self.whole._layers[layer])
        lengths = self.whole.lengths[self.rows]
        rows = torch.arange(len(lengths), device=lengths.device)
        keys[rows, :, lengths] = k.transpose(0, 1)
        values[rows, :, lengths] = v.transpose(0, 1)
        longest = int(lengths.max()) + 1
        return keys[:, :, :longest], values[:, :, :longest], lengths + 1

    def part(self, first: int, count: int) -> PartOfCache:
        """Of these rows again some."""
        begin = self.rows.start + first
        return PartOfCache(self.whole, slice(begin, begin + count))
