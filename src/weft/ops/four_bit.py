"""Weights that are kept in four bits (Dettmers et al. 2023): made, and read piece by piece for ``weft.ops.packed``.

bitsandbytes writes the whole weight out in the dtype of the product, and multiplies in that. On a CPU it makes the
codes by a binary search for each number, over the whole weight at once. The codes, scales and numbers here are its.
"""

from __future__ import annotations

import math
import mmap
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from weft.ops.parallel import one_thread_each
from weft.ops.products import lengths_of_pieces, scratch
from weft.ops.quantization import (
    SMALLEST_SCALE,
    FourBits,
    dequantize_blocks,
    levels_of,
    pack_four_bits,
    quantize_blocks,
    unpack_four_bits,
)

# Shares of a block's largest number, from -1 to 1, are rounded to steps of this size: a power of two, so that only the
# sum below rounds. That is a number in fp32 whose last bit is one.
_STEPS, _WHOLE = 1 << 15, 1.5 * 2**23
# Numbers that are worked on at once.
_AT_ONCE = 1 << 20
# Of a code in a byte: several levels are possible.
_UNSURE = 0x80
# Threads that read a file, at most, where there are no more cores.
_READERS = 16


# Gives the numbers of a weight from the first place to the second, [n]; it may write them to memory, [bytes] in uint8.
Read = Callable[[int, int, Tensor], Tensor]


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
        return dequantize_weight(self.packed, self.state).to(self.dtype)

    def slabs(self) -> Iterator[tuple[slice, Tensor]]:
        """As ``PackedRows`` has it, [n, in] each."""
        for part, found in self._parts(slabs=True):
            yield part, found.to(self.dtype)

    def pieces(self) -> Iterator[tuple[slice, Tensor]]:
        """As ``Rows`` has it, [n, in] each."""
        for part, found in self._parts():
            exact = found.dtype == self.dtype == torch.float32
            yield part, found if exact else _widened(found.to(self.dtype))

    def _parts(self, *, slabs: bool = False) -> Iterator[tuple[slice, Tensor]]:
        """The rows in pieces or slabs, [n, in] in the dtype of ``state``. Each begins where a block does."""
        (rows, columns), block = self.shape, self.state.blocksize
        scales, packed = _scales(self.state), _bytes(self.packed)
        step = lengths_of_pieces(rows, columns, block // math.gcd(block, columns), slabs=slabs)
        for start in range(0, rows, step):
            end = min(start + step, rows)
            own = scales[start * columns // block : -(-end * columns // block)]
            codes = packed[start * columns // 2 : -(-end * columns // 2)]
            yield slice(start, end), _numbers(codes, own, (end - start) * columns, self.state).view(-1, columns)


def _widened(x: Tensor) -> Tensor:
    return scratch(x.numel()).view(x.shape).copy_(x)


def dequantize_weight(packed: Tensor, state: Any) -> Tensor:
    """The numbers of a weight in bitsandbytes' format, in the shape and dtype that ``state``, its QuantState, tells.

    ``packed`` is of any shape and dtype.
    """
    from bitsandbytes.functional import dequantize_4bit

    if packed.device.type != "cpu":
        # A single row of codes would have it give the transpose.
        found: Tensor = dequantize_4bit(_bytes(packed)[:, None], state)
        return found
    return _numbers(_bytes(packed), _scales(state), math.prod(state.shape), state).view(state.shape)


def _bytes(packed: Tensor) -> Tensor:
    """Packed codes of any shape and dtype as [n] in uint8."""
    return packed.contiguous().view(-1).view(torch.uint8)


def _scales(state: Any) -> Tensor:
    """The scales of the blocks, [blocks] in fp32."""
    from bitsandbytes.functional import dequantize_blockwise

    if not state.nested:
        return state.absmax.float()
    return dequantize_blockwise(state.absmax, state.state2).float() + state.offset


def _numbers(packed: Tensor, scales: Tensor, count: int, state: Any) -> Tensor:
    """The numbers of packed codes [ceil(count / 2)] in uint8 with scales [blocks], [count] in the dtype of ``state``.

    bitsandbytes is given one block a row: with AVX-512 it begins a block with each row, and is wrong in silence where
    blocks go across rows (0.50).
    """
    from bitsandbytes.functional import QuantState, dequantize_4bit

    block, whole = state.blocksize, count // state.blocksize
    numbers = torch.empty(0, dtype=state.dtype)
    if whole:
        shape = torch.Size((whole, block))
        told = QuantState(scales[:whole].contiguous(), shape, state.code, block, state.quant_type, state.dtype)
        numbers = dequantize_4bit(packed[: whole * block // 2, None], told).view(-1)
    if whole * block == count:
        return numbers
    rest = unpack_four_bits(packed[whole * block // 2 :], count - whole * block)
    return torch.cat([numbers, dequantize_blocks(rest, scales[whole:], state.code.cpu(), block).to(state.dtype)])


def quantize_weight(
    weight: Tensor,
    kind: FourBits,
    *,
    block: int = 64,
    nested: bool = True,
    storage: torch.dtype = torch.uint8,
    read: Read | None = None,
) -> tuple[Tensor, Any]:
    """A weight in bitsandbytes' format, equal to its own to the bit.

    Args:
        weight: Any shape, in fp32, bf16 or fp16.
        kind: Which levels.
        block: The numbers, one after another, that share a scale.
        nested: Whether the scales are quantised themselves.
        storage: The dtype that the packed bytes are kept as.
        read: Where the numbers come from, if not from ``weight``'s memory.

    Returns:
        Packed codes [n, 1] in ``storage``, and bitsandbytes' QuantState.
    """
    from bitsandbytes.functional import QuantState, get_4bit_type, quantize_4bit, quantize_blockwise

    found = quantize_four_bits(weight, kind, block, read) if weight.device.type == "cpu" else None
    if found is None:
        made: tuple[Tensor, Any] = quantize_4bit(
            weight.contiguous(), blocksize=block, compress_statistics=nested, quant_type=kind, quant_storage=storage
        )
        return made
    packed, scales = found
    told = {
        "shape": weight.shape, "dtype": weight.dtype, "blocksize": block, "quant_type": kind,
        "code": get_4bit_type(kind, device="cpu"),
    }  # fmt: skip
    # It drops sizes of one when it takes another dtype.
    packed = packed[:, None] if storage == torch.uint8 else packed.view(storage)[:, None]
    if not nested:
        return packed, QuantState(absmax=scales, **told)
    mean = scales.mean()
    codes, own = quantize_blockwise(scales - mean, blocksize=256)
    return packed, QuantState(absmax=codes, offset=mean, state2=own, **told)


def quantize_four_bits_ref(x: Tensor, kind: FourBits, block: int) -> tuple[Tensor, Tensor]:
    """``quantize_four_bits`` by the plain references: [ceil(n / 2)] in uint8, [blocks] in fp32."""
    levels = levels_of(kind)
    codes, scales = quantize_blocks(x, levels, block)
    return pack_four_bits(codes, levels), scales


def quantize_four_bits(
    x: Tensor, kind: FourBits, block: int, read: Read | None = None
) -> tuple[Tensor, Tensor] | None:
    """The packed codes and the scales of numbers on a CPU, twelve times as fast as bitsandbytes.

    A share of a block's largest number is rounded to steps of 2^-15, and a table tells the code of each. Where the
    bound between two levels is rounded to the same step, the share itself is compared.

    Args:
        x: Any shape, of a floating dtype.
        kind: Which levels.
        block: The numbers, one after another, that share a scale; the last block may be shorter.
        read: Where the numbers come from, if not from memory: more threads than cores then work, so that some may wait.

    Returns:
        Packed codes [ceil(n / 2)] in uint8 and scales [blocks] in fp32; None: a number is not finite.
    """
    flat = x.reshape(-1)
    if flat.dtype not in (torch.float32, torch.bfloat16, torch.float16):
        flat, read = flat.float(), None
    whole = flat.numel() // block * block
    packed = torch.empty((flat.numel() + 1) // 2, dtype=torch.uint8)
    scales = torch.empty(-(-flat.numel() // block))
    if whole < flat.numel():
        packed[whole // 2 :], scales[whole // block :] = quantize_four_bits_ref(flat[whole:], kind, block)
    step = min(max(_AT_ONCE // block, 1) * block, whole)
    parts = [slice(begin, min(begin + step, whole)) for begin in range(0, whole, step or 1)]
    _codes_of_steps(kind)
    finite = [True]

    def work(own: list[slice]) -> None:
        room = _Room.of(step)
        for part in own:
            numbers = flat[part] if read is None else read(part.start, part.stop, room.read)
            blocks, halves = (slice(part.start // size, part.stop // size) for size in (block, 2))
            finite.append(_quantize_part(numbers, packed[halves], scales[blocks], kind, room))
        _ROOMS.append(room)

    threads = torch.get_num_threads()
    one_thread_each(work, parts, threads if read is None else max(threads, min(2 * threads, _READERS)))
    if read is None:
        forget_rooms()
    return (packed, scales) if all(finite) else None


@dataclass(frozen=True)
class _Room:
    """Memory for so many numbers: twice in fp32, once in uint8, and as their file has them, with three pages more."""

    wide: Tensor
    spare: Tensor
    codes: Tensor
    read: Tensor

    @classmethod
    def of(cls, numbers: int) -> _Room:
        """One that an earlier thread left, if it is large enough: new memory takes as long as what is done with it."""
        room = _ROOMS.pop() if _ROOMS else None
        if room is not None and len(room.wide) >= numbers:
            return room
        size = max(numbers, _AT_ONCE)
        codes, read = (torch.empty(count, dtype=torch.uint8) for count in (size, 4 * size + 3 * mmap.PAGESIZE))
        return cls(torch.empty(size), torch.empty(size), codes, read)


_ROOMS: list[_Room] = []


def forget_rooms() -> None:
    """Give back the memory that ``quantize_four_bits`` works in."""
    _ROOMS.clear()


def _quantize_part(x: Tensor, packed: Tensor, scales: Tensor, kind: FourBits, room: _Room) -> bool:
    """Write the codes and scales of whole blocks x [n]; tells whether all numbers are finite."""
    count = x.numel()
    shares, spare, codes = (tensor[:count] for tensor in (room.wide, room.spare, room.codes))
    scales.copy_(_largest_sizes(x, len(scales), spare))
    if not bool(scales.isfinite().all()):
        return False
    shares.copy_(x).view(len(scales), -1).mul_((1 / scales.clamp(min=SMALLEST_SCALE))[:, None])
    torch.index_select(_codes_of_steps(kind), 0, _steps(shares, spare), out=codes)
    _make_sure(codes, shares, kind, spare)
    # The first of two codes is the lower byte of both, and goes into the upper half.
    pairs, turned = codes.view(torch.int16), spare.view(torch.int16)[: count // 2]
    torch.bitwise_left_shift(pairs, 4, out=turned).bitwise_or_(pairs.bitwise_right_shift_(8))
    packed.copy_(turned)
    return True


def _largest_sizes(x: Tensor, blocks: int, spare: Tensor) -> Tensor:
    """The size of the largest number in each of the blocks of x [n], [blocks] in its dtype; ``spare`` is written to.

    Without their signs, floating numbers are in the order of their bits, and integers are compared faster.
    """
    kind = torch.int16 if x.dtype.itemsize == 2 else torch.int32
    sizes = torch.bitwise_and(x.view(kind), torch.iinfo(kind).max, out=spare.view(kind)[: x.numel()])
    return torch.amax(sizes.view(blocks, -1), 1).view(x.dtype)


def _steps(shares: Tensor, out: Tensor) -> Tensor:
    """The step of each share [n] in fp32, from 0 to 2 * ``_STEPS``: [n] in int32, in the memory of ``out`` [n] in fp32.

    A sum with a large number leaves the rounded one in its last bits. Rounding keeps the order.
    """
    whole = torch.tensor(_WHOLE)
    smallest = int(whole.view(torch.int32)) - _STEPS
    return torch.add(whole, shares, alpha=_STEPS, out=out).view(torch.int32).sub_(smallest)


def _make_sure(codes: Tensor, shares: Tensor, kind: FourBits, spare: Tensor) -> None:
    """Replace the codes that are not sure, of [n] in uint8, n in eights, by those of the shares [n] in fp32.

    ``spare``, [n] in fp32, is written to.
    """
    every = torch.full((8,), _UNSURE, dtype=torch.uint8).view(torch.int64)
    unsure = spare.view(torch.int64)[: len(codes) // 8]
    eights = torch.bitwise_and(codes.view(torch.int64), every, out=unsure).nonzero()[:, 0]
    if len(eights):
        bounds, order = _bounds(kind)
        codes.view(-1, 8)[eights] = order[torch.bucketize(shares.view(-1, 8)[eights], bounds)]


@cache
def _bounds(kind: FourBits) -> tuple[Tensor, Tensor]:
    """The bounds between the levels, ascending, [15] in fp32, and the codes of the levels, ascending, [16] in uint8."""
    ordered, order = levels_of(kind).sort(stable=True)
    return (ordered[:-1] + ordered[1:]) / 2, order.to(torch.uint8)


@cache
def _codes_of_steps(kind: FourBits) -> Tensor:
    """The code of each step, [2 * ``_STEPS`` + 1] in uint8."""
    bounds, order = _bounds(kind)
    steps = _steps(bounds, torch.empty(len(bounds)))
    found = order[torch.bucketize(torch.arange(2 * _STEPS + 1, dtype=torch.int32), steps)]
    found[steps] |= _UNSURE
    return found
