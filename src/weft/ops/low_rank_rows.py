"""``weft.ops.fused.low_rank_linears`` for weights that are read piece by piece, and multiplied in fp32 on a CPU.

So are weights in few bits, and those in 16 bits where the CPU is slow in them. All that a linear's rows need is done
while its piece of the result is in the cache: the update is added there, and the sum is rounded once. It is the sum
that is kept where all else is computed again. What goes in, or comes back, is widened once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache, partial
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.autograd import Context
from weft.ops.fused import Piece, low_rank_linears_ref
from weft.ops.kept import kept
from weft.ops.memory import empty
from weft.ops.packed import PackedRows, in_pieces
from weft.ops.products import MANY, PlainRows, Rows, is_slow, scratch, widened


def rows_in_pieces(x: Tensor, weight: Tensor | PackedRows) -> Rows | None:
    """How a weight [out, in] is read for rows x [N, in]; None: the product is not made of pieces."""
    if len(x) < MANY:
        return None
    if not isinstance(weight, Tensor):
        return weight if in_pieces(x, weight.dtype) else None
    return PlainRows(weight) if is_slow(x, len(x), len(x) * weight.numel()) else None


class _Context(Context, Protocol):
    pieces: Sequence[Piece]
    linears: Sequence[Rows]
    shape: torch.Size
    dtypes: list[torch.dtype]


class _LowRankRows(torch.autograd.Function):
    """The last arguments are A and B of each piece's updates in turn. It keeps x, every z = x A^T and the factors."""

    @staticmethod
    def forward(
        ctx: _Context,
        x: Tensor,
        pieces: Sequence[Piece],
        linears: Sequence[Rows],
        biases: Sequence[Tensor | None],
        *factors: Tensor,
    ) -> tuple[Tensor, ...]:
        given = cache(partial(widened, x))  # all that needs it may be kept
        saved: list[Tensor] = []
        updates: list[list[_Update]] = [[] for _ in linears]
        for piece, mine in _by_piece(pieces, factors):
            # As everywhere, the factors are rounded to the dtype of the rows.
            stacked = torch.cat([a.to(x.dtype) for a in mine[::2]]).float()
            bs = [b.to(x.dtype).float() for b in mine[1::2]]
            rows = slice(piece.begin, piece.end)
            z = kept(partial(_first_products, given, rows, stacked), x.shape[1])
            ranks = [b.shape[1] for b in bs]
            for i, s, z_i, b in zip(piece.linears, piece.scalings, z.split(ranks, 1), bs, strict=True):
                updates[i].append((rows, s, z_i, b))
            saved += [stacked, z, *bs]
        ys = [
            kept(partial(_linear, x, given, weight, bias, own), x.shape[1])
            for weight, bias, own in zip(linears, biases, updates, strict=True)
        ]
        ctx.save_for_backward(*([x] if saved else []), *saved)
        ctx.pieces, ctx.linears, ctx.shape, ctx.dtypes = pieces, linears, x.shape, [f.dtype for f in factors]
        return tuple(ys)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, *d_ys: Tensor) -> tuple[Tensor | None, ...]:
        """dz = s dy B,  dA = dz^T x,  dB = s dy^T z,  dx = sum over linears of dz A + dy W."""
        saved = list(ctx.saved_tensors)  # once: under checkpointing every look at them unpacks again
        x = saved.pop(0) if saved else None
        kept_of, d_factors, d_zs = [], [], []
        for piece in ctx.pieces:
            if piece.linears:
                stacked, z, *bs = (saved.pop(0) for _ in range(2 + len(piece.linears)))
                kept_of.append((piece, stacked, z, bs))
                d_zs.append(torch.empty_like(z))
                d_factors.append([torch.empty(0)] * (2 * len(bs)))
        dx = scratch(ctx.shape.numel(), "out").view(ctx.shape) if ctx.needs_input_grad[0] else None
        for i, (dy, weight) in enumerate(zip(d_ys, ctx.linears, strict=True)):
            wide = widened(dy)
            for (piece, _, z, bs), dz, found in zip(kept_of, d_zs, d_factors, strict=True):
                if i in piece.linears:
                    at = piece.linears.index(i)
                    _update_back(wide[piece.begin : piece.end], (z, dz), bs, piece.scalings[at], at, found)
            if dx is not None:
                for part, numbers in weight.pieces():
                    torch.addmm(dx, wide[:, part], numbers, beta=0 if i == part.start == 0 else 1, out=dx)
        if x is not None:
            wide = widened(x)
            for (piece, stacked, _, bs), dz, found in zip(kept_of, d_zs, d_factors, strict=True):
                rows = slice(piece.begin, piece.end)
                found[::2] = torch.mm(dz.t(), wide[rows]).split([b.shape[1] for b in bs])
                if dx is not None:
                    dx[rows].addmm_(dz, stacked)
        gradients = (g.to(dtype) for g, dtype in zip((g for one in d_factors for g in one), ctx.dtypes, strict=True))
        return None if dx is None else empty(d_ys[0], ctx.shape).copy_(dx), None, None, None, *gradients


