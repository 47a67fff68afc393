"""Plain references of the quantised formats: NF4, FP4 and their scales (Dettmers et al. 2023), LLM.int8 (2022).

bitsandbytes does the work. What it computes is written out here, and tests compare codes, bytes and numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional

FourBits = Literal["nf4", "fp4"]
# Scales of blocks per scale of their own, with double quantisation.
NESTED_BLOCK = 256
# An input's column with a number as large as this is multiplied in the input's own dtype by LLM.int8.
OUTLIER = 6.0
SMALLEST_SCALE = 1e-38


@cache
def normal_float_levels() -> Tensor:
    """NF4: quantiles of the normal distribution over their largest, ascending, [16] in fp32.

    Seven negative ones, zero and eight positive ones. Each half is evenly spaced in probability, from one half to what
    lies in the middle between the outermost of 15 and of 16 levels of equal probability.
    """
    # Seven digits, and probabilities in fp32: with that, the table is bitsandbytes' to the bit.
    outermost = round(1 - (1 / 30 + 1 / 32) / 2, 7)
    halves = [torch.linspace(outermost, 0.5, count)[:-1].double() for count in (8, 9)]
    negative, positive = (torch.special.ndtri(half).float() for half in halves)
    levels = torch.cat([-negative, torch.zeros(1), positive.flip(0)])
    return levels / levels[-1]


@cache
def float_levels() -> Tensor:
    """FP4 by code, over the largest: a sign, two bits of exponent that count down, one of mantissa; [16] in fp32."""
    found = []
    for code in range(16):
        sign, exponent, mantissa = -1 if code & 8 else 1, code >> 1 & 3, code & 1
        size = (1 + mantissa / 2) * 2.0 ** (4 - exponent) if exponent else mantissa * 2.0**-4
        found.append(sign * size)
    return torch.tensor(found) / max(found)


@cache
def dynamic_levels() -> Tensor:
    """The 8-bit dynamic map (Dettmers 2015), ascending, [256] in fp32, from just above -1 to 1.

    A power of ten 10^-k, k from 6 to 0, is split into 2^(6-k) parts, whose middles are the levels, of both signs.
    """
    found = [torch.tensor([0.0, 1.0])]
    for exponent in range(7):
        ends = torch.linspace(0.1, 1, 2**exponent + 1)
        middles = (ends[:-1] + ends[1:]) / 2 * 10 ** (exponent - 6)
        found += [middles, -middles]
    return torch.cat(found).sort().values


def levels_of(kind: FourBits) -> Tensor:
    """The numbers by code, [16] in fp32."""
    return normal_float_levels() if kind == "nf4" else float_levels()


def quantize_blocks(x: Tensor, levels: Tensor, block: int, steps: int | None = None) -> tuple[Tensor, Tensor]:
    """The nearest levels of the numbers of x, over the largest size in their block.

    Args:
        x: Any shape, of a floating dtype.
        levels: [n] in fp32, in any order.
        block: How many numbers, one after another, share a scale; the last block may be shorter.
        steps: Shares are first rounded to so many equal steps from -1 to 1; None: they are taken as they are.

    Returns:
        Codes [x.numel()] in uint8, and scales [blocks] in fp32.
    """
    flat = x.reshape(-1).float()
    padded = functional.pad(flat, (0, -flat.numel() % block)).view(-1, block)
    scales = padded.abs().amax(1)
    safe = (scales.clamp(min=SMALLEST_SCALE) if steps is None else scales.where(scales > 0, 1.0))[:, None]
    shares = padded * (1 / safe)
    if flat.numel() % block and steps is None:
        # Here bitsandbytes divides, which may round otherwise, and has no scale of zero.
        shares[-1], scales[-1] = padded[-1] / safe[-1], safe[-1, 0]
    shares = shares.clamp(-1, 1).view(-1)[: flat.numel()]
    if steps is not None:
        shares = ((shares + 1) * (steps / 2)).round() / (steps / 2) - 1
    ordered, order = levels.sort(stable=True)
    codes = order[torch.bucketize(shares, (ordered[:-1] + ordered[1:]) / 2)]
    return codes.to(torch.uint8), scales


def dequantize_blocks(codes: Tensor, scales: Tensor, levels: Tensor, block: int) -> Tensor:
    """The numbers of codes [n] in uint8 with scales [blocks] in fp32: [n] in fp32."""
    return levels[codes.long()] * scales.repeat_interleave(block)[: codes.numel()]


def pack_four_bits(codes: Tensor, levels: Tensor) -> Tensor:
    """Codes [n] in uint8 two in a byte, the first one high, an odd one beside a zero: [ceil(n / 2)] in uint8."""
    zero = int((levels == 0).nonzero()[0])
    pairs = functional.pad(codes, (0, codes.numel() % 2), value=zero).view(-1, 2)
    return pairs[:, 0] << 4 | pairs[:, 1]


def unpack_four_bits(packed: Tensor, numbers: int) -> Tensor:
    """The codes [numbers] in uint8 of packed bytes of any shape."""
    flat = packed.reshape(-1)
    return torch.stack([flat >> 4, flat & 15], 1).view(-1)[:numbers]


@dataclass(frozen=True)
class NestedScales:
    """Scales that are quantised themselves: what is left without their mean, in 8 bits, in blocks of 256."""

    codes: Tensor  # uint8, [n]
    scales: Tensor  # fp32, [ceil(n / 256)]
    mean: Tensor  # fp32, []

    @classmethod
    def of(cls, scales: Tensor) -> NestedScales:
        """Quantise scales [n] in fp32, as bitsandbytes does on a CPU, where 16 bits of a share choose its level."""
        mean = scales.mean()
        codes, own = quantize_blocks(scales - mean, dynamic_levels(), NESTED_BLOCK, steps=(1 << 16) - 1)
        # It gives the first code to blocks of zeros.
        whole = own.repeat_interleave(NESTED_BLOCK)[: codes.numel()]
        return cls(codes.where(whole > 0, 0), own, mean)

    def numbers(self) -> Tensor:
        """The scales that are left, [n] in fp32."""
        return dequantize_blocks(self.codes, self.scales, dynamic_levels(), NESTED_BLOCK) + self.mean


def bits_of_scales(block: int, nested: bool) -> float:
    """The bits that scales take per parameter: 0.5 in blocks of 64, and 0.127 if they are quantised themselves."""
    return 8 / block + 32 / (block * NESTED_BLOCK) if nested else 32 / block


def quantize_rows(x: Tensor) -> tuple[Tensor, Tensor]:
    """Each row of x [n, d] in steps of the 127th part of its largest size: int8 [n, d], and fp32 [n].

    bitsandbytes rounds x to fp16 before.
    """
    scales = x.abs().amax(1).float()
    # A row of zeros has no step.
    return torch.round(x * torch.where(scales > 0, 127 / scales, 0.0)[:, None]).to(torch.int8), scales


def dequantize_rows(codes: Tensor, scales: Tensor) -> Tensor:
    """The numbers of codes [n, d] in int8 with scales [n] in fp32: [n, d] in fp32."""
    return codes * (scales / 127)[:, None]


def outlier_columns(x: Tensor, threshold: float = OUTLIER) -> Tensor:
    """The columns of x [n, d] that hold a number as large as the threshold: [k], ascending."""
    return (x.abs() >= threshold).any(0).nonzero().view(-1)


def llm_int8_ref(
    x: Tensor, codes: Tensor, scales: Tensor, bias: Tensor | None = None, threshold: float = OUTLIER
) -> Tensor:
    """``x W^T + bias`` as the paper has it: outlier columns apart, the others as products of whole numbers.

    Args:
        x: [n, in].
        codes: W, [out, in] in int8.
        scales: [out] in fp32, the largest size in each row of W.
        bias: [out].
        threshold: The size of an outlier.

    Returns:
        [n, out] in the dtype of x.
    """
    outliers = outlier_columns(x.half(), threshold)
    rest = x.half().index_fill(1, outliers, 0)
    whole, largest = quantize_rows(rest)
    # Sums of 127 * 127 * in are whole numbers in fp64.
    y = (whole.double() @ codes.double().t()) * (largest[:, None].double() * scales.double() / 127**2)
    y += x[:, outliers].double() @ dequantize_rows(codes[:, outliers], scales).double().t()
    return (y if bias is None else y + bias.double()).to(x.dtype)
