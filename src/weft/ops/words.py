"""Weights in whole numbers of a few bits, packed into words of 32, with a scale and a zero for each group of inputs:
the formats of GPTQ (Frantar et al. 2022) and of AWQ (Lin et al. 2023)."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import KW_ONLY, dataclass
from typing import Literal

import torch
from torch import Tensor

from weft.ops.products import lengths_of_pieces, scratch

# GPTQ's older files keep each zero less one.
Packing = Literal["gptq", "gptq_v2", "awq"]
_WORD = 32
# The output that AWQ's kernels expect in each nibble of a word, from the lowest.
_AWQ_ORDER = (0, 2, 4, 6, 1, 3, 5, 7)


def unpack_words(words: Tensor, bits: int) -> Tensor:
    """The codes [..., n * 32 / bits] in int32 of words [..., n] in int32, the lowest bits first.

    So many words as there are bits hold 32 codes, of which some lie across two words (of 3 bits: two).
    """
    mask = (1 << bits) - 1
    if _WORD % bits == 0:
        shifts = torch.arange(0, _WORD, bits, dtype=torch.int32, device=words.device)
        return (words[..., None] >> shifts & mask).flatten(-2)
    lots = (words.long() & 0xFFFFFFFF).unflatten(-1, (-1, bits))
    following = torch.cat([lots[..., 1:], lots.new_zeros(*lots.shape[:-1], 1)], -1)
    begins = torch.arange(_WORD, device=words.device) * bits
    at, shift = begins // _WORD, begins % _WORD
    return ((lots[..., at] | following[..., at] << _WORD) >> shift & mask).flatten(-2).int()


def unpack_awq(words: Tensor) -> Tensor:
    """The codes [..., n * 8] in int32 of words [..., n] in int32, each of eight outputs of 4 bits in AWQ's order."""
    back = sorted(range(len(_AWQ_ORDER)), key=_AWQ_ORDER.__getitem__)
    return unpack_words(words, 4).unflatten(-1, (-1, len(_AWQ_ORDER)))[..., back].flatten(-2)


@dataclass(frozen=True)
class GroupedRows:
    """The rows of a weight [out, in] in words, as numbers of ``dtype``: scale * (code - zero)."""

    qweight: Tensor  # int32; GPTQ: [in * bits / 32, out]; AWQ: [in, out / 8]
    qzeros: Tensor  # int32, [groups, out * bits / 32]
    scales: Tensor  # [groups, out]
    _: KW_ONLY
    groups: Tensor  # integers, [in]: the group of each input
    bits: int
    packing: Packing
    dtype: torch.dtype

    @property
    def shape(self) -> tuple[int, int]:
        """(out, in)."""
        return (self.scales.shape[1], self.groups.shape[0])

    def whole(self) -> Tensor:
        """The weight, [out, in] in ``dtype``."""
        return self._rows(0, self.shape[0]).to(self.dtype)

    def slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """As ``PackedRows`` has it, [n, in] each."""
        rows, columns = self.shape
        step = lengths_of_pieces(rows, columns, _WORD, slabs=True)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            yield part, self._rows(part.start, part.stop).to(self.dtype)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """As ``Rows`` has it, [n, in] each. A piece begins where a word does."""
        rows, columns = self.shape
        step = lengths_of_pieces(rows, columns, _WORD)
        for start in range(0, rows, step):
            part = slice(start, min(start + step, rows))
            wide = scratch((part.stop - start) * columns).view(-1, columns)
            yield part, wide.copy_(self._rows(part.start, part.stop).to(self.dtype))

    def _rows(self, start: int, end: int) -> Tensor:
        """The numbers of outputs from ``start``, the first of a word, to ``end``: [n, in] in fp32."""
        words = slice(start * self.bits // _WORD, -(-end * self.bits // _WORD))
        if self.packing == "awq":
            codes, zeros = unpack_awq(self.qweight[:, words]).t(), unpack_awq(self.qzeros[:, words])
        else:
            codes = unpack_words(self.qweight[:, start:end].t(), self.bits)
            zeros = unpack_words(self.qzeros[:, words], self.bits)
            # One more than the largest code is zero again.
            zeros = (zeros + 1) & ((1 << self.bits) - 1) if self.packing == "gptq" else zeros
        of = self.groups.long()
        zeros, scales = zeros.t()[: end - start, of], self.scales[:, start:end].float().t()[:, of]
        return scales * (codes[: end - start] - zeros)
