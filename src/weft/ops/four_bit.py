"""Linears whose weight is kept in four bits (Dettmers et al. 2023), multiplied piece by piece on a CPU.

bitsandbytes writes the whole weight out in the dtype of the product, and multiplies in that. Here a piece of rows is
read, widened and multiplied while it is in the cache (``weft.ops.products``). The weight's numbers are bitsandbytes'.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.libraries import multiplies_sixteen_bits
from weft.ops.autograd import Context
from weft.ops.kept import kept
from weft.ops.products import lengths_of_pieces, scratch, transposed_product

# Rows from which the pieces are faster than bitsandbytes.
_FEW = 8


@dataclass(frozen=True)
class FourBitRows:
    """The rows of a weight [out, in] in bitsandbytes' format, as numbers of ``dtype``."""

    packed: Tensor  # uint8, [out * in / 2] in any shape
    state: Any  # bitsandbytes' QuantState
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.state.shape[0], self.state.shape[1])

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """As ``Rows`` has it, [n, in] each. A piece begins where a block of the quantisation does."""
        from bitsandbytes.functional import QuantState, dequantize_4bit, dequantize_blockwise

        (rows, columns), block = self.shape, self.state.blocksize
        scales = self.state.absmax
        if self.state.nested:
            scales = dequantize_blockwise(scales, self.state.state2).float() + self.state.offset
        packed = self.packed.view(-1)
        step = lengths_of_pieces(rows, columns, block // math.gcd(block, columns))
        for start in range(0, rows, step):
            end = min(start + step, rows)
            own = scales[start * columns // block : -(-end * columns // block)]
            shape = torch.Size((end - start, columns))
            state = QuantState(own, shape, self.state.code, block, self.state.quant_type, self.dtype)
            found = dequantize_4bit(packed[start * columns // 2 : -(-end * columns // 2), None], state)
            wide = found if self.dtype == torch.float32 else scratch(shape.numel()).view(shape).copy_(found)
            yield slice(start, end), wide


def in_pieces(x: Tensor, dtype: torch.dtype) -> bool:
    """Whether the product of x [..., in] in ``dtype`` with a weight in four bits is faster piece by piece."""
    if x.device.type != "cpu" or torch.compiler.is_compiling() or x.numel() < _FEW * x.shape[-1]:
        return False
    return dtype == torch.float32 or not multiplies_sixteen_bits(x.device, dtype)


class _Context(Context, Protocol):
    rows: FourBitRows


class _FourBitProduct(torch.autograd.Function):
    """x W^T of a frozen weight. It keeps the packed weight alone, and reads it once more in the backward pass."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, rows: FourBitRows) -> Tensor:
        ctx.rows = rows
        outputs, inputs = rows.shape
        return kept(lambda: x.new_empty(len(x), outputs).copy_(transposed_product(x, rows, flipped=True).t()), inputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor, None]:
        dx = dy.new_empty(len(dy), ctx.rows.shape[1])
        return dx.copy_(transposed_product(dy, ctx.rows, flipped=False).t()), None


def four_bit_linear(x: Tensor, rows: FourBitRows, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias``, [..., out], of x [..., in] in the dtype of ``rows``, W [out, in] and bias [out]."""
    y = _FourBitProduct.apply(x.reshape(-1, x.shape[-1]), rows).view(*x.shape[:-1], -1)
    return y if bias is None else y + bias


def four_bit_linear_ref(x: Tensor, rows: FourBitRows, bias: Tensor | None = None) -> Tensor:
    """``four_bit_linear`` with the whole weight at once, in fp32; [..., out] too."""
    from bitsandbytes.functional import dequantize_4bit

    weight = dequantize_4bit(rows.packed, rows.state).to(rows.dtype).float()
    y = x.float() @ weight.t()
    return (y if bias is None else y + bias.float()).to(x.dtype)
