"""Attention of one new token per row against a cache of keys and values. Letters as in ``weft.ops.attention``."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from weft.ops.products import products_in


def cap_and_bias(scores: Tensor, position: Tensor, alibi_slopes: Tensor | None, softcap: float | None) -> Tensor:
    """Apply the soft cap and ALiBi to scores [H, I, J] of keys at position [J]; returns [H, I, J]."""
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_slopes.to(scores.dtype)[:, None, None] * position.to(scores.dtype)
    return scores


def softmax_with_sinks(scores: Tensor, sinks: Tensor | None) -> Tensor:
    """Softmax of scores [H, I, J] beside one sink per head, [H] (None: no sinks); returns [H, I, J]."""
    if sinks is None:
        return scores.softmax(-1)
    column = sinks.to(scores.dtype)[:, None, None].expand(-1, scores.shape[1], 1)
    return torch.cat([scores, column], -1).softmax(-1)[..., :-1]


def gather_blocks(pool: Tensor, blocks: Tensor, block_tokens: int) -> Tensor:
    """The rows of a pool [K, S, D] that lie in blocks of ``block_tokens``, as one cache per sequence.

    Args:
        pool: S is a multiple of ``block_tokens``.
        blocks: [B, P] int64, the numbers of each sequence's blocks, in order.

    Returns:
        [K, B, P * block_tokens, D].
    """
    heads, _, dim = pool.shape
    count, each = blocks.shape
    wide = pool.view(heads, -1, block_tokens * dim).index_select(1, blocks.flatten())
    return wide.view(heads, count, each * block_tokens, dim)


def gather_blocks_ref(pool: Tensor, blocks: Tensor, block_tokens: int) -> Tensor:
    """``gather_blocks`` one row at a time, [K, B, P * block_tokens, D]."""
    rows = [[pool[:, int(b) * block_tokens + i] for b in own for i in range(block_tokens)] for own in blocks]
    return torch.stack([torch.stack(own, 1) for own in rows], 1)


def _distance(lengths: Tensor | None, size: int, device: torch.device) -> Tensor:
    """How far back each of ``size`` keys lies, [B, T]."""
    last = torch.tensor([size], device=device) if lengths is None else lengths
    return last[:, None] - 1 - torch.arange(size, device=device)


def hidden_keys(lengths: Tensor | None, size: int, sliding_window: int | None, device: torch.device) -> Tensor:
    """Which of ``size`` keys the rows do not see, [B, T] bool; ``lengths`` [B] as in ``decode_attention``."""
    distance = _distance(lengths, size, device)
    return distance < 0 if sliding_window is None else (distance < 0) | (distance >= sliding_window)


def decode_attention(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor | None,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    hidden: Tensor | None = None,
) -> Tensor:
    """Attention of one new token per row, q [B, H, D], to the keys in the row's cache.

    Args:
        q: [B, H, D].
        k_cache: [K, B, T, D].
        v_cache: [K, B, T, D].
        lengths: [B] int64, at least 1. Row b sees its first ``lengths[b]`` keys; the last of them is the token's own.
            What lies beyond may be anything finite. None: all rows see all keys.
        alibi_slopes: [H].
        sinks: [H], one more score per head.
        hidden: [B, T] of ``hidden_keys``, if the caller has it; all layers share it.

    Returns:
        [B, H, D].
    """
    dtype = q.dtype
    q, k_cache, v_cache = (x.to(products_in(q)) for x in (q, k_cache, v_cache))
    rows, heads, dim = q.shape
    kv_heads, size = k_cache.shape[0], k_cache.shape[2]
    wide = torch.promote_types(q.dtype, torch.float32)
    queries = q.view(rows, kv_heads, -1, dim).transpose(0, 1)
    scores = torch.matmul(queries, k_cache.transpose(2, 3)).to(wide) * scale  # [K, B, G, T]
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        distance = _distance(lengths, size, q.device)
        scores = scores - alibi_slopes.to(wide).view(kv_heads, 1, -1, 1) * distance.to(wide)[:, None]
    if hidden is None and (lengths is not None or (sliding_window is not None and sliding_window < size)):
        hidden = hidden_keys(lengths, size, sliding_window, q.device)
    if hidden is not None:
        scores = scores.masked_fill(hidden[:, None], -math.inf)
    if sinks is not None:
        column = sinks.to(wide).view(kv_heads, 1, -1, 1).expand(-1, rows, -1, -1)
        scores = torch.cat([scores, column], -1)
    p = scores.softmax(-1)[..., :size].to(q.dtype)
    return torch.matmul(p, v_cache).transpose(0, 1).reshape(rows, heads, dim).to(dtype)


def decode_attention_ref(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    lengths: Tensor,
    *,
    scale: float,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """``decode_attention`` one row at a time: the last row, [H, D], of a full attention over the row's own keys."""
    wide = torch.promote_types(q.dtype, torch.float32)
    per_kv, outs = q.shape[1] // k_cache.shape[0], []
    for row, length in enumerate(lengths.tolist()):
        first = 0 if sliding_window is None else max(0, length - sliding_window)
        keys = k_cache[:, row, first:length].to(wide).repeat_interleave(per_kv, 0)
        values = v_cache[:, row, first:length].to(wide).repeat_interleave(per_kv, 0)
        scores = q[row, :, None].to(wide) @ keys.transpose(1, 2) * scale  # [H, 1, J]
        scores = cap_and_bias(scores, torch.arange(first, length, device=q.device), alibi_slopes, softcap)
        outs.append((softmax_with_sinks(scores, sinks) @ values)[:, 0])
    return torch.stack(outs).to(q.dtype)
