"""The places of the sequences in a padding-free batch, and the buckets that attention processes together.

Sequences of similar length form a *bucket*, a right-padded block ``[b, T]`` of stream positions. Index tensors lead
from the stream to the buckets' rows and back; both ways are gathers, in the forward and in the backward pass.
Letters as in ``weft.ops.attention``.
"""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from weft.ops.memory import empty

BUCKET_OVERHEAD = 30_000  # what one more bucket costs, in padded score entries (T^2 - length^2)


@dataclass(frozen=True, eq=False)
class Bucket:
    """Sequences of similar length that are processed as one block of ``b`` sequences of ``T`` tokens.

    ``tokens`` [b, T] int64 holds stream positions; a pad repeats the last token of its own sequence, so that even a NaN
    cannot travel from one sequence to another. ``start`` is the block's first row in the padded stream of all buckets.
    ``group`` is set if the bucket holds one group only.
    """

    sequences: tuple[int, ...]
    lengths: tuple[int, ...]
    length: int
    _: KW_ONLY
    group: int | None
    start: int
    tokens: Tensor


class Sharing(NamedTuple):
    """Sequences of a layout's ``group`` that see the rows [begin, end) of another before their own.

    ``seen_from`` is the group of that other, whose learned keys, if it has some, stand before these rows.
    """

    group: int
    begin: int
    end: int
    seen_from: int


class HeadIndex(NamedTuple):
    """Row numbers between the stream's ``[N * H, D]`` and the buckets' ``[(b, K, T, G) of every bucket, D]``."""

    gather: Tensor  # [M * H] int64: the stream row that each padded row copies
    inverse: Tensor  # [N * H] int64: the padded row of each stream row
    pads: Tensor | None  # padded rows that are no token; None if there are none


@dataclass(frozen=True, eq=False)
class SequenceLayout:
    """The places of one batch's sequences. It is built once per batch, and every layer shares its index tensors.

    Attributes:
        cu_seqlens: [S + 1] int32, the first row of each sequence and the end of the last one.
    """

    lengths: tuple[int, ...]
    groups: tuple[int, ...]
    cu_seqlens: Tensor
    _: KW_ONLY
    buckets: tuple[Bucket, ...]
    separate_groups: bool = False
    prefix_groups: frozenset[int] = frozenset()
    indices: dict[tuple[int, int], HeadIndex] = field(default_factory=dict, repr=False)  # of ``head_index``
    masks: dict[tuple[object, ...], Tensor] = field(default_factory=dict, repr=False)  # of attention's score blocks

    @property
    def tokens(self) -> int:
        """N, the number of tokens in the stream."""
        return sum(self.lengths)

    @classmethod
    def build(
        cls,
        lengths: Sequence[int],
        groups: Sequence[int] | None = None,
        *,
        prefix_groups: Collection[int] = (),
        separate_groups: bool = False,
        device: torch.device | str = "cpu",
    ) -> SequenceLayout:
        """Cut the stream into sequences and buckets.

        Sequences of a group in ``prefix_groups`` never share a bucket with another group. With ``separate_groups`` no
        two groups ever do. A group's buckets then depend on its own lengths alone, and so every bit of its arithmetic
        is what it would be in a batch of its own.
        """
        lengths = tuple(int(n) for n in lengths)
        groups = tuple(int(g) for g in groups) if groups is not None else (0,) * len(lengths)
        if not lengths or min(lengths) < 1:
            raise ValueError(f"every sequence needs at least one token, got lengths {lengths}")
        if len(groups) != len(lengths):
            raise ValueError(f"{len(lengths)} lengths but {len(groups)} groups")
        starts = [0, *itertools.accumulate(lengths)]
        # Sequences that may share a bucket have the same key; None is the common pool.
        pools: dict[int | None, list[int]] = {}
        for s, g in enumerate(groups):
            pools.setdefault(g if separate_groups or g in prefix_groups else None, []).append(s)
        buckets, row = [], 0
        for members in (part for pool in pools.values() for part in _split_by_length(pool, lengths)):
            bucket = _make_bucket(members, lengths, groups, starts=starts, row=row, device=device)
            buckets.append(bucket)
            row += bucket.tokens.numel()
        cu_seqlens = torch.tensor(starts, dtype=torch.int32, device=device)
        return cls(
            lengths,
            groups,
            cu_seqlens,
            buckets=tuple(buckets),
            separate_groups=separate_groups,
            prefix_groups=frozenset(prefix_groups),
        )

    def head_index(self, kv_heads: int, per_kv: int) -> HeadIndex:
        """Index tensors for ``kv_heads * per_kv`` heads. The first call makes them."""
        key = (kv_heads, per_kv)
        if key not in self.indices:
            self.indices[key] = self._head_index(kv_heads, per_kv)
        return self.indices[key]

    def _head_index(self, kv_heads: int, per_kv: int) -> HeadIndex:
        heads, device = kv_heads * per_kv, self.cu_seqlens.device
        head_no = torch.arange(heads, device=device).view(1, kv_heads, 1, per_kv)
        gather, real = [], []
        for bucket in self.buckets:
            gather.append((bucket.tokens[:, None, :, None] * heads + head_no).flatten())
            ends = torch.tensor(bucket.lengths, device=device)[:, None, None, None]
            inside = torch.arange(bucket.length, device=device)[None, None, :, None] < ends
            real.append(inside.expand(-1, kv_heads, -1, per_kv).flatten())
        index, is_real = torch.cat(gather), torch.cat(real)
        rows = is_real.nonzero().flatten()
        inverse = torch.empty(self.tokens * heads, dtype=torch.int64, device=device)
        inverse[index[rows]] = rows
        pads = None if len(rows) == len(index) else (~is_real).nonzero().flatten()
        return HeadIndex(index, inverse, pads)


