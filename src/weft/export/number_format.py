"""Number formats of stored weights: what a format makes of a weight, and how far that may be from it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from weft.export.gguf_file import gguf_library
from weft.methods.dense import kind_of
from weft.ops.four_bit import dequantize_weight, quantize_weight
from weft.ops.quantization import FourBits


@dataclass(frozen=True)
class NumberFormat:
    """A number format: a dtype, a quantisation by bitsandbytes with its block's length, or llama.cpp's ``q8_0``.

    ``nested``: the scales of the blocks are quantised too.
    """

    dtype: torch.dtype
    quantization: str | None = None
    blocksize: int = 64
    nested: bool = False

    @property
    def name(self) -> str:
        """The format in a word."""
        return self.quantization or str(self.dtype).removeprefix("torch.")

    @property
    def exact(self) -> bool:
        """Whether it has the precision in which everything is compared."""
        return self.quantization is None and self.dtype.itemsize >= 4

    def rounded(self, weight: Tensor) -> Tensor:
        """What is left of a weight [out, in] (or a tensor of any shape) that is stored in this format."""
        if self.quantization is None:
            return weight.to(self.dtype).to(weight.dtype)
        if self.quantization == "int8":
            step = (weight.abs().amax(1, keepdim=True) / 127).clamp(min=torch.finfo(weight.dtype).tiny)
            return (weight / step).round() * step
        if self.quantization == "q8_0":
            gguf = gguf_library()
            kind = gguf.GGMLQuantizationType.Q8_0
            stored = gguf.quants.quantize(weight.detach().float().cpu().contiguous().numpy(), kind)
            return torch.tensor(gguf.quants.dequantize(stored, kind)).to(weight)
        packed, state = quantize_weight(
            weight.to(torch.float32), cast(FourBits, self.quantization), block=self.blocksize, nested=self.nested
        )
        return dequantize_weight(packed, state).to(weight.dtype)

    def moved(self, weight: Tensor) -> Tensor:
        """What rounding to this format may move in each number of a weight of any shape.

        A weight that a dtype holds as it is was rounded before, nobody knows from where: from as far as half of the
        distance of two neighbours, drawn by a generator of its own.
        """
        error = self.rounded(weight) - weight
        if self.quantization is not None or bool(error.any()):
            return error
        drawn = torch.rand(weight.shape, generator=torch.Generator().manual_seed(0)) - 0.5
        # The distance of neighbours is eps times the power of two below the number.
        exponent = weight.float().frexp().exponent.cpu() - 1
        return (drawn * torch.finfo(self.dtype).eps * torch.ldexp(torch.ones(weight.shape), exponent)).to(weight)

    def error(self, weight: Tensor) -> float:
        """The root mean square of what rounding to this format moves in a weight of any shape.

        In 32 bits it is half of the distance of two neighbours, for a change is summed in many orders there.
        """
        if self.exact:
            return torch.finfo(self.dtype).eps / 2 * rms(weight)
        return rms(self.moved(weight))


def rms(tensor: Tensor) -> float:
    """The root mean square of a tensor of any shape."""
    return float(tensor.double().square().mean().sqrt()) if tensor.numel() else 0.0


def format_of(parameter: Tensor) -> NumberFormat:
    """The format in which a model keeps a parameter of any shape."""
    state: Any = getattr(parameter, "quant_state", None)
    kind = kind_of(parameter)
    if kind is None:
        return NumberFormat(parameter.dtype)
    if state is None:
        return NumberFormat(parameter.dtype, kind)
    return NumberFormat(parameter.dtype, kind, blocksize=int(state.blocksize), nested=bool(state.nested))


def formats_in(model: nn.Module) -> dict[str, NumberFormat]:
    """The format of every tensor in a model's state dict; of tied ones under each name."""
    found = {name: format_of(p) for name, p in model.named_parameters(remove_duplicate=False)}
    return found | {name: NumberFormat(b.dtype) for name, b in model.named_buffers(remove_duplicate=False)}


def words_of(model: nn.Module) -> str:
    """The formats of a model's parameters in words, the quantised first."""
    formats = {format_of(p) for p in model.parameters()}
    names = {one.name: one.quantization is None for one in formats}
    return " and ".join(sorted(names, key=lambda name: (names[name], name)))
