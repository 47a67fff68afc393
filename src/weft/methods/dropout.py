"""Dropout by a mask that neither a neighbour nor a recomputation changes."""

from __future__ import annotations

import torch
from torch import Tensor

from weft.core.route import Segment
from weft.ops.seeds import stable_seed


def seeded_dropout(x: Tensor, p: float, segment: Segment, site: str) -> Tensor:
    """Inverted dropout of x, [1, N, d] or padded [B, T, d], by a mask that only the segment's seed and the site fix."""
    if p <= 0.0 or segment.seed is None:
        return x
    generator = torch.Generator(device=x.device)
    generator.manual_seed(stable_seed(segment.seed, site))
    inside = segment.inside(x)
    if inside is None:
        mask = torch.empty_like(x).bernoulli_(1.0 - p, generator=generator)
        return x * mask.div_(1.0 - p)
    # Drawn for the tokens alone, as in the stream, for T is the longest neighbour's length.
    kept = x.new_empty(segment.tokens, x.shape[-1]).bernoulli_(1.0 - p, generator=generator)
    return x * torch.zeros_like(x).masked_scatter(inside[..., None], kept.div_(1.0 - p))
