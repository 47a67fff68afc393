"""The low-rank update of LoRA (Hu et al. 2021, eq. 3)."""

from __future__ import annotations

from torch import Tensor


def low_rank_add(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """``y + scaling * (x Aᵀ) Bᵀ``, in y's dtype.

    Args:
        y: [..., out]; x: [..., in]; a: [r, in]; b: [out, r], any floating dtype (cast to y's, gradients come back in
            their own).

    Returns:
        [..., out].
    """
    dtype = y.dtype
    z = x.reshape(-1, x.shape[-1]).to(dtype) @ a.to(dtype).t()
    # addmm folds scaling and sum into the product: no [N, out] intermediate is written or saved.
    return y.reshape(-1, y.shape[-1]).addmm(z, b.to(dtype).t(), alpha=scaling).view_as(y)


def low_rank_add_ref(y: Tensor, x: Tensor, a: Tensor, b: Tensor, scaling: float) -> Tensor:
    """The same, as the paper writes it."""
    return y + scaling * (x.to(y.dtype) @ a.to(y.dtype).transpose(0, 1) @ b.to(y.dtype).transpose(0, 1))
