"""How far numbers are from each other."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable

import torch
from torch import Tensor


def difference(found: Iterable[Tensor], wanted: Iterable[Tensor]) -> float:
    """Largest difference of two lists of tensors, as a share of the largest wanted value where that is above one: the
    distance of neighbouring floats, and with it what rounding may change, grows with the values (Bloom's and Gemma's
    logits reach 30)."""
    pairs = [(x.detach().double(), y.detach().double()) for x, y in zip(found, wanted, strict=True)]
    largest = max((float(y.abs().max()) for _, y in pairs), default=0.0)
    return max((float((x - y).abs().max()) for x, y in pairs), default=0.0) / max(1.0, largest)


def sha256(tensors: Iterable[Tensor]) -> str:
    """Of all bytes."""
    digest = hashlib.sha256()
    for tensor in tensors:
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def measured(name: str, value: float, limit: float, derived: bool = False) -> None:
    """Assert, and print the figure for whoever runs with -s. A limit that was ``derived`` (from eps and sizes, or from
    what rounding does on the spot) may be near; any other must be ten times what was seen on other machines."""
    print(f"[measured] {name}: {value:.3g} (limit {limit:.0e})")
    assert value <= limit, f"{name}: {value} > {limit}"
