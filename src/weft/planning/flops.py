"""The floating-point operations of recorded operators: those of matrix products, two for each multiplication."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import torch

from weft.planning.dry_run import Call, Shaped

_aten: Any = torch.ops.aten
# Operator -> at which argument its first factor stands; the second is the next one.
_PRODUCTS = {
    _aten.mm: 0, _aten.bmm: 0, _aten.mv: 0, _aten.dot: 0, _aten.addmm: 1, _aten.addmm_: 1, _aten.baddbmm: 1,
    _aten.baddbmm_: 1,
}  # fmt: skip
_ATTENTION = "_scaled_dot_product"


def flops_of(calls: Iterable[Call]) -> int:
    """The operations of all the calls."""
    return sum(map(_flops, calls))


def _flops(call: Call) -> int:
    packet = call.operator.overloadpacket
    if packet in _PRODUCTS:
        first, second = call.arguments[_PRODUCTS[packet] :][:2]
        return 2 * math.prod(first.shape) * (second.shape[-1] if len(second.shape) > 1 else 1)
    if packet.__name__.startswith(_ATTENTION):
        tensors = [x for x in call.arguments if isinstance(x, Shaped)][:4]
        # The backward pass begins with the gradient, and makes five products for the forward's two.
        backward = "backward" in packet.__name__
        q, k, v = tensors[1:4] if backward else tensors[:3]
        pairs = 2 * math.prod(q.shape[:-1]) * k.shape[-2]
        return pairs * ((3 * q.shape[-1] + 2 * v.shape[-1]) if backward else (q.shape[-1] + v.shape[-1]))
    return 0
