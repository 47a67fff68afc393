"""Quantised bases: LLM.int8 (Dettmers et al. 2022) and NF4 with double quantisation (Dettmers et al. 2023), by
bitsandbytes. Adapters do not know of it: a site runs the forward of the module's own class."""

from __future__ import annotations

from typing import TYPE_CHECKING, Literal

import torch
from torch import nn

from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

Quantization = Literal["nf4", "fp4", "int8"]
# By this attribute of a 4-bit linear, bitsandbytes decides whether to pack its weight anew for a CPU.
PACKS = "support_avx512bf16_for_cpu"


def quantization_config(kind: Quantization, compute_dtype: torch.dtype) -> BitsAndBytesConfig:
    """transformers' configuration for loading a base in this quantisation.

    Raises:
        UserError: bitsandbytes is not installed.
    """
    try:
        import bitsandbytes  # noqa: F401
    except ImportError:
        raise UserError(f'quantization: {kind} needs bitsandbytes: pip install "weft[quant]".') from None
    from transformers import BitsAndBytesConfig

    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind,
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute_dtype,
    )


def num_parameters(model: nn.Module) -> int:
    """The number of a base's parameters; of those that are packed in 4 bits as many as they stand for."""
    return sum(getattr(getattr(p, "quant_state", None), "shape", p.shape).numel() for p in model.parameters())


def one_kernel(model: nn.Module) -> list[nn.Module]:
    """Let 4-bit linears on a CPU compute the same with and without gradients; returns those that would not have.

    At the first pass without gradients, bitsandbytes packs their weights anew for a faster kernel that rounds
    differently (by 6e-3 in logits of a tiny Llama). Whether a layer has gradients depends on the methods in the batch.
    """
    packs = [module for module in model.modules() if getattr(module, PACKS, False)]
    for module in packs:
        setattr(module, PACKS, False)
    return packs
