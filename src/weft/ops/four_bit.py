"""Weights that are kept in four bits (Dettmers et al. 2023), read piece by piece for ``weft.ops.packed``.

bitsandbytes writes the whole weight out in the dtype of the product, and multiplies in that. The numbers here are its.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from weft.ops.products import lengths_of_pieces, scratch


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

    def whole(self) -> Tensor:
        """The weight, [out, in] in ``dtype``."""
        from bitsandbytes.functional import dequantize_4bit

        found: Tensor = dequantize_4bit(self.packed, self.state).to(self.dtype)
        return found

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
