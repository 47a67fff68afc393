"""Weights in words of 32 bits as the programs of GPTQ and AWQ write them, bit by bit."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

_AWQ = torch.tensor([0, 2, 4, 6, 1, 3, 5, 7])


def packed(codes: Tensor, bits: int) -> Tensor:
    """Words [n * bits / 32, columns] in int32 of codes [n, columns]."""
    words = torch.zeros(codes.shape[0] * bits // 32, codes.shape[1], dtype=torch.int64)
    for row in range(codes.shape[0]):
        for bit in range(bits):
            place = row * bits + bit
            words[place // 32] |= (codes[row] >> bit & 1) << place % 32
    # The highest bit is the sign.
    return (words - (words >> 31 << 32)).int()


def stored(kind: str, codes: Tensor, zeros: Tensor, bits: int) -> tuple[Tensor, Tensor]:
    """``qweight`` and ``qzeros`` of codes [in, out] and zeros [groups, out]."""
    if kind == "awq":
        columns = torch.cat([_AWQ + 8 * word for word in range(codes.shape[1] // 8)])
        qweight, qzeros = (packed(c[:, columns].t(), 4).t().contiguous() for c in (codes, zeros))
        return qweight, qzeros
    less = (zeros - 1) % (1 << bits) if kind == "gptq" else zeros
    return packed(codes, bits), packed(less.t(), bits).t().contiguous()


def quantise_folder(folder: Path, target: Path, kind: str, bits: int = 4, size: int = 32) -> dict[str, Tensor]:
    """Write a model's folder with the linears of its blocks in words; returns the weights [out, in] that are meant.

    Inputs are put into groups in an order of their own (``desc_act``) by GPTQ.
    """
    tensors, meant = load_file(folder / "model.safetensors"), {}
    generator = torch.Generator().manual_seed(0)
    for key in [key for key in tensors if "proj.weight" in key]:
        weight = tensors.pop(key).float()
        name, inputs = key.removesuffix(".weight"), weight.shape[1]
        of = torch.arange(inputs) // size
        of = of if kind == "awq" else of[torch.randperm(inputs, generator=generator)]
        grouped = [weight[:, of == group] for group in range(int(of.max()) + 1)]
        low, high = (torch.stack([getattr(one, end)(1) for one in grouped]) for end in ("amin", "amax"))
        scales = ((high - low) / ((1 << bits) - 1)).half()
        zeros = (-low / scales).round().clamp(0, (1 << bits) - 1).long()
        codes = (weight.t() / scales[of] + zeros[of]).round().clamp(0, (1 << bits) - 1).long()
        meant[name] = (scales.float()[of] * (codes - zeros[of])).t()
        tensors[f"{name}.qweight"], tensors[f"{name}.qzeros"] = stored(kind, codes, zeros, bits)
        tensors[f"{name}.scales"] = scales
        if kind != "awq":
            tensors[f"{name}.g_idx"] = of.int()
    target.mkdir()
    save_file(tensors, target / "model.safetensors", metadata={"format": "pt"})
    entries: dict[str, Any] = json.loads((folder / "config.json").read_text())
    method = "awq" if kind == "awq" else "gptq"
    entries["quantization_config"] = {"quant_method": method, "bits": bits, "group_size": size}
    more = {"version": "gemm", "zero_point": True} if kind == "awq" else {"checkpoint_format": kind, "desc_act": True}
    entries["quantization_config"] |= more
    (target / "config.json").write_text(json.dumps(entries))
    for path in folder.glob("token*"):
        (target / path.name).write_bytes(path.read_bytes())
    return meant
