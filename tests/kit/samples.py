"""Texts of random tokens."""

from __future__ import annotations

import random

from tests.kit.models import VOCABULARY

from weft.data import Sample


def texts(count: int, low: int = 2, high: int = 14, seed: int = 0) -> list[list[int]]:
    """Token ids of random lengths."""
    rng = random.Random(seed)
    return [[rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high))] for _ in range(count)]


def samples(count: int, low: int = 3, high: int = 14, seed: int = 0) -> list[Sample]:
    """Texts whose second half is learned."""
    out = []
    for index, ids in enumerate(texts(count, max(low, 2), high, seed)):
        begin = max(1, len(ids) // 2)
        out.append(Sample(ids, [0.0] * begin + [1.0] * (len(ids) - begin), f"sample {index}"))
    return out
