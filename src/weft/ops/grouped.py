"""What many adapters do to the rows of one linear, in a few products for all of them.

Every row n belongs to one adapter (or to none). Where each of them changes ``y = W x`` in one of the ways of
``RowForm``, all changes are one computation over all rows:

    y_n <- s_n * y_n + B^T (m_n * (A x_n))

A and B hold the factors of all adapters one below the other, and the mask m_n leaves those of row n's own. A bias is
one more row of B, beside the number 1.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from weft.ops.products import add_product_, multiply


@dataclass(frozen=True)
class RowForm:
    """An adapter's change of a linear's rows, ``y <- scale * y + b a x + bias`` of ``x <- input_scale * x``.

    Attributes:
        a: [r, in]. ``b``: [out, r], with every factor in it.
        bias: [out]. ``scale``: [out]. ``input_scale``: [in].
        on_output: changes rows y [n, out] in place, in their dtype, after all of that.
    """

    a: Tensor | None = None
    b: Tensor | None = None
    _: KW_ONLY
    bias: Tensor | None = None
    scale: Tensor | None = None
    input_scale: Tensor | None = None
    on_output: Callable[[Tensor], object] | None = None

    @property
    def adds(self) -> bool:
        """Whether something is added to y."""
        return self.a is not None or self.bias is not None

    def cast(self, dtype: torch.dtype) -> RowForm:
        """The same, with what is added in this dtype."""
        a, b, bias = (None if tensor is None else tensor.to(dtype) for tensor in (self.a, self.b, self.bias))
        return replace(self, a=a, b=b, bias=bias)

    def add_to(self, y: Tensor, x: Tensor) -> None:
        """Add ``b a x + bias`` to rows y [n, out] of this adapter alone, for its rows x [n, in]; then ``on_output``."""
        if self.bias is not None:
            y += self.bias
        if self.a is not None and self.b is not None:
            add_product_(y, multiply(x.to(y.dtype), self.a.t()), self.b.t())
        if self.on_output is not None:
            self.on_output(y)


@runtime_checkable
class HasRowForm(Protocol):
    """A function at a site that has such a form when nothing is drawn at random."""

    def row_form(self) -> RowForm | None:
        """None: with these settings it has none."""


@dataclass(frozen=True)
class Factors:
    """The factors of all adapters, one below the other.

    Attributes:
        a: [in, R], transposed, and ``b``: [R, out]. A bias is a row of b whose column of a is zero.
        owners: [R], whose each of them is.
        constant: [R] bool, true for biases.
    """

    a: Tensor
    b: Tensor
    owners: Tensor
    constant: Tensor


def stack_factors(forms: Sequence[RowForm | None], inputs: int, dtype: torch.dtype) -> Factors | None:
    """The factors of the adapters 0, 1, ..., of x [..., ``inputs``]; None if none has any."""
    a, b, owners, constant = list[Tensor](), list[Tensor](), list[int](), list[bool]()
    for index, form in enumerate(forms):
        if form is not None and form.a is not None and form.b is not None:
            a.append(form.a.to(dtype))
            b.append(form.b.to(dtype).t())
            owners += [index] * len(form.a)
            constant += [False] * len(form.a)
        if form is not None and form.bias is not None:
            a.append(form.bias.new_zeros(1, inputs, dtype=dtype))
            b.append(form.bias.to(dtype)[None])
            owners.append(index)
            constant.append(True)
    if not owners:
        return None
    device = a[0].device
    return Factors(
        torch.cat(a).t().contiguous(),
        torch.cat(b),
        torch.tensor(owners, device=device),
        torch.tensor(constant, device=device),
    )


@dataclass(frozen=True)
class Choices:
    """Which factors are whose: ``replaced`` [N, R] bool is true where ``values`` [N, R] stand in the place of A x."""

    replaced: Tensor
    values: Tensor


def choose_factors(factors: Factors, owners: Tensor) -> Choices | None:
    """The choices for rows of these owners [N], [N, R] each; None: every row has all factors, and none is a bias."""
    own = factors.owners == owners[:, None]
    replaced = ~own | factors.constant
    return Choices(replaced, own.to(factors.b.dtype)) if bool(replaced.any()) else None


def row_table(vectors: Sequence[Tensor | None], owners: Tensor, neutral: float, dtype: torch.dtype) -> Tensor | None:
    """Each row's own vector, [N, d], by its owner [N]; ``neutral`` for adapters without one. None if none has one."""
    some = next((vector for vector in vectors if vector is not None), None)
    if some is None:
        return None
    plain = torch.full_like(some, neutral, dtype=dtype)
    return torch.stack([plain if vector is None else vector.to(dtype) for vector in vectors])[owners]


def grouped_change(
    x: Tensor, y: Tensor, factors: Factors | None, choices: Choices | None, scale: Tensor | None = None
) -> Tensor:
    """The formula at the head of this module; it may write into y.

    Args:
        x: [N, in].
        y: [N, out].
        choices: of ``choose_factors``.
        scale: [N, out], of adapters that have no factors.

    Returns:
        [N, out].
    """
    if scale is not None:
        y = y.mul_(scale)
    if factors is None:
        return y
    z = multiply(x.to(y.dtype), factors.a)
    if choices is not None:
        # Not a product with zeros: what a neighbour's factors make of this row may be infinite.
        z = torch.where(choices.replaced, choices.values, z)
    add_product_(y, z, factors.b)
    return y


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
