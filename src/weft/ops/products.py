"""Matrix products in 16 bits, also on a CPU that has no instructions for them, or slow ones.

Without them torch multiplies number by number, and from eight rows on the same product is faster in fp32
(``benchmarks/results/products_*`` says how much; ``sixteen_bits`` measures it where there are some). The larger factor,
which is a weight as a rule, is widened piece by piece: a piece fits the cache, and nothing of it is kept. Sums are fp32
either way, and the result is rounded once.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.autograd import Context
from weft.ops.kept import kept
from weft.ops.memory import empty, empty_numbers
from weft.ops.sixteen_bits import faster_wide_from

# Numbers of a piece: 8 MiB in fp32.
_PIECE = 1 << 21
# Numbers of a part in 16 bits: 8 MiB, which the C library finds again. Each larger one takes new memory of the system,
# and that takes longer than its numbers (4 rows, 4096 x 4096 in 4 bits: 13 ms for the whole weight, 5 in four parts).
_SLAB = 1 << 22
# Of such a number of rows pieces are a multiple.
_EVEN = 32
# Rows, if the weight lies transposed, and multiplications in all, below which torch's own product is faster. A weight
# that lies as it is (the gradient of an input) is slow from the first row on: 27 ms at 2048 x 2048.
_FEW, _SMALL = 8, 1 << 20
# Rows from which on the result is made as it is to lie: to turn it then takes up to a fifth of the product.
MANY = 128
_SCRATCH = threading.local()
# Numbers of a sum that are so few that the product takes no longer than writing it: LoRA's rank, as a rule.
_NARROW = 128
# Numbers of 32 MiB, from which on memory is not held: long texts are rare.
_LARGEST = 1 << 23


def products_in(x: Tensor) -> torch.dtype:
    """The dtype in which small products of x [...] are fastest: its own, or fp32 where that is slow."""
    return x.dtype if faster_wide_from(x.device, x.dtype) == math.inf else torch.promote_types(x.dtype, torch.float32)


def in_pieces(a: Tensor, b: Tensor) -> bool:
    """Whether the product of a [N, K] and b [K, O] is faster in fp32."""
    # The cheap questions first: a step of a text asks for every linear.
    if a.dtype.itemsize != 2 or (a.shape[0] < _FEW and b.stride(0) == 1):
        return False
    return is_slow(a, a.shape[1] if _is_turned(a) else a.shape[0], a.numel() * b.shape[1])


def _is_turned(a: Tensor) -> bool:
    """Whether a [N, K] is the transpose of what lies, as in the gradient of a weight: its columns are the tokens."""
    return a.stride(0) == 1 and (a.stride(1) != 1 or a.shape[0] == 1)


def is_slow(x: Tensor, tokens: int, multiplications: int) -> bool:
    """Whether so many multiplications of numbers like those of x [...] take torch long."""
    if x.dtype.itemsize != 2 or torch.compiler.is_compiling():
        return False
    least = faster_wide_from(x.device, x.dtype)
    # For each number of tokens oneDNN makes a kernel (``sixteen_bits``), however small the product is. Where fp32 is no
    # slower, it is left the few numbers that come again.
    return tokens >= least and (least > 1 or multiplications >= _SMALL)


class Rows(Protocol):
    """A matrix that is read row by row, however it is kept."""

    @property
    def shape(self) -> tuple[int, int]:
        """Its rows and columns."""

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """Its rows piece by piece, each [n, columns] in fp32 until the next one comes."""


def is_slab(numbers: int) -> bool:
    """Whether a weight of so many numbers is read at once where few rows are multiplied."""
    return numbers <= 2 * _SLAB


def lengths_of_pieces(rows: int, columns: int, multiple: int = 1, *, slabs: bool = False) -> int:
    """The rows of a piece that fits the cache, or of a slab. All but the last have as many.

    Two pieces of 512 and 256 rows take twice as long as two of 384 (measured).
    """
    step = -(-rows // max(1, round(rows * columns / (_SLAB if slabs else _PIECE))))
    # Kernels are written for so many rows, and 187 take as long as 224.
    multiple = math.lcm(multiple, _EVEN) if step > 2 * math.lcm(multiple, _EVEN) else multiple
    return max(1, -(-step // multiple) * multiple)


def scratch(numbers: int, use: str = "piece") -> Tensor:
    """Memory of the calling thread for so many numbers, [numbers] in fp32 on the CPU; the next call for the same use
    gives the same.

    What is new, the kernel clears page by page, and that takes as long as the product. And the C library does not find
    the gaps again that such short-lived memory leaves between tensors that stay (docs/design.md, the plan of a run).
    """
    if numbers > _LARGEST:
        return empty_numbers(numbers)
    held: dict[str, Tensor] = _SCRATCH.__dict__.setdefault("held", {})
    if use not in held or len(held[use]) < numbers:
        with torch.inference_mode(False):  # what is made inside it could not be written to outside
            held[use] = torch.empty(numbers, dtype=torch.float32, device="cpu")
    return held[use][:numbers]


@dataclass(frozen=True)
class PlainRows:
    """The rows of a tensor [n, d]."""

    x: Tensor

    @property
    def shape(self) -> tuple[int, int]:
        """(n, d)."""
        return (len(self.x), self.x.shape[1])

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """As ``Rows`` has it, [rows, d] each."""
        step = lengths_of_pieces(*self.shape)
        for start in range(0, len(self.x), step):
            rows = self.x[start : start + step]
            yield slice(start, start + len(rows)), scratch(rows.numel()).view(rows.shape).copy_(rows)


def write_product(out: Tensor, a: Tensor, rows: Rows, *, flipped: bool) -> Tensor:
    """``out <- a W`` [N, O] of a [N, K] and W, or ``a W^T`` if ``flipped``; returns ``out``."""
    if not flipped or len(a) < MANY:
        return out.copy_(wide_product(a, rows, flipped=flipped))
    given = widened(a)
    for part, wide in rows.pieces():
        # A result that lies by itself is made faster than a part of rows, and is rounded while it is in the cache.
        own = scratch(len(a) * len(wide), "out").view(len(a), len(wide))
        out[:, part] = torch.mm(given, wide.t(), out=own)
    return out


def wide_product(a: Tensor, rows: Rows, *, flipped: bool) -> Tensor:
    """a W [N, O] in fp32 of a [N, K] and W, or a W^T if ``flipped``; to be copied before the next call."""
    given = widened(a)
    columns = rows.shape[0 if flipped else 1]
    out = scratch(columns * len(a), "out")
    if len(a) < MANY:
        return _transposed_product(given.t(), rows, out.view(columns, len(a)), flipped).t()
    out = out.view(len(a), columns)
    for part, wide in rows.pieces():
        if flipped:
            torch.mm(given, wide.t(), out=out[:, part])
        else:
            torch.addmm(out, given[:, part], wide, beta=0 if part.start == 0 else 1, out=out)
    return out


def widened(a: Tensor) -> Tensor:
    """a [N, K] in fp32, until the next call."""
    if a.dtype == torch.float32:
        return a
    lying = a.t() if _is_turned(a) else a
    given = scratch(a.numel(), "given").view(lying.shape).copy_(lying)
    return given.t() if _is_turned(a) else given


def _transposed_product(given: Tensor, rows: Rows, out: Tensor, flipped: bool) -> Tensor:
    """``wide_product`` in the order in which kernels for few rows are faster, and pieces lie one after another."""
    for part, wide in rows.pieces():
        if flipped:
            torch.mm(wide, given, out=out[part])
        else:
            torch.addmm(out, wide.t(), given[part], beta=0 if part.start == 0 else 1, out=out)
    return out


def _wide(a: Tensor, b: Tensor) -> Tensor:
    """a b [N, O] in fp32 of a [N, K] and b [K, O]; to be copied before the next call."""
    flipped = b.stride(0) == 1  # the transpose of a weight [O, K]
    return wide_product(a, PlainRows(b.t() if flipped else b), flipped=flipped)


def multiply(a: Tensor, b: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """a b [N, O] of a [N, K] and b [K, O] of one dtype, in that or in ``dtype``. It makes no graph."""
    if not in_pieces(a, b):
        found = a @ b
        return found if dtype is None else found.to(dtype)
    flipped = b.stride(0) == 1  # the transpose of a weight [O, K]
    rows = PlainRows(b.t() if flipped else b)
    shape = (len(a), b.shape[1])
    return kept(lambda: write_product(empty(a, shape, dtype), a, rows, flipped=flipped), len(b))


def add_product_(
    y: Tensor, a: Tensor, b: Tensor, *, alpha: float = 1.0, beta: float = 1.0, to: Tensor | None = None
) -> None:
    """``y <- beta y + alpha a b`` of y [N, O], a [N, K] and b [K, O] of one dtype, or ``y <- beta to + alpha a b``.

    It makes no graph.
    """
    to = y if to is None else to
    if not in_pieces(a, b):
        torch.addmm(to, a, b, beta=beta, alpha=alpha, out=y)
        return
    if b.stride(0) == 1 and a.shape[1] <= _NARROW:
        _add_narrow(y, to, a, b, alpha=alpha, beta=beta)
        return
    found = _wide(a, b)
    if alpha != 1.0:
        found.mul_(alpha)
    if beta:
        found.add_(to, alpha=beta)
    y.copy_(found)


def _add_narrow(y: Tensor, to: Tensor, a: Tensor, b: Tensor, *, alpha: float, beta: float) -> None:
    """``add_product_`` over few numbers. The sum takes longer than the product, so parts of it stay in the cache."""
    given, weight = widened(a), scratch(b.numel(), "piece").view(b.shape[::-1]).copy_(b.t())
    step = lengths_of_pieces(len(weight), 8 * len(a))
    for start in range(0, len(weight), step):
        part = slice(start, start + step)
        wide = weight[part].t()
        own = scratch(len(a) * wide.shape[1], "out").view(len(a), -1).copy_(to[:, part])
        y[:, part] = torch.addmm(own, given, wide, beta=beta, alpha=alpha, out=own)


class _Context(Context, Protocol):
    flipped: bool


class _Product(torch.autograd.Function):
    """x W, or x W^T if ``flipped``. It keeps x only where W is trained."""

    @staticmethod
    def forward(ctx: _Context, x: Tensor, weight: Tensor, flipped: bool) -> Tensor:
        ctx.flipped = flipped
        ctx.save_for_backward(x if ctx.needs_input_grad[1] else None, weight)
        return multiply(x, weight.t() if flipped else weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: _Context, dy: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        """dx = dy W^T,  dW = x^T dy; flipped: dx = dy W,  dW = dy^T x."""
        x, weight = ctx.saved_tensors
        dx = multiply(dy, weight if ctx.flipped else weight.t()) if ctx.needs_input_grad[0] else None
        if not ctx.needs_input_grad[1]:
            return dx, None, None
        few, many, swapped = (x, dy, ctx.flipped) if x.shape[1] < dy.shape[1] else (dy, x, not ctx.flipped)
        dw = multiply(few.t(), many)  # in the order in which less is turned
        return dx, dw.t() if swapped else dw, None


def product(x: Tensor, weight: Tensor, *, flipped: bool = False) -> Tensor:
    """``x W`` of x [..., in] and W [in, out], or ``x W^T`` of W [out, in] if ``flipped``: [..., out], in one dtype."""
    rows = x.reshape(-1, x.shape[-1])
    if not _in_node(rows, weight, flipped):
        return torch.nn.functional.linear(x, weight) if flipped else x @ weight
    return _Product.apply(rows, weight, flipped).view(*x.shape[:-1], weight.shape[0 if flipped else 1])


def _in_node(rows: Tensor, weight: Tensor, flipped: bool) -> bool:
    """Whether the product of rows [N, in] is faster in fp32, or the gradient that goes back to them."""
    if in_pieces(rows, weight.t() if flipped else weight):
        return True
    goes_back = flipped and rows.requires_grad and torch.is_grad_enabled()
    return goes_back and is_slow(rows, len(rows), rows.shape[0] * weight.numel())


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``x W^T + bias`` of x [..., in], W [out, in] and bias [out]: [..., out], in one dtype."""
    if not _in_node(x.reshape(-1, x.shape[-1]), weight, True):
        return torch.nn.functional.linear(x, weight, bias)
    y = product(x, weight, flipped=True)
    return y if bias is None else y + bias


def linear_ref(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """``linear``, every number in fp32 at least; [..., out] too."""
    wide = torch.promote_types(x.dtype, torch.float32)
    y = x.to(wide) @ weight.to(wide).t()
    return (y if bias is None else y + bias.to(wide)).to(x.dtype)
