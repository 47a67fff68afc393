"""The keys and values of all texts, in blocks, and the attention of one pass to them."""

from __future__ import annotations

import contextlib
import math
import mmap
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import Any

import torch
from torch import Tensor

from weft.core.route import PrefixStates
from weft.ops.attention import varlen_attention
from weft.ops.decoding import decode_attention, gather_blocks, hidden_keys
from weft.ops.sequence_layout import SequenceLayout


class Pool:
    """Keys and values [kv_heads, blocks * block_tokens, head_dim] of each layer, made when the layer first stores."""

    def __init__(self, blocks: int, block_tokens: int) -> None:
        self.blocks, self.block_tokens = blocks, block_tokens
        self._layers: dict[int, tuple[Tensor, Tensor]] = {}

    def store(self, layer: int, places: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Write k and v [kv_heads, n, head_dim] at these places [n]; returns the layer's whole keys and values."""
        if layer not in self._layers:
            size = self.blocks * self.block_tokens
            self._layers[layer] = (_zeros(k, size), _zeros(v, size))
        keys, values = self._layers[layer]
        keys.index_copy_(1, places, k.to(keys.dtype))
        values.index_copy_(1, places, v.to(values.dtype))
        return keys, values

    def store_prefix(self, states: PrefixStates, blocks: Sequence[int], dtype: torch.dtype) -> None:
        """Write learned keys and values, one pair per layer, at the head of a text that lies in ``blocks``."""
        count = states[0][0].shape[1]
        places = torch.tensor(self.places(blocks, 0, count), device=states[0][0].device)
        for layer, (k, v) in enumerate(states):
            if (narrow := k.shape[2] - v.shape[2]) > 0:  # attention pads values that are narrower than keys
                v = torch.nn.functional.pad(v, (0, narrow))
            self.store(layer, places, k.to(dtype), v.to(dtype))

    def clear(self) -> None:
        """Give the memory back."""
        self._layers.clear()

    def copy_block(self, source: int, target: int) -> None:
        """Copy one block's keys and values to another, in all layers."""
        size = self.block_tokens
        for side in (side for pair in self._layers.values() for side in pair):
            side[:, target * size : (target + 1) * size] = side[:, source * size : (source + 1) * size]

    def places(self, blocks: Sequence[int], start: int, end: int) -> list[int]:
        """The places of the positions ``start`` to ``end`` of a text that lies in ``blocks``."""
        size = self.block_tokens
        return [blocks[i // size] * size + i % size for i in range(start, end)]


def _zeros(like: Tensor, size: int) -> Tensor:
    """Zeros [heads, size, head_dim], because what a mask hides is still multiplied by 0.

    On a CPU the system gives their memory when it is used, so that a large cache costs nothing before: in small pages,
    for a text has one place in each head, and with pages of 2 MiB a short one would take hundreds of them.
    """
    shape = (like.shape[0], size, like.shape[2])
    if like.device.type != "cpu":
        return like.new_zeros(shape)
    # Elsewhere than on Windows an anonymous map is shared with children unless it is said otherwise.
    own = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    memory = mmap.mmap(-1, math.prod(shape) * like.element_size(), **own)
    if hasattr(mmap, "MADV_NOHUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without large pages
            memory.madvise(mmap.MADV_NOHUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


@dataclass(frozen=True)
class Piece:
    """The tokens of one text that go through a pass: ``count`` after the ``past`` that lie in its ``blocks``."""

    blocks: Sequence[int]
    past: int
    count: int

    @property
    def single(self) -> bool:
        """Whether it is one token after others, as when a text is written."""
        return self.count == 1 and self.past > 0


class Pass:
    """The cache of one pass over ``pieces``, which lie end to end: as the router's ``KeyValueCache``.

    A single token attends to the blocks of its text. A longer piece attends to itself as in training, with the text
    before it in the place of a prefix; so the first pass over a prompt computes what training does.
    """

    def __init__(self, pool: Pool, pieces: Sequence[Piece], device: torch.device) -> None:
        self.pool, self.pieces, self.device = pool, pieces, device
        self._hidden: dict[int | None, Tensor] = {}  # of the single tokens, by the window of a layer

    def part(self, first: int, count: int) -> Pass:
        """The pass of ``count`` pieces from ``first`` alone."""
        return Pass(self.pool, self.pieces[first : first + count], self.device)

    def attend(self, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, **bias: Any) -> Tensor:
        """Attention [N, heads, head_dim] of q [heads, N, head_dim] to the texts so far and, causally, to itself."""
        stored = self.pool.store(layer, self._places, k, v)
        rule = {"scale": scale, **bias}
        if self._rows is None:
            return self._singles(q, stored, rule) if self._layout is None else self._longer(q, k, v, stored, rule)
        singles, longer = self._rows
        out = q.new_empty(q.shape[1], q.shape[0], v.shape[2])
        out[singles] = self._singles(q[:, singles], stored, rule)
        out[longer] = self._longer(q[:, longer], k[:, longer], v[:, longer], stored, rule)
        return out

    def _singles(self, q: Tensor, stored: tuple[Tensor, Tensor], rule: dict[str, Any]) -> Tensor:
        blocks, lengths, run = self._tables
        if run is not None:
            k, v = (side[:, None, run] for side in stored)
            return decode_attention(q.transpose(0, 1), k, v, None, **rule)
        k, v = (gather_blocks(side, blocks, self.pool.block_tokens) for side in stored)
        window = rule.get("sliding_window")
        if window not in self._hidden:
            self._hidden[window] = hidden_keys(lengths, k.shape[2], window, q.device)
        return decode_attention(q.transpose(0, 1), k, v, lengths, hidden=self._hidden[window], **rule)

    def _longer(self, q: Tensor, k: Tensor, v: Tensor, stored: tuple[Tensor, Tensor], rule: dict[str, Any]) -> Tensor:
        assert self._layout is not None
        past = {}
        for group, (blocks, length) in self._pasts.items():
            before = [gather_blocks(side, blocks, self.pool.block_tokens)[:, 0, :length] for side in stored]
            past[group] = (before[0].to(k.dtype), before[1].to(v.dtype))
        return varlen_attention(q, k, v, self._layout, prefix=past, **rule)

    @cached_property
    def _places(self) -> Tensor:
        """Where each token's keys and values are stored, [N]."""
        found = [
            place
            for piece in self.pieces
            for place in self.pool.places(piece.blocks, piece.past, piece.past + piece.count)
        ]
        return torch.tensor(found, device=self.device)

    @cached_property
    def _tables(self) -> tuple[Tensor, Tensor, slice | None]:
        """The blocks [B, P] and lengths [B] of the single tokens' texts; of one in neighbouring blocks, its rows."""
        size = self.pool.block_tokens
        alone = [piece for piece in self.pieces if piece.single]
        own = [piece.blocks[: -(-(piece.past + 1) // size)] for piece in alone]
        most = max(len(blocks) for blocks in own)
        table = torch.tensor([[*blocks, *[blocks[0]] * (most - len(blocks))] for blocks in own], device=self.device)
        lengths = torch.tensor([piece.past + 1 for piece in alone], device=self.device)
        run = None
        if len(own) == 1 and list(own[0]) == list(range(own[0][0], own[0][0] + most)):
            run = slice(own[0][0] * size, own[0][0] * size + alone[0].past + 1)
        return table, lengths, run

    @cached_property
    def _layout(self) -> SequenceLayout | None:
        """The longer pieces as sequences; each with something before it is a group of its own."""
        longer = [piece for piece in self.pieces if not piece.single]
        if not longer:
            return None
        groups = [index if piece.past else -1 for index, piece in enumerate(longer)]
        return SequenceLayout.build(
            [piece.count for piece in longer], groups, prefix_groups=set(groups) - {-1}, device=self.device
        )

    @cached_property
    def _pasts(self) -> dict[int, tuple[Tensor, int]]:
        """Of the longer pieces with something before them, by group: the blocks [1, P] of that, its length."""
        size = self.pool.block_tokens
        longer = [piece for piece in self.pieces if not piece.single]
        return {
            index: (torch.tensor([piece.blocks[: -(-piece.past // size)]], device=self.device), piece.past)
            for index, piece in enumerate(longer)
            if piece.past
        }

    @cached_property
    def _rows(self) -> tuple[Tensor, Tensor] | None:
        """The rows of single tokens and those of longer pieces, where there are both."""
        starts = [0, *accumulate(piece.count for piece in self.pieces)]
        of = {True: list[int](), False: list[int]()}
        for piece, start in zip(self.pieces, starts, strict=False):
            of[piece.single].extend(range(start, start + piece.count))
        if not of[True] or not of[False]:
            return None
        return torch.tensor(of[True], device=self.device), torch.tensor(of[False], device=self.device)
