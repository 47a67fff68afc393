"""A Llama block's norms, rotary positions, and linears with LoRA on them, as single autograd nodes for a CPU.

As separate torch operations, each of these reads and writes whole [N, d] tensors from memory several times, casts them
to fp32 and back, and keeps the intermediate results for the backward pass. Here rows go in blocks that stay in the
cache through all steps, and only inputs are kept. Notation: N rows, d their width. (SwiGLU is here for memory alone:
computing silu twice takes as long as the blocks save.)

No function writes into a tensor that it was given: a second backward pass over a retained graph is right.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.autograd import Context
from weft.ops.kept import kept
from weft.ops.memory import empty
from weft.ops.products import add_product_, linear, multiply

BLOCK = 2**18  # numbers per block: 1 MiB in fp32, of which every core's L2 holds its share (measured)


def _wide(dtype: torch.dtype) -> torch.dtype:
    return torch.promote_types(dtype, torch.float32)


def _blocks(rows: int, width: int) -> Iterator[slice]:
    step = max(1, BLOCK // width)
    for start in range(0, rows, step):
        yield slice(start, min(start + step, rows))


def _is_small(x: Tensor) -> bool:
    """Whether nothing is kept and x is one block, as where text is written: a node and its blocks cost more there."""
    return x.numel() <= BLOCK and not torch.is_grad_enabled()


class _RmsNorm(torch.autograd.Function):
    """It keeps x and the rows' 1 / rms [N, 1]."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, weight: Tensor, eps: float) -> Tensor:
        n, d = x.shape
        out, rstd = empty(x), x.new_empty(n, 1, dtype=_wide(x.dtype))
        block = min(n, max(1, BLOCK // d))
        h, square = (x.new_empty(block, d, dtype=rstd.dtype) for _ in range(2))
        for rows in _blocks(n, d):
            size = rows.stop - rows.start
            h_b, r_b, out_b = h[:size].copy_(x[rows]), rstd[rows], out[rows]
            torch.mean(torch.mul(h_b, h_b, out=square[:size]), -1, keepdim=True, out=r_b)
            r_b.add_(eps).rsqrt_()
            out_b.copy_(h_b.mul_(r_b)).mul_(weight)
        ctx.save_for_backward(x, rstd, weight)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_out: Tensor) -> tuple[Tensor, None, None]:
        """With h = x rstd and g = weight dy:  dx = rstd (g - h mean(g h))."""
        x, rstd, weight = ctx.saved_tensors
        n, d = x.shape
        dx = empty(x)
        block = min(n, max(1, BLOCK // d))
        h, g, product = (x.new_empty(block, d, dtype=rstd.dtype) for _ in range(3))
        scaled = x.new_empty(block, d)
        for rows in _blocks(n, d):
            size = rows.stop - rows.start
            r_b = rstd[rows]
            h_b = h[:size].copy_(x[rows]).mul_(r_b)
            g_b = g[:size].copy_(torch.mul(d_out[rows], weight, out=scaled[:size]))
            mean = torch.mul(g_b, h_b, out=product[:size]).mean(-1, keepdim=True)
            dx[rows].copy_(g_b.addcmul_(h_b, mean, value=-1).mul_(r_b))
        return dx, None, None


def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``weight * (x / sqrt(mean(x^2) + eps))`` (Zhang & Sennrich 2019), for a frozen weight.

    x [..., d] and weight [d] have one dtype, and so has the result, [..., d]. The quotient is computed in fp32 (fp64
    for fp64) and rounded to x's dtype before the weight multiplies it, as in transformers' LlamaRMSNorm.
    """
    if _is_small(x):
        return rms_norm_ref(x, weight, eps)
    return _RmsNorm.apply(x.reshape(-1, x.shape[-1]).contiguous(), weight, eps).view_as(x)


def rms_norm_ref(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    """``rms_norm`` operation by operation; [..., d] too."""
    h = x.to(_wide(x.dtype))
    h = h * torch.rsqrt(h.pow(2).mean(-1, keepdim=True) + eps)
    return weight * h.to(x.dtype)


class _SwiGlu(torch.autograd.Function):
    """It keeps gate and up, but not silu(gate)."""

    @staticmethod
    def forward(ctx: Context, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.ops.aten.silu.out(gate, out=empty(gate)).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_out: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        d_up = torch.ops.aten.silu.out(gate, out=empty(gate)).mul_(d_out)
        d_gate = torch.mul(d_out, up, out=empty(gate))
        torch.ops.aten.silu_backward.grad_input(d_gate, gate, grad_input=d_gate)
        return d_gate, d_up


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """``silu(gate) * up`` (Shazeer 2020), all of shape [..., d]."""
    return torch.nn.functional.silu(gate).mul_(up) if _is_small(gate) else _SwiGlu.apply(gate, up)


def swiglu_ref(gate: Tensor, up: Tensor) -> Tensor:
    """``swiglu`` operation by operation; [..., d] too."""
    return torch.nn.functional.silu(gate) * up


def _rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """x cos + rotate_half(x) sin, of x [N, H, D], cos and sin [N, 1, D]."""
    half = x.shape[-1] // 2
    out = empty(x)
    for rows in _blocks(x.shape[0], x.shape[1] * x.shape[2]):
        x_b, out_b, sin_b = x[rows], out[rows], sin[rows]
        torch.mul(x_b, cos[rows], out=out_b)
        out_b[..., :half].addcmul_(x_b[..., half:], sin_b[..., :half], value=-1)
        out_b[..., half:].addcmul_(x_b[..., :half], sin_b[..., half:])
    return out


class _Rotary(torch.autograd.Function):
    """It keeps cos and sin, which all layers share. The gradient is the rotation back: dx = dy cos + R^T (dy sin)."""

    @staticmethod
    def forward(ctx: Context, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        ctx.save_for_backward(cos, sin)
        return _rotate(x, cos, sin)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_out: Tensor) -> tuple[Tensor, None, None]:
        cos, sin = ctx.saved_tensors
        # R^T (dy sin) = -R(dy swapped(sin)); the halves of sin are swapped because R moves them along with dy.
        return _rotate(d_out.contiguous(), cos, -sin.roll(sin.shape[-1] // 2, -1)), None, None


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotary positions (Su et al. 2021) in the half-split form of GPT-NeoX and Llama.

    x is [N, H, D] (a projection's memory order), cos and sin are [N, D]; returns [N, H, D].
    """
    x, cos, sin = x.contiguous(), cos[:, None], sin[:, None]
    return _rotate(x, cos, sin) if _is_small(x) else _Rotary.apply(x, cos, sin)


def rotary_ref(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """``rotary`` operation by operation; [N, H, D] too."""
    first, second = x.chunk(2, -1)
    return x * cos[:, None] + torch.cat([-second, first], -1) * sin[:, None]


@dataclass(frozen=True)
class Piece:
    """Rows ``begin`` to ``end`` of a stream, and the linears (by number) that have a low-rank update there."""

    begin: int
    end: int
    linears: tuple[int, ...] = ()
    scalings: tuple[float, ...] = ()


class _LinearsContext(Context, Protocol):
    pieces: Sequence[Piece]
    count: int
    shape: torch.Size
    dtypes: list[torch.dtype]


@dataclass(frozen=True)
class _Update:
    """``y[rows] += s z B^T`` with z [n, r] and B [out, r]; without z nothing is added there."""

    rows: slice
    z: Tensor | None = None
    b: Tensor | None = None
    scaling: float = 1.0


def _updated(x: Tensor, weight: Tensor, bias: Tensor | None, updates: Sequence[_Update]) -> Tensor:
    """One linear [N, out] of x [N, in] with its updates, which cover all rows."""
    out = empty(x, (len(x), len(weight)))
    for update in updates:
        y = out[update.rows]
        if update.z is None or update.b is None:
            y[:] = 0.0 if bias is None else bias
            continue
        if bias is not None:
            y.copy_(bias)
        add_product_(y, update.z, update.b.t(), alpha=update.scaling, beta=0 if bias is None else 1)
    add_product_(out, x, weight.t())
    return out


class _LowRankLinears(torch.autograd.Function):
    """The arguments after ``count`` are weights, biases (or None), then A and B of each piece's updates in turn.

    It keeps x, every z = x A^T and the factors in x's dtype. z of one piece's updates is one product, and so is their
    share of dx and of dA. The large product comes last and adds what is there in its own fp32 accumulators.
    """

    @staticmethod
    def forward(
        ctx: _LinearsContext, x: Tensor, pieces: Sequence[Piece], count: int, *tensors: Any
    ) -> tuple[Tensor, ...]:
        weights, biases = tensors[:count], tensors[count : 2 * count]
        factors = [f.to(x.dtype) for f in tensors[2 * count :] if f is not None]
        touched = {i for piece in pieces for i in piece.linears}
        updates: dict[int, list[_Update]] = {i: [] for i in touched}
        saved: list[Tensor] = []
        at = 0
        for piece in pieces:
            rows = slice(piece.begin, piece.end)
            for i in touched.difference(piece.linears):
                updates[i].append(_Update(rows))
            if not piece.linears:
                continue
            mine = factors[at : at + 2 * len(piece.linears)]
            at += len(mine)
            stacked = torch.cat(mine[::2])  # A of all updates, [R, in]
            z = multiply(x[rows], stacked.t())
            parts = z.split([len(a) for a in mine[::2]], 1)
            for i, s, z_i, b in zip(piece.linears, piece.scalings, parts, mine[1::2], strict=True):
                updates[i].append(_Update(rows, z_i, b, s))
            saved += [stacked, z, *mine[1::2]]
        ys = [
            kept(partial(_updated, x, w, bias, updates[i]), x.shape[1]) if i in touched else linear(x, w, bias)
            for i, (w, bias) in enumerate(zip(weights, biases, strict=True))
        ]
        ctx.save_for_backward(*([x] if touched else []), *saved, *weights)
        ctx.pieces, ctx.count, ctx.shape = pieces, count, x.shape
        ctx.dtypes = [f.dtype for f in tensors[2 * count :] if f is not None]
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: _LinearsContext, *d_ys: Tensor) -> tuple[Tensor | None, ...]:
        """dz = s dy B,  dA = dz^T x,  dB = s dy^T z,  dx = sum over linears of dz A + dy W."""
        saved = list(ctx.saved_tensors)  # once: under checkpointing every look at them unpacks again
        weights = [saved.pop() for _ in range(ctx.count)][::-1]
        x = saved.pop(0) if saved else d_ys[0]  # only pieces with updates read it
        dx = empty(d_ys[0], ctx.shape) if ctx.needs_input_grad[0] else None
        gradients: list[Tensor] = []
        updated = any(piece.linears for piece in ctx.pieces)
        for piece in ctx.pieces:
            rows = slice(piece.begin, piece.end)
            if not piece.linears:
                if dx is not None and updated:
                    dx[rows] = 0.0
                continue
            stacked, z, *bs = (saved.pop(0) for _ in range(2 + len(piece.linears)))
            dz = torch.empty_like(z)
            ranks = [b.shape[1] for b in bs]
            d_bs = []
            parts = zip(piece.linears, piece.scalings, z.split(ranks, 1), dz.split(ranks, 1), bs, strict=True)
            for i, s, z_i, dz_i, b in parts:
                dy = d_ys[i][rows]
                dz_i.copy_(multiply(dy, b)).mul_(s)
                d_bs.append(multiply(z_i.t(), dy).t().to(torch.promote_types(b.dtype, torch.float32)).mul_(s))
            d_as = multiply(dz.t(), x[rows]).split(ranks)
            gradients += [g for pair in zip(d_as, d_bs, strict=True) for g in pair]
            if dx is not None:
                add_product_(dx[rows], dz, stacked, beta=0)
        if dx is not None:
            for i, (dy, w) in enumerate(zip(d_ys, weights, strict=True)):
                add_product_(dx, dy, w, beta=1 if i or updated else 0)
        cast = (g.to(dtype) for g, dtype in zip(gradients, ctx.dtypes, strict=True))
        return dx, None, None, *(None,) * (2 * ctx.count), *cast


def low_rank_linears(
    x: Tensor,
    linears: Sequence[tuple[Tensor, Tensor | None]],
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """Several frozen linears of one input, each with LoRA updates on its own rows:

        y_i = x W_i^T + bias_i,   and on the rows of a piece that updates linear i:   y_i += s (x A^T) B^T.

    Args:
        x: [N, in].
        linears: W_i [out_i, in] and bias_i [out_i] or None. They get no gradients.
        pieces: They cover the rows 0 .. N in order.
        factors: A [r, in] and B [out_i, r] of every update, in the order of the pieces and, within one, of its
            linears. Any floating dtype.

    Returns:
        [N, out_i] per linear.
    """
    if not factors and _is_small(x):
        return tuple(linear(x, w, bias) for w, bias in linears)
    weights, biases = [w for w, _ in linears], [bias for _, bias in linears]
    return _LowRankLinears.apply(x, pieces, len(linears), *weights, *biases, *factors)


def low_rank_linears_ref(
    x: Tensor,
    linears: Sequence[tuple[Tensor, Tensor | None]],
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """``low_rank_linears`` as the equation has it; [N, out_i] per linear too."""
    ys = [torch.nn.functional.linear(x, w, bias) for w, bias in linears]
    at = iter(factors)
    for piece in pieces:
        inside = torch.zeros(len(x), 1, dtype=x.dtype, device=x.device)
        inside[piece.begin : piece.end] = 1.0
        for i, s in zip(piece.linears, piece.scalings, strict=True):
            a, b = next(at).to(x.dtype), next(at).to(x.dtype)
            ys[i] = ys[i] + inside * (s * (x @ a.t()) @ b.t())
    return tuple(ys)
