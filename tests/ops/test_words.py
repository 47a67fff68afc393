"""Weights in words of 32 bits, packed here number by number as the two formats' own programs do it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests.kit.words import stored
from torch import Tensor

from weft.ops import products
from weft.ops.packed import packed_linear, packed_linear_ref
from weft.ops.words import GroupedRows, unpack_awq, unpack_words


def made(kind: str, bits: int, inputs: int, outputs: int, size: int, order: bool) -> tuple[dict[str, Any], Tensor]:
    """The tensors of a linear in a checkpoint, and its weight [out, in]."""
    generator = torch.Generator().manual_seed(bits + inputs)
    groups = -(-inputs // size)
    of = torch.arange(inputs) // size
    of = of[torch.randperm(inputs, generator=generator)] if order else of
    codes = torch.randint(1 << bits, (inputs, outputs), generator=generator)
    zeros = torch.randint(1 << bits, (groups, outputs), generator=generator)
    scales = (torch.rand(groups, outputs, generator=generator) + 0.1).half()
    weight = (scales.float()[of] * (codes - zeros[of])).t()
    qweight, qzeros = stored(kind, codes, zeros, bits)
    return {"qweight": qweight, "qzeros": qzeros, "scales": scales, "groups": of.int()}, weight


CASES = [("gptq", 4, 64, 64, 32, False), ("gptq", 4, 96, 32, 32, True), ("gptq_v2", 4, 64, 32, 64, True),
         ("gptq", 8, 64, 64, 16, False), ("gptq", 2, 64, 32, 32, False), ("gptq", 3, 96, 64, 32, True),
         ("gptq_v2", 3, 64, 32, 64, False), ("gptq", 4, 72, 40, 32, False), ("awq", 4, 64, 64, 32, False),
         ("awq", 4, 48, 40, 48, False)]  # fmt: skip


@pytest.mark.parametrize("case", CASES, ids=str)
def test_the_numbers(case: tuple[Any, ...], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(products, "_PIECE", 500)
    monkeypatch.setattr(products, "_SLAB", 1000)
    kind, bits, *_ = case
    tensors, weight = made(*case)
    rows = GroupedRows(**tensors, bits=bits, packing=kind, dtype=torch.float32)
    assert rows.shape == tuple(weight.shape)
    assert torch.equal(rows.whole(), weight)
    assert torch.equal(torch.cat([wide.clone() for _, wide in rows.pieces()]), weight)
    assert torch.equal(torch.cat([slab for _, slab in rows.slabs()]), weight)
    assert len(list(rows.pieces())) > 1 or weight.shape[0] <= 40
    for dtype in (torch.float32, torch.bfloat16):
        rows = GroupedRows(**tensors, bits=bits, packing=kind, dtype=dtype)
        x = torch.randn(9, weight.shape[1], generator=torch.Generator().manual_seed(0)).to(dtype).requires_grad_()
        found = []
        for function in (packed_linear, packed_linear_ref):
            y = function(x, rows)
            found.append((y.detach(), *torch.autograd.grad(y.sum(), x)))
        for ours, wanted in zip(*found, strict=True):
            torch.testing.assert_close(ours, wanted, rtol=2 * torch.finfo(dtype).eps, atol=1e-3)


def test_the_words_of_a_known_file() -> None:
    """The first word of a symmetric GPTQ checkpoint's zeros is 0x77777777: eight zeros of 8, less one."""
    assert unpack_words(torch.tensor([0x77777777], dtype=torch.int32), 4).tolist() == [7] * 8
    assert unpack_awq(torch.tensor([0x75316420], dtype=torch.int32)).tolist() == [0, 1, 2, 3, 4, 5, 6, 7]
    assert unpack_words(torch.tensor([-1, -1, -1], dtype=torch.int32), 3).tolist() == [7] * 32
