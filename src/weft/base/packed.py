"""A linear whose frozen weight lies in words of few bits: what checkpoints by GPTQ and AWQ are made of."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from weft.ops.packed import packed_linear
from weft.ops.words import GroupedRows, Packing


class PackedLinear(nn.Linear):
    """``y = x W^T + b`` with W made anew in each pass. Its tensors have the names of the checkpoint's files."""

    qweight: Tensor
    qzeros: Tensor
    scales: Tensor

    def __init__(
        self,
        inputs: int,
        outputs: int,
        tensors: Mapping[str, Tensor],
        *,
        bits: int,
        group_size: int,
        packing: Packing,
        bias: bool,
    ) -> None:
        """Make one of ``tensors``: ``qweight``, ``qzeros``, ``scales``, and ``g_idx`` [in] where inputs have an order.

        Their shapes are those of ``GroupedRows``.
        """
        nn.Module.__init__(self)
        self.in_features, self.out_features = inputs, outputs
        self.bits, self.group_size, self.packing = bits, group_size, packing
        for name, tensor in tensors.items():
            self.register_buffer(name, tensor)
        self.register_parameter("bias", nn.Parameter(torch.empty(outputs), requires_grad=False) if bias else None)

    def rows(self, dtype: torch.dtype) -> GroupedRows:
        """The rows of the weight as numbers of ``dtype``."""
        groups = self._buffers.get("g_idx")
        if groups is None:
            groups = torch.arange(self.in_features, device=self.scales.device) // self.group_size
        return GroupedRows(
            self.qweight, self.qzeros, self.scales, groups=groups, bits=self.bits, packing=self.packing, dtype=dtype
        )

    @property
    def weight(self) -> Tensor:  # type: ignore[override]
        """The dequantised weight, [out, in] in fp32; a new tensor each time."""
        return self.rows(torch.float32).whole()

    @property
    def kind(self) -> str:
        """``gptq`` or ``awq``."""
        return "awq" if self.packing == "awq" else "gptq"

    def forward(self, x: Tensor) -> Tensor:
        """The outputs [..., out] of x [..., in]."""
        bias = None if self.bias is None else self.bias.to(x.dtype)
        return packed_linear(x, self.rows(x.dtype), bias)

    def make_plain(self, dtype: torch.dtype) -> None:
        """Become an ``nn.Linear`` of the dequantised weight."""
        weight = self.weight.to(dtype)
        self._buffers.clear()
        self._parameters["weight"] = nn.Parameter(weight, requires_grad=False)
