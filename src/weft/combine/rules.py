"""The combination of trained adapters of one kind into a new one (``Adapters.combine``, ``weft combine``).

It works on the configurations and tensors in the adapters' files, so it needs no base. A method names the rules that
make sense for its tensors in ``combination_types``, and may override ``MethodConfig.combine``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace

import torch
from torch import Tensor

from weft.core.adapter import MethodConfig
from weft.errors import UserError, nearest
from weft.ops.combine import MajoritySign, merge
from weft.ops.seeds import stable_seed

# These rules are for tensors that are changes from zero; their names are PEFT's.
ON_CHANGES = ("linear", "ties", "dare_linear", "dare_ties", "magnitude_prune")
# These are for changes that are products of two factors.
ON_PRODUCTS = (
    *ON_CHANGES, "cat", "svd", "ties_svd", "dare_linear_svd", "dare_ties_svd", "magnitude_prune_svd",
)  # fmt: skip
# These settings are of an adapter's beginning, its training, or its place (which its tensors show too).
_MAY_DIFFER = re.compile("init|dropout|encoder|projection|seed|target|layers|leave_out|add_missing|loraplus")


@dataclass(frozen=True)
class Source:
    """One adapter: its name, its configuration and the tensors of its file."""

    name: str
    config: MethodConfig
    tensors: Mapping[str, Tensor]


@dataclass(frozen=True)
class Combination:
    """The settings of a combination, with the names of PEFT's ``add_weighted_adapter``.

    Attributes:
        weights: One per adapter; empty: the same share for each, or 1 where virtual tokens are put together.
        density: The share of the entries that pruning keeps, in (0, 1]; for ``ties``, ``dare_…``, ``magnitude_prune``.
        svd_rank: The rank of the ``svd`` rules' result; default: the largest of the adapters' ranks.
        seed: DARE's draws depend on it and the tensor's name alone.
    """

    weights: tuple[float, ...] = ()
    combination_type: str = "linear"
    density: float | None = None
    _: KW_ONLY
    majority_sign_method: MajoritySign = "total"
    svd_rank: int | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        kind = self.combination_type
        if kind not in ON_PRODUCTS:
            raise UserError(
                f"combination_type {kind!r} is none of {', '.join(ON_PRODUCTS)}.{nearest(kind, ON_PRODUCTS)}"
            )
        if not all(math.isfinite(weight) for weight in self.weights):
            raise UserError(f"weights {list(self.weights)}: every weight must be a finite number.")
        if self.prunes and self.density is None:
            raise UserError(f"combination_type {kind} needs density, the share of entries that is kept: 0.5, say.")
        if not self.prunes and self.density is not None:
            raise UserError(f"density means nothing to combination_type {kind}; leave it out.")
        if self.density is not None and not 0 < self.density <= 1:
            raise UserError(f"density is {self.density}; it must be above 0 and at most 1.")
        if self.majority_sign_method not in ("total", "frequency"):
            raise UserError(f"majority_sign_method {self.majority_sign_method!r} is neither total nor frequency.")
        if self.svd_rank is not None and not kind.endswith("svd"):
            raise UserError(f"svd_rank means nothing to combination_type {kind}; leave it out.")
        if self.svd_rank is not None and self.svd_rank < 1:
            raise UserError(f"svd_rank is {self.svd_rank}; it must be 1 or more.")

    @property
    def rule(self) -> str:
        """The rule for the entries, without the step for products: ``ties`` of ``ties_svd``."""
        return "linear" if self.combination_type == "svd" else self.combination_type.removesuffix("_svd")

    @property
    def prunes(self) -> bool:
        """Whether entries are left out."""
        return self.rule not in ("linear", "cat")

    def generator(self, key: str) -> torch.Generator:
        """The generator of the random choices at one tensor or module."""
        return torch.Generator().manual_seed(stable_seed(self.seed, "combine", key))

    def merge(
        self, tensors: Sequence[Tensor], weights: Sequence[float], generator: torch.Generator, rule: str | None = None
    ) -> Tensor:
        """Combine tensors of one shape by ``weft.ops.combine.merge`` with these settings; the result has that shape."""
        return merge(
            rule or self.rule,
            tensors,
            weights,
            density=self.density,
            majority_sign=self.majority_sign_method,
            generator=generator,
        )


@torch.no_grad()
def combine(sources: Sequence[Source], how: Combination) -> tuple[MethodConfig, dict[str, Tensor]]:
    """The configuration and the tensors of the new adapter, in the shapes of its file; the old ones do not change.

    Raises:
        UserError: The adapters are of several kinds, do not fit together, or their method cannot do this.
    """
    if not sources:
        raise UserError("there is nothing to combine: name one adapter or more.")
    if how.weights and len(how.weights) != len(sources):
        raise UserError(f"{len(how.weights)} weights for {len(sources)} adapters; give one for each.")
    first = sources[0].config
    other = next((source for source in sources if type(source.config) is not type(first)), None)
    if other is not None:
        raise UserError(
            f"only adapters of one kind can be combined: '{sources[0].name}' is {first.method}, '{other.name}' is "
            f"{other.config.method}. To apply both, stack them."
        )
    if first.methods() == (first,):
        how = _suited(how, first, len(sources))
    return first.combine(sources, how) or combine_like_tensors(sources, how)


def _suited(how: Combination, first: MethodConfig, count: int) -> Combination:
    """The settings for ``count`` adapters of a single method, with a weight for each."""
    if how.combination_type not in type(first).combination_types:
        known = ", ".join(type(first).combination_types)
        reason = f"what works: {known}" if known else "its tensors have no meaning of their own that could be added"
        raise UserError(f"combination_type {how.combination_type} does not work for {first.method}; {reason}.")
    if not how.weights:
        whole = how.combination_type == "cat" and "num_virtual_tokens" in type(first).model_fields
        how = replace(how, weights=(1.0 if whole else 1.0 / count,) * count)
    return how


def combine_like_tensors(sources: Sequence[Source], how: Combination) -> tuple[MethodConfig, dict[str, Tensor]]:
    """Combine tensor by tensor: each name must be in every adapter, with one shape.

    ``cat`` puts virtual tokens one after the other (dimension 0).

    Raises:
        UserError: Names, shapes or settings differ, or the weights do not suit the rule.
    """
    first = sources[0]
    _check_same_settings(sources, but=("num_virtual_tokens",) if how.combination_type == "cat" else ())
    if type(first.config).whole_values and not math.isclose(sum(how.weights), 1.0, abs_tol=1e-6):
        raise UserError(
            f"{first.config.method} keeps whole values, not changes, so they can only be averaged: the weights must "
            f"sum to 1, not {sum(how.weights):g}."
        )
    for source in sources[1:]:
        _check_same_tensors(first, source, cat=how.combination_type == "cat")
    if how.combination_type == "cat":
        return _concatenate(sources, how)
    merged = {
        key: how.merge([source.tensors[key].detach() for source in sources], how.weights, how.generator(key))
        for key in first.tensors
    }
    return first.config, merged


def _concatenate(sources: Sequence[Source], how: Combination) -> tuple[MethodConfig, dict[str, Tensor]]:
    if any(weight != 1 for weight in how.weights):
        raise UserError(
            f"virtual tokens are put one after the other as they are, so every weight must be 1, not "
            f"{list(how.weights)}."
        )
    joined = {key: torch.cat([source.tensors[key].detach() for source in sources]) for key in sources[0].tensors}
    total = sum(source.config.num_virtual_tokens for source in sources)  # type: ignore[attr-defined]
    return sources[0].config.model_copy(update={"num_virtual_tokens": total}), joined


def _check_same_tensors(first: Source, other: Source, *, cat: bool) -> None:
    lonely = sorted(set(first.tensors) ^ set(other.tensors))
    if lonely:
        owner = first.name if lonely[0] in first.tensors else other.name
        raise UserError(
            f"'{first.name}' and '{other.name}' do not tune the same modules: only '{owner}' has '{lonely[0]}'."
        )
    for key, tensor in first.tensors.items():
        mine, theirs = tuple(tensor.shape), tuple(other.tensors[key].shape)
        if mine[cat:] != theirs[cat:]:
            raise UserError(
                f"'{key}' has shape {mine} in '{first.name}' and {theirs} in '{other.name}'; shapes must agree. Do "
                "both adapters belong to the same base?"
            )


def _check_same_settings(sources: Sequence[Source], but: Sequence[str] = ()) -> None:
    first = sources[0]
    for source in sources[1:]:
        for key, value in first.config:
            other = getattr(source.config, key)
            if other != value and key not in but and not _MAY_DIFFER.search(key):
                raise UserError(
                    f"{key} is {value!r} in '{first.name}' and {other!r} in '{source.name}'; it changes what "
                    f"{first.config.method} computes, so adapters that differ in it cannot be combined."
                )
