"""Attention over a padding-free stream: sequences lie end to end, and no token sees another sequence.

Notation: ``N`` tokens in the stream, ``S`` sequences, ``H`` query heads, ``K`` key/value heads, ``G = H / K`` query
heads per key/value head, ``D`` head size, ``P`` prefix rows, ``T`` length of a bucket, ``b`` its number of sequences.
For query ``i`` and key ``j`` of one sequence (both counted with the prefix)

    s_ij = scale * q_i . k_j,   s_ij <- c * tanh(s_ij / c),   s_ij <- s_ij + slope_h * j,
    o_i = sum_j softmax_j(s_ij) v_j      over the visible j:  j <= i  and  i - j < window;  not causal: every j.

An attention sink (Xiao et al. 2023; gpt-oss) is one more score z_h per head in the softmax, whose value is zero: the
probabilities of a query then sum to less than one.

What makes it fast on a CPU: sequences of similar length form a *bucket*; one gather turns the whole stream into the
buckets' right-padded blocks ``[b, K, T * G, D]``, and each block is a few batched matrix products. Causal attention
needs no mask for the padding, since a real query never looks at a later key. Without causality a mask hides the pad
keys. Pad queries are dropped; their output gradient is zero.
The ``G`` query heads of a key/value head are rows of one product, so keys and values are never repeated. Queries go in
chunks, so that no score block is larger than ``chunk x T``, and the blocks above the diagonal are never computed.
The probabilities are recomputed in the backward pass: only q, k and v are kept.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.autograd import Context
from weft.ops.decoding import cap_and_bias, softmax_with_sinks
from weft.ops.kept import DEAR, kept
from weft.ops.memory import empty
from weft.ops.products import products_in
from weft.ops.sequence_layout import Bucket, SequenceLayout, block, is_plain, pack, unpack

QUERY_CHUNK = 128  # queries per score block; longer sequences are cut (measured, see benchmarks/attention.py)


@dataclass(frozen=True, eq=False)
class _Scores:
    """The rule by which q . k becomes probabilities, for every block of one call."""

    layout: SequenceLayout
    kv_heads: int
    scale: float
    _: KW_ONLY
    window: int | None
    softcap: float | None
    slopes: Tensor | None
    causal: bool = True
    sinks: Tensor | None = None

    def chunks(self, length: int, before: int) -> Iterator[tuple[int, int, int, int]]:
        """(first query, end query, first key, end key) of each score block of a bucket; keys count the ``before``
        prefix rows. In causal attention the block's last key is the one of its last query."""
        for i0 in range(0, length, QUERY_CHUNK):
            i1 = min(i0 + QUERY_CHUNK, length)
            first_key = 0 if self.window is None else max(0, before + i0 - self.window + 1)
            yield i0, i1, first_key, before + (i1 if self.causal else length)

    def pads(self, bucket: Bucket, before: int, like: Tensor) -> Tensor | None:
        """[b * K, 1, before + T] of 0 and -inf, which hides the pad keys; None without any. The layout keeps it."""
        if min(bucket.lengths) == bucket.length:
            return None
        cache, key = self.layout.masks, ("pads", bucket.start, before, self.kv_heads, like.dtype)
        if key not in cache:
            ends = torch.tensor(bucket.lengths, device=like.device)[:, None] + before
            hidden = torch.arange(before + bucket.length, device=like.device) >= ends
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)
            cache[key] = mask[:, None].repeat_interleave(self.kv_heads, 0)
        return cache[key]

    def mask(self, i0: int, i1: int, j0: int, per_kv: int, like: Tensor) -> Tensor:
        """[(i1 - i0) * G, i1 - j0] of 0 and -inf. The layout keeps it, since every layer asks for it twice."""
        cache, key = self.layout.masks, ("mask", i1 - i0, i0 - j0, per_kv, self.window, like.dtype)
        if key not in cache:
            distance = torch.arange(i0, i1, device=like.device)[:, None] - torch.arange(j0, i1, device=like.device)
            hidden = distance < 0 if self.window is None else (distance < 0) | (distance >= self.window)
            mask = torch.zeros(hidden.shape, dtype=like.dtype, device=like.device).masked_fill_(hidden, -math.inf)
            cache[key] = mask.repeat_interleave(per_kv, 0)
        return cache[key]

    def bias(self, i0: int, i1: int, j0: int, dtype: torch.dtype) -> Tensor:
        """[K, (i1 - i0) * G, i1 - j0]: slope * (j - i). It differs from slope * j by a constant per row, which softmax
        ignores. It is small, and so precise, at the keys near the query, where it matters."""
        assert self.slopes is not None
        device = self.slopes.device
        distance = torch.arange(j0, i1, device=device) - torch.arange(i0, i1, device=device)[:, None]
        slopes = self.slopes.to(dtype).view(self.kv_heads, 1, -1, 1)
        return (slopes * distance.to(dtype)[None, :, None, :]).flatten(1, 2)

    def sink(self, scores: Tensor, queries: int) -> Tensor:
        """[b * K, queries * G, 1]: each query head's sink, laid out as the rows of ``scores``."""
        assert self.sinks is not None
        own = self.sinks.detach().to(scores.dtype).view(1, self.kv_heads, 1, -1)
        return own.expand(len(scores) // self.kv_heads, -1, queries, -1).reshape(len(scores), -1, 1)

    def hide(self, scores: Tensor, bucket: Bucket, before: int, i0: int, i1: int, j0: int) -> None:
        """Put -inf where the keys j0 .. of a score block are hidden from the queries i0 .. i1-1 (own tokens only)."""
        if not self.causal:
            pads = self.pads(bucket, before, scores)
            if pads is not None:
                scores.add_(pads)
            return
        i0, i1, per_kv = before + i0, before + i1, scores.shape[1] // (i1 - i0)
        # Without a window only the columns beyond the first query hold anything to hide.
        d0 = i0 if self.window is None else j0
        scores[:, :, d0 - j0 :].add_(self.mask(i0, i1, d0, per_kv, scores))

    def probabilities(
        self, q: Tensor, k: Tensor, bucket: Bucket, before: int, i0: int, i1: int, j0: int
    ) -> tuple[Tensor, Tensor | None]:
        """One score block: q [b * K, C * G, D] are the queries i0 .. i1-1, k [b * K, J, D] the keys from j0 on.

        Returns the probabilities [b * K, C * G, J] and, with a softcap, tanh(s / c) of the same shape (for backward).
        Scores stay in the input's dtype unless a bias or a cap is added to them; torch's softmax computes in fp32.
        """
        if self.slopes is None and self.softcap is None and self.sinks is None:
            scores = torch.baddbmm(q.new_empty(()), q, k.transpose(1, 2), beta=0, alpha=self.scale)
            self.hide(scores, bucket, before, i0, i1=i1, j0=j0)
            return scores.softmax(-1), None
        tanh = None
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = torch.bmm(q, k.transpose(1, 2)).to(wide) * self.scale
        if self.softcap is not None:
            tanh = (scores / self.softcap).tanh_()
            scores = tanh * self.softcap
        if self.slopes is not None:
            scores.unflatten(0, (-1, self.kv_heads)).add_(self.bias(before + i0, before + i1, j0, wide))
        self.hide(scores, bucket, before, i0, i1=i1, j0=j0)
        if self.sinks is None:
            return scores.softmax(-1).to(q.dtype), tanh
        # The backward formula needs no term for the sink: its value, and so its d_out . v, is zero.
        with_sink = torch.cat([scores, self.sink(scores, i1 - i0)], -1)
        return with_sink.softmax(-1)[..., :-1].to(q.dtype), tanh

    def forward(self, q: Tensor, k: Tensor, v: Tensor, out: Tensor, bucket: Bucket) -> None:
        """Fill out [B, T * G, D] of one bucket from q [B, T * G, D], k and v [B, P + T, D] (B = b * K)."""
        length = bucket.length
        per_kv, before = q.shape[1] // length, k.shape[1] - length
        for i0, i1, j0, j1 in self.chunks(length, before):
            rows, keys = slice(i0 * per_kv, i1 * per_kv), slice(j0, j1)
            p, _ = self.probabilities(q[:, rows], k[:, keys], bucket, before, i0=i0, i1=i1, j0=j0)
            out[:, rows].baddbmm_(p, v[:, keys], beta=0)

    def backward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        d_out: Tensor,
        gradients: tuple[Tensor, Tensor, Tensor],
        bucket: Bucket,
        d_sinks: Tensor | None = None,
    ) -> None:
        """Fill ``gradients`` (dq, dk, dv) of one bucket, and add to d_sinks [H]; shapes as in ``forward``.

        dP = dO V^T;  dS = P * (dP - rowsum(P * dP));  dQ = scale dS K;  dK = scale dS^T Q;  dV = P^T dO.
        A sink has probability 1 - rowsum(P) and value zero:  dz = -(1 - rowsum(P)) rowsum(P * dP).
        """
        dq, dk, dv = gradients
        length = bucket.length
        per_kv, before = q.shape[1] // length, k.shape[1] - length
        chunks = list(self.chunks(length, before))
        beta = 0 if len(chunks) == 1 and chunks[0][2] == 0 else 1  # 0: the only block covers every key
        if beta:
            dk.zero_()
            dv.zero_()
        for i0, i1, j0, j1 in chunks:
            rows, keys = slice(i0 * per_kv, i1 * per_kv), slice(j0, j1)
            q_c, d_out_c, k_c = q[:, rows], d_out[:, rows], k[:, keys]
            p, tanh = self.probabilities(q_c, k_c, bucket, before, i0=i0, i1=i1, j0=j0)
            dv[:, keys].baddbmm_(p.transpose(1, 2), d_out_c, beta=beta)
            dp = torch.bmm(d_out_c, v[:, keys].transpose(1, 2))
            if d_sinks is not None:
                wide = d_sinks.dtype
                rest = (p.sum(-1, dtype=wide) - 1) * (p.to(wide) * dp.to(wide)).sum(-1)
                d_sinks += rest.view(-1, self.kv_heads, i1 - i0, per_kv).sum((0, 2)).flatten()
            ds = torch._softmax_backward_data(dp, p, -1, p.dtype)
            if tanh is not None:
                ds = (ds * (1 - tanh * tanh)).to(p.dtype)
            dk[:, keys].baddbmm_(ds.transpose(1, 2), q_c, beta=beta, alpha=self.scale)
            dq[:, rows].baddbmm_(ds, k_c, beta=0, alpha=self.scale)


