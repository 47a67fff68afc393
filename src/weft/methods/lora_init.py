"""LoRA's first A and B: random, from the base's weight (PiSSA), or from the part that quantisation lost (LoftQ)."""

from __future__ import annotations

import math
from typing import Protocol

import torch
from torch import Tensor, nn

from weft.base.kinds import linear_shape
from weft.core.adapter import BuildContext
from weft.errors import UserError
from weft.methods.dense import dense_weight
from weft.ops.lowrank import loftq_factors, principal_factors, sketched_factors


class LoraSettings(Protocol):
    """What of a LoRA's configuration its first values and adapted parameters depend on (``LoraConfig`` has them)."""

    @property
    def init_lora_weights(self) -> bool | str: ...
    @property
    def target_parameters(self) -> list[str] | None: ...
    @property
    def lora_dropout(self) -> float: ...
    @property
    def use_dora(self) -> bool: ...
    @property
    def pissa(self) -> bool: ...

    def rank(self, path: str) -> int: ...

    def scaling(self, path: str) -> float: ...


def drawn_factors(config: LoraSettings, path: str, base: nn.Module, context: BuildContext) -> tuple[Tensor, Tensor]:
    """A [r, in] Kaiming-uniform (or Gaussian), B [out, r] zero (``init_lora_weights: false``: Gaussian)."""
    inputs, outputs = linear_shape(base)
    r = config.rank(path)
    # Kaiming-uniform with a = sqrt(5), the reference implementation's choice, is uniform within 1 / sqrt(in).
    std = 1.0 / r if config.init_lora_weights == "gaussian" else 1.0 / math.sqrt(3 * inputs)
    if config.init_lora_weights == "gaussian":
        a = context.normal(r, inputs, std=std)
    else:
        uniform = torch.rand(r, inputs, generator=context.generator, dtype=torch.float32) * 2 - 1
        a = (uniform / math.sqrt(inputs)).to(context.device, context.dtype)
    b = context.zeros(outputs, r) if config.init_lora_weights else context.normal(outputs, r, std=std)
    return a, b


def pissa_factors(config: LoraSettings, path: str, base: nn.Module, context: BuildContext) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of the weight's principal part (Meng et al. 2024): its r largest singular values."""
    weight, r, scaling = dense_weight(base, context.dtype), config.rank(path), config.scaling(path)
    _, _, iterations = str(config.init_lora_weights).partition("_niter_")
    if iterations:
        return sketched_factors(weight, r, scaling, int(iterations), context.generator)
    return principal_factors(weight, r, scaling)


def loftq_initial_factors(
    config: LoraSettings, path: str, base: nn.Module, context: BuildContext
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] nearest to the part of the weight that NF4 lost (Li et al. 2023).

    LoftQ alternates between quantising W - B A and decomposing the rest. Here the quantised base is shared and never
    written, so Q = q(W) is fixed, and one decomposition gives the best result.

    Raises:
        UserError: The module is not quantised to 4 bits, or its weight before quantisation is not at hand.
    """
    try:
        from bitsandbytes.nn import Linear4bit
    except ImportError:
        raise UserError("init_lora_weights: loftq needs bitsandbytes; pip install bitsandbytes") from None
    if not isinstance(base, Linear4bit):
        raise UserError(
            f"init_lora_weights: loftq makes up for what quantisation lost, but module '{path}' is not quantised to 4 "
            "bits. Load the base in nf4, or use init_lora_weights: true or pissa."
        )
    if context.original_weight is None:
        raise UserError(
            "init_lora_weights: loftq needs the weights from before quantisation, and this base was loaded without "
            "them. Use init_lora_weights: true or pissa."
        )
    original = context.original_weight(path).to(context.device, context.dtype)
    quantized = dense_weight(base, context.dtype)
    if original.shape != quantized.shape:
        raise UserError(
            f"init_lora_weights: loftq: the original weight of module '{path}' is {tuple(original.shape)}, the "
            f"quantised one {tuple(quantized.shape)}; they must be of the same model."
        )
    _, a, b = loftq_factors(original, config.rank(path), config.scaling(path), lambda _: quantized, 1)
    return a, b
