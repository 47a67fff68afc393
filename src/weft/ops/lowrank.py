"""The low-rank update of LoRA (Hu et al. 2021, eq. 3), and the decompositions it can begin with."""

from __future__ import annotations

from collections.abc import Callable
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.autograd import Context
from weft.ops.products import add_product_, in_pieces, multiply, product


def low_rank_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``y + scaling * (x Aᵀ) Bᵀ``, in y's dtype.

    Args:
        y: [..., out].
        x: [..., in], cast to y's dtype.
        a: [r, in], of any floating dtype, as b is. Both are cast to y's; gradients come back in their own.
        b: [out, r].

    Returns:
        [..., out].
    """
    dtype = y.dtype
    z = product(x.reshape(-1, x.shape[-1]).to(dtype), a.to(dtype), flipped=True)
    if in_pieces(z, b.t()):
        return _LowRankSum.apply(y.reshape(-1, y.shape[-1]), z, b.to(dtype), scaling).view_as(y)
    # addmm folds scaling and sum into the product: no [N, out] intermediate is written or saved.
    return y.reshape(-1, y.shape[-1]).addmm(z, b.to(dtype).t(), alpha=scaling).view_as(y)


class _Context(Context, Protocol):
    scaling: float


class _LowRankSum(torch.autograd.Function):
    """y + s z B^T of y [N, out], z [N, r] and B [out, r], summed in fp32 and rounded once."""

    @staticmethod
    def forward(ctx: _Context, y: Tensor, z: Tensor, b: Tensor, scaling: float) -> Tensor:
        ctx.scaling = scaling
        ctx.save_for_backward(z, b)
        out = torch.empty_like(y)
        add_product_(out, z, b.t(), alpha=scaling, to=y)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, ...]:
        """dz = s dy B,  dB = s dy^T z."""
        z, b = ctx.saved_tensors
        dz = multiply(dy, b).mul_(ctx.scaling) if ctx.needs_input_grad[1] else None
        db = multiply(z.t(), dy).t().mul(ctx.scaling) if ctx.needs_input_grad[2] else None
        return dy, dz, db, None


def low_rank_add_ref(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``low_rank_add`` as the paper writes it; [..., out] too."""
    return y + scaling * (x.to(y.dtype) @ a.to(y.dtype).transpose(0, 1) @ b.to(y.dtype).transpose(0, 1))


def low_rank(x: Tensor, a: Tensor, b: Tensor, dtype: torch.dtype) -> Tensor:
    """``(x Aᵀ) Bᵀ`` in ``dtype``, [..., out], of x [..., in], a [r, in] and b [out, r]."""
    return product(product(x.to(dtype), a.to(dtype), flipped=True), b.to(dtype), flipped=True)


def low_rank_merged(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``W + scaling * B A``, [out, in], of weight [out, in], a [r, in] and b [out, r] in one dtype."""
    return torch.addmm(weight, b, a, alpha=scaling)


def row_norms(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``||W + scaling B A||`` of every row, [out], without the sum ever being written out.

    With w, b rows of W and B:  ||w + s b A||² = ||w||² + 2 s (w Aᵀ) · b + s² (b A Aᵀ) · b.

    Args:
        weight: [out, in], in one dtype with a and b.
        a: [r, in].
        b: [out, r].
    """
    square = weight.square().sum(1) + 2 * scaling * ((weight @ a.t()) * b).sum(1)
    square = square + scaling**2 * ((b @ (a @ a.t())) * b).sum(1)
    # Rounding can make the square of what is nearly zero negative.
    return square.clamp_min(0).sqrt()


def row_norms_ref(weight: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``row_norms`` written out; [out] too."""
    return torch.linalg.norm(weight + scaling * b @ a, dim=1)


def principal_factors(weight: Tensor, rank: int, scaling: float) -> tuple[Tensor, Tensor]:
    """A [rank, in], B [out, rank] with ``scaling * B A`` the best approximation of weight [out, in] of that rank.

    ``W = U S Vᵀ``: A = sqrt(S / scaling) Vᵀ and B = U sqrt(S / scaling), of the largest singular values (PiSSA,
    Meng et al. 2024, eq. 2).
    """
    u, s, vh = torch.linalg.svd(weight, full_matrices=False)
    root = (s[:rank] / scaling).sqrt()
    return root[:, None] * vh[:rank], u[:, :rank] * root


def sketched_factors(
    weight: Tensor, rank: int, scaling: float, iterations: int, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """Nearly ``principal_factors``, much faster, by a random subspace (Halko et al. 2011, algorithm 4.4).

    Args:
        weight: [out, in].
        iterations: Power iterations of the subspace, which has a few dimensions more than ``rank``.

    Returns:
        A [rank, in] and B [out, rank].
    """
    width = min(rank + 8, *weight.shape)
    start = torch.randn(weight.shape[1], width, generator=generator, dtype=torch.float32)
    basis = torch.linalg.qr(weight @ start.to(weight)).Q
    for _ in range(iterations):
        basis = torch.linalg.qr(weight.t() @ basis).Q
        basis = torch.linalg.qr(weight @ basis).Q
    a, b = principal_factors(basis.t() @ weight, rank, scaling)
    return a, basis @ b


def loftq_factors(
    weight: Tensor, rank: int, scaling: float, quantize: Callable[[Tensor], Tensor], iterations: int
) -> tuple[Tensor, Tensor, Tensor]:
    """LoftQ (Li et al. 2023, algorithm 1): Q_t = q(W - s B A), then s B A = the best rank-r part of W - Q_t.

    Args:
        weight: [out, in], before quantisation.
        quantize: Quantises a matrix and gives back what a layer then computes with.

    Returns:
        Q [out, in], A [rank, in], B [out, rank].
    """
    a, b = weight.new_zeros(rank, weight.shape[1]), weight.new_zeros(weight.shape[0], rank)
    quantized = weight
    for _ in range(iterations):
        quantized = quantize(weight - scaling * b @ a)
        a, b = principal_factors(weight - quantized, rank, scaling)
    return quantized, a, b


def stacked_low_rank_add(weight: Tensor, a: Tensor, b: Tensor, scaling: float, *, transposed: bool = False) -> Tensor:
    """``W_e + scaling * B_e A_e`` for each matrix e of a stack, in W's dtype; the factors lie as PEFT stores them.

    Args:
        weight: [E, out, in]; if ``transposed``, [E, in, out].
        a: [E * r, in], the rows of one matrix beside each other. It and b have any floating dtype, and their
            gradients have the same.
        b: [out, r * E], the columns of one rank beside each other.

    Returns:
        As weight.
    """
    count = len(weight)
    rows = a.to(weight.dtype).view(count, -1, a.shape[-1])
    columns = b.to(weight.dtype).view(len(b), -1, count).permute(2, 0, 1)
    if transposed:
        return torch.baddbmm(weight, rows.transpose(1, 2), columns.transpose(1, 2), alpha=scaling)
    return torch.baddbmm(weight, columns, rows, alpha=scaling)


def stacked_low_rank_add_ref(
    weight: Tensor, a: Tensor, b: Tensor, scaling: float, *, transposed: bool = False
) -> Tensor:
    """``stacked_low_rank_add`` matrix by matrix; [E, out, in] or, ``transposed``, [E, in, out]."""
    count, found = len(weight), []
    for index, matrix in enumerate(weight):
        r = len(a) // count
        change = scaling * b[:, index::count].to(matrix) @ a[index * r : (index + 1) * r].to(matrix)
        found.append(matrix + (change.t() if transposed else change))
    return torch.stack(found)
