"""What many adapters do to the rows of one linear, in a few products for all of them.

Every row n belongs to one adapter (or to none). Where each of them changes ``y = W x`` in one of the ways of
``RowForm``, all changes are one computation over all rows:

    y_n <- s_n * y_n + B^T (m_n * (A x_n)) + c_n

A and B hold the factors of all adapters one below the other, and the mask m_n leaves those of row n's own.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor


@dataclass(frozen=True)
class RowForm:
    """An adapter's change of a linear's rows, ``y <- scale * y + b a x + bias`` of ``x <- input_scale * x``.

    Attributes:
        a: [r, in]. ``b``: [out, r], with every factor in it.
        bias: [out]. ``scale``: [out]. ``input_scale``: [in].
    """

    a: Tensor | None = None
    b: Tensor | None = None
    _: KW_ONLY
    bias: Tensor | None = None
    scale: Tensor | None = None
    input_scale: Tensor | None = None


@runtime_checkable
class HasRowForm(Protocol):
    """A function at a site that has such a form when nothing is drawn at random."""

    def row_form(self) -> RowForm: ...


@dataclass(frozen=True)
class Factors:
    """The factors of all adapters: ``a`` [R, in], ``b`` [R, out], and who owns which rows of them, ``owners`` [R]."""

    a: Tensor
    b: Tensor
    owners: Tensor


def stack_factors(forms: Sequence[RowForm | None], dtype: torch.dtype) -> Factors | None:
    """The factors [R, ...] of the adapters 0, 1, ... ; None if none has any."""
    found = [(index, form.a, form.b) for index, form in enumerate(forms) if form is not None and form.a is not None]
    if not found:
        return None
    a = torch.cat([a.to(dtype) for _, a, _ in found if a is not None])
    b = torch.cat([b.to(dtype).t() for _, _, b in found if b is not None])
    owners = torch.cat([torch.full((len(a),), index) for index, a, _ in found if a is not None])
    return Factors(a, b, owners.to(a.device))


def row_table(vectors: Sequence[Tensor | None], owners: Tensor, neutral: float, dtype: torch.dtype) -> Tensor | None:
    """Each row's own vector, [N, d], by its owner [N]; ``neutral`` for adapters without one. None if none has one."""
    some = next((vector for vector in vectors if vector is not None), None)
    if some is None:
        return None
    plain = torch.full_like(some, neutral, dtype=dtype)
    return torch.stack([plain if vector is None else vector.to(dtype) for vector in vectors])[owners]


def grouped_change(
    x: Tensor,
    y: Tensor,
    factors: Factors | None,
    foreign: Tensor | None,
    *,
    scale: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The formula at the head of this module; it may write into y.

    Args:
        x: [N, in].
        y: [N, out].
        foreign: [N, R] bool, true where a factor is not the row's own; None: all rows have all of them.
        scale: [N, out], of the adapters that have no factors.
        bias: [N, out].

    Returns:
        [N, out].
    """
    if scale is not None:
        y = y.mul_(scale)
    if bias is not None:
        y = y.add_(bias)
    if factors is None:
        return y
    z = x.to(y.dtype) @ factors.a.t()
    if foreign is not None:
        # Not a product with zeros: what a neighbour's factors make of this row may be infinite.
        z.masked_fill_(foreign, 0)
    return y.addmm_(z, factors.b)


def grouped_change_ref(x: Tensor, y: Tensor, forms: Sequence[RowForm | None], owners: Tensor) -> Tensor:
    """``grouped_change`` row by row, [N, out]; x [N, in] has its scale already, owners [N] name the forms."""
    rows = []
    for own, row, owner in zip(x, y, owners.tolist(), strict=True):
        form = forms[owner] or RowForm()
        row = row if form.scale is None else row * form.scale.to(row.dtype)
        row = row if form.bias is None else row + form.bias.to(row.dtype)
        if form.a is not None and form.b is not None:
            row = row + form.b.to(row.dtype) @ (form.a.to(row.dtype) @ own.to(row.dtype))
        rows.append(row)
    return torch.stack(rows)