# The rows that are updated, the scaling, z [n, r] and B [out, r] in fp32.
_Update = tuple[slice, float, Tensor, Tensor]


def _by_piece(pieces: Sequence[Piece], factors: Sequence[Tensor]) -> list[tuple[Piece, Sequence[Tensor]]]:
    """Each piece with updates, and their A and B in turn."""
    found, at = [], 0
    for piece in pieces:
        count = 2 * len(piece.linears)
        if count:
            found.append((piece, factors[at : at + count]))
        at += count
    return found


def _first_products(given: Callable[[], Tensor], rows: slice, a: Tensor) -> Tensor:
    """x A^T [n, R] of those rows of x and A [R, in], in fp32."""
    return torch.mm(given()[rows], a.t())


def _linear(
    x: Tensor, given: Callable[[], Tensor], weight: Rows, bias: Tensor | None, updates: Sequence[_Update]
) -> Tensor:
    """x W^T and its updates, [N, out] in the dtype of x [N, in]; ``given`` gives that in fp32."""
    out, wide_x = empty(x, (len(x), weight.shape[0])), given()
    for part, numbers in weight.pieces():
        own = scratch(len(x) * len(numbers), "out").view(len(x), -1)
        torch.mm(wide_x, numbers.t(), out=own)
        for rows, scaling, z, b in updates:
            own[rows].addmm_(z, b[part].t(), alpha=scaling)
        if bias is not None:
            own += bias[part]
        out[:, part] = own
    return out


def _update_back(
    dy: Tensor, z_and_dz: tuple[Tensor, Tensor], bs: Sequence[Tensor], scaling: float, at: int, found: list[Tensor]
) -> None:
    """Fill dz of update number ``at`` of a piece, and put dB into ``found``, of dy [n, out] in fp32."""
    ranks = [b.shape[1] for b in bs]
    z, dz = (both.split(ranks, 1)[at] for both in z_and_dz)
    torch.mm(dy, bs[at], out=dz).mul_(scaling)
    found[2 * at + 1] = torch.mm(z.t(), dy).t().mul(scaling)


def low_rank_rows(
    x: Tensor,
    linears: Sequence[tuple[Rows, Tensor | None]],
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """``low_rank_linears`` of x [N, in] and weights [out_i, in] that are read in pieces: [N, out_i] per linear.

    Args:
        x: In fp32 or 16 bits, on a CPU.
        linears: The weights and biases [out_i] or None. They get no gradients.
        pieces: As there.
        factors: As there, in any floating dtype.
    """
    weights, biases = [w for w, _ in linears], [bias for _, bias in linears]
    found: Any = _LowRankRows.apply(x, pieces, weights, biases, *factors)
    return tuple(found)


def low_rank_rows_ref(
    x: Tensor,
    linears: Sequence[tuple[Rows, Tensor | None]],
    pieces: Sequence[Piece],
    factors: Sequence[Tensor],
) -> tuple[Tensor, ...]:
    """``low_rank_rows`` with whole weights, as the equation has it; [N, out_i] per linear too."""
    whole = [(torch.cat([piece.clone() for _, piece in weight.pieces()]).to(x.dtype), bias) for weight, bias in linears]
    return low_rank_linears_ref(x, whole, pieces, factors)