def _with_prefix(own: Tensor, prefix: Tensor | None) -> Tensor:
    """[b * K, T, D] and [K, P, D] -> [b * K, P + T, D]."""
    if prefix is None:
        return own
    return torch.cat([prefix.repeat(own.shape[0] // prefix.shape[0], 1, 1), own], 1)


def _attended(
    q: Tensor, k: Tensor, v: Tensor, scores: _Scores, slots: dict[int | None, int], prefix: tuple[Tensor, ...]
) -> Tensor:
    """What ``varlen_attention`` gives, [N, H, D]; it makes no graph."""
    layout, heads, kv_heads = scores.layout, q.shape[0], k.shape[0]
    q_rows, k_rows, v_rows = (pack(x, layout, kv_heads, products_in(q)) for x in (q, k, v))
    out_rows = empty(q_rows)
    for bucket in layout.buckets:
        q_b, out_b = (block(x, bucket, kv_heads, heads) for x in (q_rows, out_rows))
        k_b, v_b = (block(x, bucket, kv_heads, kv_heads) for x in (k_rows, v_rows))
        if (at := slots.get(bucket.group)) is not None:
            k_b, v_b = _with_prefix(k_b, prefix[at]), _with_prefix(v_b, prefix[at + 1])
        scores.forward(q_b, k_b, v_b, out_b, bucket)
    return unpack(out_rows, layout, kv_heads, heads, q.dtype)


class _Context(Context, Protocol):
    scores: _Scores
    slots: dict[int | None, int]


class _VarlenAttention(torch.autograd.Function):
    """Keeps q, k, v and the prefix; recomputes the probabilities, block by block, in the backward pass.

    ``slots`` tells for each group where its keys stand in ``prefix``; its values stand right after them.
    """

    @staticmethod
    def forward(
        ctx: _Context,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        scores: _Scores,
        slots: dict[int | None, int],
        sinks: Tensor | None,
        *prefix: Tensor,
    ) -> Tensor:
        ctx.scores, ctx.slots = scores, slots
        ctx.save_for_backward(q, k, v, *prefix)
        # Dear, however short the texts are: two products over every pair of tokens.
        return kept(lambda: _attended(q, k, v, scores, slots, prefix), DEAR + 1)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, d_out: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, *prefix = ctx.saved_tensors
        scores, slots = ctx.scores, ctx.slots
        layout, heads, kv_heads = scores.layout, q.shape[0], k.shape[0]
        work = products_in(q)
        q_rows, k_rows, v_rows, do_rows = (pack(x, layout, kv_heads, work) for x in (q, k, v, d_out.transpose(0, 1)))
        if not is_plain(layout) and (pads := layout.head_index(kv_heads, heads // kv_heads).pads) is not None:
            do_rows.index_fill_(0, pads, 0.0)  # a pad query must not reach the keys' gradients
        dq_rows, dk_rows, dv_rows = (empty(x) for x in (q_rows, k_rows, v_rows))
        d_prefix: list[Tensor | None] = [None] * len(prefix)
        d_sinks = None
        if scores.sinks is not None and ctx.needs_input_grad[5]:
            d_sinks = torch.zeros(heads, dtype=torch.promote_types(q.dtype, torch.float32), device=q.device)
        for bucket in layout.buckets:
            q_b, do_b, dq_b = (block(x, bucket, kv_heads, heads) for x in (q_rows, do_rows, dq_rows))
            k_b, v_b, dk_b, dv_b = (block(x, bucket, kv_heads, kv_heads) for x in (k_rows, v_rows, dk_rows, dv_rows))
            if (at := slots.get(bucket.group)) is None:
                scores.backward(q_b, k_b, v_b, do_b, (dq_b, dk_b, dv_b), bucket=bucket, d_sinks=d_sinks)
                continue
            k_b, v_b = _with_prefix(k_b, prefix[at]), _with_prefix(v_b, prefix[at + 1])
            dk_all, dv_all = torch.empty_like(k_b), torch.empty_like(v_b)
            scores.backward(q_b, k_b, v_b, do_b, (dq_b, dk_all, dv_all), bucket=bucket, d_sinks=d_sinks)
            for place, d_all, d_own in ((at, dk_all, dk_b), (at + 1, dv_all, dv_b)):
                before = prefix[at].shape[1]
                d_own.copy_(d_all[:, before:])
                wide = torch.promote_types(d_all.dtype, torch.float32)  # summed over sequences, so in fp32
                part = d_all[:, :before].unflatten(0, (-1, kv_heads)).sum(0, dtype=wide)
                so_far = d_prefix[place]
                d_prefix[place] = part if so_far is None else so_far + part
        dq = unpack(dq_rows, layout, kv_heads, heads, q.dtype).transpose(0, 1)
        dk, dv = (unpack(x, layout, kv_heads, kv_heads, q.dtype).transpose(0, 1) for x in (dk_rows, dv_rows))
        given = (None if d is None else d.to(x.dtype) for d, x in zip(d_prefix, prefix, strict=True))
        if d_sinks is not None and scores.sinks is not None:
            d_sinks = d_sinks.to(scores.sinks.dtype)
        return dq, dk, dv, None, None, d_sinks, *given


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    scale: float,
    prefix: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """Attention inside each sequence of the stream, by the equations at the head of this module.

    Args:
        q: [H, N, D], H a multiple of K. The memory order [N, H, D], as a projection gives it, costs least.
        k: [K, N, D].
        v: [K, N, D].
        prefix: group -> (keys [K, P, D], values [K, P, D]). Every query of the group's sequences sees them, at the
            positions 0 .. P-1. The group must be in ``layout.prefix_groups``, or the layout have ``separate_groups``.
        alibi_slopes: [H].
        sinks: [H], one more score per query head.
        causal: False lets every token of a sequence see every other. ALiBi and a window look back only: both are
            refused then.

    Returns:
        [N, H, D], contiguous, in q's dtype: what transformers' attention interface wants, less its batch dimension.

    Raises:
        ValueError: Shapes or dtypes do not agree, or the layout does not know a prefix's group.
    """
    _check(q, k, v, layout)
    if not causal and (alibi_slopes is not None or sliding_window is not None):
        raise ValueError("alibi_slopes and sliding_window are defined for causal attention only")
    slots: dict[int | None, int] = {}
    rows: list[Tensor] = []
    for group, (keys, values) in (prefix or {}).items():
        if group not in layout.groups:
            continue
        if not layout.separate_groups and group not in layout.prefix_groups:
            raise ValueError(f"group {group} has a prefix, but the layout was built without it in prefix_groups")
        slots[group] = len(rows)
        rows += [keys.to(k.dtype), values.to(v.dtype)]
    scores = _Scores(
        layout,
        k.shape[0],
        float(scale),
        window=sliding_window,
        softcap=softcap,
        slopes=alibi_slopes,
        causal=causal,
        sinks=sinks,
    )
    return _VarlenAttention.apply(q, k, v, scores, slots, sinks, *rows)


def _check(q: Tensor, k: Tensor, v: Tensor, layout: SequenceLayout) -> None:
    if q.shape[0] % k.shape[0] or k.shape[:2] != v.shape[:2] or q.shape[1] != k.shape[1] or q.shape[1] != layout.tokens:
        raise ValueError(
            f"want q [H, N, D] and k, v [K, N, D] with K dividing H and N = {layout.tokens}; "
            f"got {tuple(q.shape)}, {tuple(k.shape)}, {tuple(v.shape)}"
        )
    if not q.dtype == k.dtype == v.dtype:
        raise ValueError(f"q, k and v must have one dtype, got {q.dtype}, {k.dtype}, {v.dtype}")


def varlen_attention_ref(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    layout: SequenceLayout,
    *,
    scale: float,
    prefix: Mapping[int, tuple[Tensor, Tensor]] | None = None,
    alibi_slopes: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    causal: bool = True,
) -> Tensor:
    """``varlen_attention`` one sequence at a time, in fp32 (fp64 for fp64), every step written out; [N, H, D] too."""
    wide = torch.promote_types(q.dtype, torch.float32)
    per_kv, start, outs = q.shape[0] // k.shape[0], 0, []
    for length, group in zip(layout.lengths, layout.groups, strict=True):
        own = slice(start, start + length)
        start += length
        keys, values = k[:, own].to(wide), v[:, own].to(wide)
        if prefix is not None and group in prefix:
            keys = torch.cat([prefix[group][0].to(wide), keys], 1)
            values = torch.cat([prefix[group][1].to(wide), values], 1)
        keys, values = keys.repeat_interleave(per_kv, 0), values.repeat_interleave(per_kv, 0)
        j = torch.arange(keys.shape[1], device=q.device)
        i = j[keys.shape[1] - length :, None]
        scores = q[:, own].to(wide) @ keys.transpose(1, 2) * scale
        scores = cap_and_bias(scores, j, alibi_slopes, softcap)
        visible = (j <= i) if causal else torch.ones_like(scores, dtype=torch.bool)
        if sliding_window is not None:
            visible = visible & (i - j < sliding_window)
        outs.append(softmax_with_sinks(scores.masked_fill(~visible, -math.inf), sinks) @ values)
    return torch.cat(outs, 1).transpose(0, 1).to(q.dtype)
