"""LoRA's first A and B: random, from the base's weight (PiSSA), or from the part that quantisation lost (LoftQ)."""

from __future__ import annotations

import math

from torch import Tensor, nn

from weft.core.adapter import BuildContext
from weft.errors import UserError
from weft.methods.dense import dense_weight
from weft.methods.initial import kaiming_uniform
from weft.ops.lowrank import loftq_factors, principal_factors, sketched_factors


def drawn_factors(
    init: bool | str, rank: int, inputs: int, outputs: int, context: BuildContext, *, count: int = 1
) -> tuple[Tensor, Tensor]:
    """A [count * r, in] Kaiming-uniform (or Gaussian), B [out, count * r] zero (``init`` false: Gaussian).

    ``count`` is the number of matrices that have factors of their own in them.
    """
    if init == "gaussian":
        a = context.normal(count * rank, inputs, std=1.0 / rank)
    else:
        a = kaiming_uniform(context, count * rank, inputs, inputs=inputs)
    if init:
        return a, context.zeros(outputs, count * rank)
    return a, context.normal(outputs, count * rank, std=1.0 / math.sqrt(3 * inputs))


def pissa_factors(
    init: str, base: nn.Module, rank: int, scaling: float, context: BuildContext
) -> tuple[Tensor, Tensor]:
    """A [r, in] and B [out, r] of the weight's principal part (Meng et al. 2024): its r largest singular values."""
    weight = dense_weight(base, context.dtype)
    _, _, iterations = init.partition("_niter_")
    if iterations:
        return sketched_factors(weight, rank, scaling, int(iterations), context.generator)
    return principal_factors(weight, rank, scaling)


def loftq_initial_factors(
    path: str, base: nn.Module, rank: int, scaling: float, context: BuildContext
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
    _, a, b = loftq_factors(original, rank, scaling, lambda _: quantized, 1)
    return a, b
