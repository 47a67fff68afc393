"""Rules that combine several tensors of one shape into one: weighted sums, TIES and DARE.

TIES (Yadav et al. 2023): keep each tensor's largest entries, elect a sign per entry, average what agrees with it.
DARE (Yu et al. 2023): drop entries at random and divide the rest by the share that is kept. The order of weighting,
electing and dividing is that of peft's ``add_weighted_adapter``.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor, nn

MajoritySign = Literal["total", "frequency"]


def weighted_sum(tensors: Sequence[Tensor], weights: Sequence[float]) -> Tensor:
    """sum_i w_i t_i, of the shape that all tensors have."""
    return _weighted(torch.stack(list(tensors)), weights).sum(0)


def keep_largest(tensor: Tensor, density: float) -> Tensor:
    """The tensor with zeros for all but the ``density`` share of entries that are largest in magnitude; same shape."""
    if density >= 1:
        return tensor
    flat, count = tensor.reshape(-1), int(density * tensor.numel())
    kept = flat.abs().topk(count).indices
    return torch.zeros_like(flat).index_copy(0, kept, flat[kept]).view_as(tensor)


def drop_at_random(tensor: Tensor, density: float, generator: torch.Generator) -> Tensor:
    """Keep every entry with probability ``density`` and divide it by that: the expectation is the tensor itself.

    The result has the tensor's shape. The draw is on the CPU, the generator's device, so that it does not depend on
    the tensor's.
    """
    if density >= 1:
        return tensor
    kept = torch.bernoulli(torch.full(tensor.shape, density, dtype=torch.float32), generator=generator)
    return tensor * kept.to(tensor) / density


def agreeing_mean(tensors: Sequence[Tensor], weights: Sequence[float], majority_sign: MajoritySign) -> Tensor:
    """Per entry the weighted sum of those tensors that have its elected sign, over their number; of their own shape.

    The elected sign is that of the entries' sum (``total``) or of the sum of their signs (``frequency``), before
    weighting; zero counts as plus. A tensor whose entry is zero agrees with nobody.
    """
    stacked = torch.stack(list(tensors))
    signs = stacked.sign()
    votes = (stacked if majority_sign == "total" else signs).sum(0)
    agrees = signs == torch.where(votes >= 0, 1, -1)
    return (_weighted(stacked, weights) * agrees).sum(0) / agrees.sum(0).clamp(min=1)


def _weighted(stacked: Tensor, weights: Sequence[float]) -> Tensor:
    shape = (-1, *[1] * (stacked.dim() - 1))
    return stacked * torch.tensor(weights, dtype=stacked.dtype, device=stacked.device).view(shape)


def merge(
    rule: str,
    tensors: Sequence[Tensor],
    weights: Sequence[float],
    *,
    density: float | None = None,
    majority_sign: MajoritySign = "total",
    generator: torch.Generator | None = None,
) -> Tensor:
    """Combine tensors of any one shape by ``linear``, ``ties``, ``dare_linear``, ``dare_ties`` or ``magnitude_prune``.

    Args:
        tensors: All of one shape and dtype, which the result has too.
        density: The share of the entries that is kept. Every rule but ``linear`` needs it.
        generator: On the CPU. DARE draws from it, tensor after tensor.
    """
    kept = list(tensors)
    if rule.startswith("dare"):
        assert density is not None
        assert generator is not None
        kept = [drop_at_random(tensor, density, generator) for tensor in tensors]
    elif rule != "linear":
        assert density is not None
        kept = [keep_largest(tensor, density) for tensor in tensors]
    if rule.endswith("ties"):
        return agreeing_mean(kept, weights, majority_sign)
    return weighted_sum(kept, weights)


def truncated_svd(matrix: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """(B [out, rank], A [rank, in]) whose product is the nearest one to ``matrix`` [out, in]; A's rows are orthonormal.

    Rows and columns beyond the matrix's smaller side are zero.
    """
    u, s, v = torch.linalg.svd(matrix, full_matrices=False)
    missing = max(rank - len(s), 0)
    b, a = u[:, :rank] * s[:rank], v[:rank]
    return nn.functional.pad(b, (0, missing)), nn.functional.pad(a, (0, 0, 0, missing))


def truncated_svd_of_product(b: Tensor, a: Tensor, rank: int) -> tuple[Tensor, Tensor]:
    """``truncated_svd(b @ a, rank)`` for b [out, n] and a [n, in] without making the product: the SVD is n by n."""
    q_b, r_b = torch.linalg.qr(b)
    q_a, r_a = torch.linalg.qr(a.t())
    new_b, new_a = truncated_svd(r_b @ r_a.t(), rank)
    return q_b @ new_b, new_a @ q_a.t()
