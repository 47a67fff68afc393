"""Linears whose frozen weight is kept in few bits: it is made whole again for each pass, on a CPU piece by piece.

A piece of rows is read, widened and multiplied while it is in the cache (``weft.ops.products``). Nothing of the weight
but its packed form outlives a pass. With and without gradients the numbers are the same.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from weft.ops.autograd import Context
from weft.ops.kept import kept
from weft.ops.memory import empty
from weft.ops.products import Rows, is_slab, lengths_of_pieces, scratch, write_product
from weft.ops.sixteen_bits import faster_wide_from

# Rows from which the pieces are faster than the whole weight.
_FEW = 8
# Rows from which on a weight is not read slab by slab: the result is then as large as a slab.
_MANY = 32


class PackedRows(Rows, Protocol):
    """The rows of a weight [out, in] that is kept in few bits, as numbers of ``dtype``."""

    @property
    def dtype(self) -> torch.dtype:
        """The dtype to which the numbers are rounded."""

    def whole(self) -> Tensor:
        """All of them, [out, in] in ``dtype``."""

    def slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """All of them in large parts, each [n, in] in ``dtype``."""


@dataclass(frozen=True)
class EightBitRows:
    """The rows of a weight [out, in] in LLM.int8's format: steps of the 127th part of each row's largest size."""

    codes: Tensor  # int8, [out, in]
    scales: Tensor  # fp32, [out]
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.codes.shape[0], self.codes.shape[1])

    def whole(self) -> Tensor:
        """The weight, [out, in] in ``dtype``."""
        return (self.codes * (self.scales / 127)[:, None]).to(self.dtype)

    def slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """As ``PackedRows`` has it, [n, in] each."""
        step = lengths_of_pieces(*self.shape, slabs=True)
        for start in range(0, self.shape[0], step):
            part = slice(start, min(start + step, self.shape[0]))
            yield part, EightBitRows(self.codes[part], self.scales[part], self.dtype).whole()

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """As ``Rows`` has it, [n, in] each."""
        rows, columns = self.shape
        step = lengths_of_pieces(rows, columns)
        steps = (self.scales / 127)[:, None]
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            wide = scratch((part.stop - start) * columns).view(-1, columns)
            torch.mul(self.codes[part], steps[part], out=wide)
            yield part, wide if self.dtype == torch.float32 else wide.copy_(wide.to(self.dtype))


def in_pieces(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the product of x [..., in] in ``dtype`` with a packed weight is faster piece by piece."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() < _FEW * x.shape[-1]:
        return False
    return dtype == torch.float32 or x.numel() >= faster_wide_from(x.device, dtype) * x.shape[-1]


class _Context(Context, Protocol):
    rows: PackedRows


class _PackedProduct(torch.autograd.Function):
    """x W^T of a frozen weight. It keeps the packed weight alone, and reads it once more in the backward pass."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, rows: PackedRows) -> Tensor:
        ctx.rows = rows
        outputs, inputs = rows.shape
        if not in_pieces(x, rows.dtype):
            return kept(lambda: _narrow_product(x, rows), inputs)
        return kept(lambda: write_product(empty(x, (len(x), outputs)), x, rows, flipped=True), inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor, None]:
        if not in_pieces(dy, ctx.rows.dtype):
            return dy @ ctx.rows.whole(), None
        dx = empty(dy, (len(dy), ctx.rows.shape[1]))
        return write_product(dx, dy, ctx.rows, flipped=False), None


def _narrow_product(x: Tensor, rows: PackedRows) -> Tensor:
    """x W^T, [N, out], of x [N, in] in the dtype of the rows."""
    outputs, inputs = rows.shape
    if x.device.type != "cpu" or len(x) >= _MANY or is_slab(outputs * inputs):
        return functional.linear(x, rows.whole())
    y = x.new_empty(len(x), outputs)
    for part, slab in rows.slabs():
        y[:, part] = functional.linear(x, slab)
    return y


def packed_linear(x: Tensor, rows: PackedRows, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, [..., out], of x [..., in] in the dtype of ``rows``, W [out, in] and bias [out]."""
    if torch.compiler.is_compiling():
        return functional.linear(x, rows.whole(), bias)
    y = _PackedProduct.apply(x.reshape(-1, x.shape[-1]), rows).view(*x.shape[:-1], rows.shape[0])
    return y if bias is None else y + bias


def packed_linear_ref(x: Tensor, rows: PackedRows, bias: Tensor | None = None) -> Tensor:
    """``packed_linear`` with the whole weight at once, every number in fp32 at least; [..., out] too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ rows.whole().to(wide).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