def _split_by_length(pool: list[int], lengths: Sequence[int]) -> Iterator[list[int]]:
    """Take the longest first, and close a bucket when its padding would cost more than another bucket."""
    bucket: list[int] = []
    waste = 0
    for s in sorted(pool, key=lambda s: -lengths[s]):
        if bucket:
            waste += lengths[bucket[0]] ** 2 - lengths[s] ** 2
            if waste > BUCKET_OVERHEAD:
                yield bucket
                bucket, waste = [], 0
        bucket.append(s)
    yield bucket


def _make_bucket(
    members: list[int],
    lengths: Sequence[int],
    groups: Sequence[int],
    starts: Sequence[int],
    row: int,
    device: torch.device | str,
) -> Bucket:
    own = tuple(lengths[s] for s in members)
    length = max(own)
    first = torch.tensor([starts[s] for s in members])[:, None]
    last = first + torch.tensor(own)[:, None] - 1
    tokens = torch.minimum(first + torch.arange(length), last).to(device)
    of_groups = {groups[s] for s in members}
    group = of_groups.pop() if len(of_groups) == 1 else None
    return Bucket(tuple(members), own, length, group=group, start=row, tokens=tokens)


def pack(x: Tensor, layout: SequenceLayout, kv_heads: int, dtype: torch.dtype | None = None) -> Tensor:
    """Stream [H, N, D] -> padded rows [M * H, D] in the buckets' order (b, K, T, G), in x's dtype or another."""
    heads, n, dim = x.shape
    if is_plain(layout):
        rows = empty(x, (kv_heads, n, heads // kv_heads, dim), dtype)
        return rows.copy_(x.unflatten(0, (kv_heads, -1)).transpose(1, 2)).view(heads * n, dim)
    rows = x.transpose(0, 1).reshape(n * heads, dim)  # a view of what a projection gives: memory order [N, H, D]
    return rows.index_select(0, layout.head_index(kv_heads, heads // kv_heads).gather).to(dtype or x.dtype)


def unpack(rows: Tensor, layout: SequenceLayout, kv_heads: int, heads: int, dtype: torch.dtype | None = None) -> Tensor:
    """Padded rows [M * H, D] -> stream [N, H, D], contiguous, in the dtype of the rows or another."""
    n, dim = layout.tokens, rows.shape[1]
    if is_plain(layout):
        out = empty(rows, (n, kv_heads, heads // kv_heads, dim), dtype)
        return out.copy_(rows.view(kv_heads, n, -1, dim).transpose(0, 1)).view(n, heads, dim)
    found = rows.index_select(0, layout.head_index(kv_heads, heads // kv_heads).inverse)
    return found.view(n, heads, dim).to(dtype or rows.dtype)


def is_plain(layout: SequenceLayout) -> bool:
    """Whether the stream is one sequence, and so the only block. (Never in exact mode, where a sequence must take the
    same path alone and together with others.)"""
    return len(layout.lengths) == 1 and not layout.separate_groups


def block(rows: Tensor, bucket: Bucket, kv_heads: int, heads: int) -> Tensor:
    """The bucket's part of the padded rows, as [b * K, T * G, D]."""
    size = bucket.tokens.numel() * heads
    return rows.narrow(0, bucket.start * heads, size).view(len(bucket.lengths) * kv_heads, -1, rows.shape[1])
