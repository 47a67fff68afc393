"""The comparison of two models' weights, tensor by tensor, and what a difference looks like."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import KW_ONLY, dataclass

import torch
from torch import Tensor

from weft.export.number_format import NumberFormat, rms
from weft.models.complete import named
from weft.ops.copying import turned

# Two right tensors are each rounded once, and one may come of a change that was rounded before: three errors of a
# format are the most that two right ones are apart. One more is for the orders in which a change is summed.
ROUNDINGS = 4
# A format may round a small change away, although each number is as near as it can be.
_KEPT = (0.5, 1.5)
_LIKE = 0.1  # a change is like another if no more than this share of it is left beside it


@dataclass(frozen=True)
class Weights:
    """The weights of a model in 32 bits, by the names in its state dict, matrices as [out, in].

    Attributes:
        label: what messages call the model.
        base: the same without the adapter, where there is one.
        tied: names of tensors that are one.
    """

    tensors: Mapping[str, Tensor]
    formats: Mapping[str, NumberFormat]
    _: KW_ONLY
    label: str
    base: Mapping[str, Tensor] | None = None
    tied: frozenset[str] = frozenset()


@dataclass(frozen=True)
class TensorFindings:
    """The result of a comparison of weights.

    Attributes:
        tensors: how many have the same name and are not the same by birth.
        differing: names of those that are further apart than their formats explain, in the model's order.
        first: what the first of them looks like, in words.
        only_a, only_b: names that one side alone has.
        largest: the largest difference as a share of what is allowed.
        kept: how many times the adapter's change is in the other side, by least squares; None without an adapter.
    """

    tensors: int
    differing: tuple[str, ...]
    first: str
    _: KW_ONLY
    only_a: tuple[str, ...]
    only_b: tuple[str, ...]
    largest: float
    kept: float | None = None

    @property
    def different(self) -> str:
        """What differs by more than rounding explains, in words; empty if nothing does."""
        if self.differing:
            return (
                f"{len(self.differing)} of {self.tensors} tensors differ by more than their formats explain, first "
                f"{self.first}"
            )
        if self.kept is not None and not _KEPT[0] <= self.kept <= _KEPT[1]:
            return (
                f"each tensor is within its format's rounding, but the adapter's change is there {self.kept:.2g} "
                "times: the format has rounded it away"
            )
        return ""

    def lines(self) -> list[str]:
        """The findings as lines for people."""
        found = [
            f"weights: {self.tensors - len(self.differing)} of {self.tensors} tensors are the same within their "
            f"formats' rounding (the furthest at {self.largest:.2g} of what is allowed)"
        ]
        if self.kept is not None:
            found.append(f"the adapter's change is there {self.kept:.4g} times")
        for side, names in (("A", self.only_a), ("B", self.only_b)):
            found += [f"only in {side}: {named(names)}"] * bool(names)
        return found


def compare_weights(a: Weights, b: Weights) -> TensorFindings:
    """Compare the tensors of two models that have the same names."""
    both = [key for key in a.tensors if key in b.tensors]
    # The side with an adapter knows what its change is.
    one, other = (b, a) if a.base is None and b.base is not None else (a, b)
    differing, first, largest = [], "", 0.0
    for key in both:
        wanted, found = a.tensors[key], b.tensors[key]
        share = math.inf
        if wanted.shape == found.shape:
            share = _share(wanted, found, a.formats[key], b.formats[key])
        if not share <= 1:
            differing.append(key)
            first = first or _look(key, one, other)
        elif share > largest:
            largest = share
    return TensorFindings(
        len(both),
        tuple(differing),
        first,
        only_a=tuple(sorted(a.tensors.keys() - b.tensors.keys())),
        only_b=tuple(sorted(b.tensors.keys() - a.tensors.keys())),
        largest=largest,
        kept=_kept(one, other),
    )


def _kept(a: Weights, b: Weights) -> float | None:
    """The factor by which the change of the adapter in ``a`` is in ``b``."""
    if a.base is None:
        return None
    along = size = 0.0
    for key, base in a.base.items():
        wanted, found = a.tensors.get(key), b.tensors.get(key)
        if wanted is None or found is None or not wanted.shape == found.shape == base.shape or wanted is base:
            continue
        change = (wanted - base).double()
        along += float((change * (found - base)).sum())
        size += float(change.square().sum())
    return along / size if size else None


def explained_errors(a: Weights, b: Weights) -> dict[str, Tensor]:
    """For each tensor, of any shape, that is not the same what rounding to the other side's format may move.

    Each side may have a format of fewer bits. The two errors are added.
    """
    found = {}
    for key, weight in a.tensors.items():
        other = b.tensors.get(key)
        alike = other is not None and other.shape == weight.shape and weight.is_floating_point()
        if other is None or not alike or torch.equal(weight, other):
            continue
        ways = ((weight, b.formats[key]), (other, a.formats[key]))
        moved = [form.moved(tensor) for tensor, form in ways if not form.exact]
        if moved:
            found[key] = sum(moved[1:], moved[0])
    return found


def _share(wanted: Tensor, found: Tensor, of_a: NumberFormat, of_b: NumberFormat) -> float:
    """The distance of two tensors of any shape as a share of what their formats allow."""
    if torch.equal(wanted, found):
        return 0.0
    if not wanted.is_floating_point():
        return math.inf
    allowed = ROUNDINGS * math.hypot(of_b.error(wanted), of_a.error(found))
    apart = rms(found - wanted)
    return apart / allowed if allowed else math.inf


def _look(key: str, a: Weights, b: Weights) -> str:
    """What a tensor that differs looks like."""
    wanted, found = a.tensors[key], b.tensors[key]
    if wanted.shape != found.shape:
        return (
            f"'{key}' is {tuple(wanted.shape)} in {a.label} and {tuple(found.shape)} in {b.label}."
            f"{turned(found.shape, wanted.shape)}"
        )
    what = f"'{key}' differs: root mean square {rms(found - wanted):.2g}, of the tensor {rms(wanted):.2g}"
    reason = _spoilt(found) or _untied(key, a, b) or _turned(wanted, found)
    reason = reason or _of_the_change(a.base.get(key) if a.base else None, wanted, found)
    return f"{what}. {reason.format(a=a.label, b=b.label) or _rows(wanted, found)}"


def _spoilt(found: Tensor) -> str:
    wrong = int((~found.isfinite()).sum())
    if wrong:
        return f"{wrong} of its numbers are NaN or infinite in {{b}}."
    return "" if found.any() else "It is all zeros in {b}."


def _untied(key: str, a: Weights, b: Weights) -> str:
    if (key in a.tied) == (key in b.tied):
        return ""
    one, other = ("{a}", "{b}") if key in a.tied else ("{b}", "{a}")
    return f"In {one} it is one tensor with another (a tied head); in {other} the two are apart."


def _turned(wanted: Tensor, found: Tensor) -> str:
    square = wanted.dim() == 2 and wanted.shape[0] == wanted.shape[1]
    same = square and rms(found.t() - wanted) <= _LIKE * rms(found - wanted)
    return "It is transposed: the other way round the two are alike." if same else ""


def _of_the_change(base: Tensor | None, wanted: Tensor, found: Tensor) -> str:
    """What became of the adapter's change in a tensor."""
    if base is None or base.shape != found.shape:
        return ""
    change, there = wanted - base, found - base
    size = rms(change)
    if not size:
        return "The adapter leaves this tensor alone. Has {b} another base?"
    share = float((change.double() * there.double()).sum() / change.double().square().sum())

    def alike(one: Tensor, other: Tensor) -> bool:
        return rms(one - other) <= _LIKE * size * max(1.0, abs(share))

    if alike(there, torch.zeros_like(there)):
        return "The adapter's change is missing in {b}."
    if alike(there, share * change):
        return f"The adapter's change is in {{b}} {share:.3g} times: with another scale."
    if change.dim() == 2 and change.shape[0] == change.shape[1] and alike(there, change.t()):
        return "The adapter's change is in {b}, but transposed."
    return "What {b} adds to the base is not the adapter's change."


def _rows(wanted: Tensor, found: Tensor) -> str:
    """The rows that differ most, of a matrix or a vector."""
    apart = (found - wanted).reshape(len(wanted), -1).abs().amax(1) if wanted.dim() else (found - wanted).reshape(1)
    rows = (apart > apart.max() / 16).nonzero().flatten().tolist()
    return f"{len(rows)} of its {len(apart)} rows, from row {rows[0]} on." if len(rows) < len(apart) else "In all rows."
