"""The combination of LoRA adapters into a new one, by the rules of peft's ``add_weighted_adapter``.

The change of a module is s B A, with the scaling s = alpha / r (or alpha / sqrt(r)). Concatenation and SVD work on that
product: they are exact, or the nearest of their rank. The other rules work on A and on B separately, each weighted by
sqrt(|w s|) (the sign goes to A). They do not give the sum of products: mixed terms come in. The new adapter has scaling
1 and, where modules differ in rank, rows of zeros.
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol, cast

import torch
from torch import Tensor

from weft.combine.rules import Combination, Source
from weft.core.adapter import MethodConfig
from weft.errors import UserError
from weft.ops.combine import truncated_svd, truncated_svd_of_product

_FACTOR = re.compile(
    r"(?P<head>(?:base_model\.model\.)?(?P<path>.+)\.lora_(?:embedding_)?)(?P<side>[AB])(?P<tail>\.weight)?"
)


class _Scaling(Protocol):
    """LoRA's configuration, as far as it is asked here."""

    def scaling(self, path: str) -> float: ...


_ROWS = ".trainable_tokens_delta"


@dataclass(frozen=True)
class _Factors:
    """A [r, in] and B [out, r] of one module in one adapter; its change is ``scaling * b @ a``."""

    adapter: str
    a: Tensor
    b: Tensor
    _: KW_ONLY
    scaling: float
    weight: float


def combine_lora(sources: Sequence[Source], how: Combination) -> tuple[MethodConfig, dict[str, Tensor]]:
    """The new adapter's configuration and its A [r, in] and B [out, r]; a module may be tuned by some adapters only.

    Raises:
        UserError: An adapter holds more than A and B, or the rule needs equal ranks and they differ.
    """
    for source in sources:
        if named := getattr(source.config, "target_parameters", None):
            raise UserError(
                f"'{source.name}' adapts parameters ({', '.join(named[:3])}), each with a pair of A and B per "
                "expert; there is no rule to combine these. Stack the adapters, or merge one into the base."
            )
    modules: dict[tuple[str, str], list[_Factors]] = {}
    for source, weight in zip(sources, how.weights, strict=True):
        for names, path, a, b in _factors(source):
            scaling = cast(_Scaling, source.config).scaling(path)
            modules.setdefault(names, []).append(_Factors(source.name, a, b, scaling=scaling, weight=weight))
    # peft's rule: every rule only weights a single adapter.
    kind = "linear" if len(sources) == 1 else how.combination_type
    svd_rank = how.svd_rank or max(len(part.a) for parts in modules.values() for part in parts)
    merged = {names: _module(names[0], parts, kind, how, svd_rank) for names, parts in modules.items()}
    rank = max(a.shape[0] for a, _ in merged.values())
    tensors = {}
    for (a_name, b_name), (a, b) in merged.items():
        tensors[a_name] = torch.nn.functional.pad(a, (0, 0, 0, rank - a.shape[0]))
        tensors[b_name] = torch.nn.functional.pad(b, (0, rank - b.shape[1]))
    update = {
        "r": rank,
        "lora_alpha": float(rank),
        "use_rslora": False,
        "init_lora_weights": True,
        "target_modules": sorted({_parsed(a_name)["path"] for a_name, _ in merged}),
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": {},
        "alpha_pattern": {},
    }
    tensors |= _rows(sources, how)
    config = sources[0].config
    return config.model_copy(update={k: v for k, v in update.items() if k in type(config).model_fields}), tensors


def _rows(sources: Sequence[Source], how: Combination) -> dict[str, Tensor]:
    """The rows [n, d] of trained tokens: values and not changes, so they are averaged, whatever the rule."""
    first = sources[0]
    kept = [{key: t.detach() for key, t in one.tensors.items() if key.endswith(_ROWS)} for one in sources]
    for source, rows in zip(sources, kept, strict=True):
        mine, theirs = (getattr(one.config, "trainable_token_indices", None) for one in (first, source))
        if rows.keys() != kept[0].keys() or mine != theirs:
            raise UserError(
                f"'{first.name}' trains the rows of the tokens {mine}, '{source.name}' of {theirs} "
                "(trainable_token_indices, add_tokens); only rows of the same tokens can be combined."
            )
    if kept[0] and not math.isclose(sum(how.weights), 1.0, abs_tol=1e-6):
        raise UserError(
            f"the adapters hold rows of tokens whole, so these can only be averaged: the weights must sum to 1, not "
            f"{sum(how.weights):g}."
        )
    weighted = list(zip(how.weights, kept, strict=True))
    return {key: torch.stack([weight * rows[key] for weight, rows in weighted]).sum(0) for key in kept[0]}


def _parsed(key: str) -> re.Match[str]:
    found = _FACTOR.fullmatch(key)
    assert found is not None
    return found


def _factors(source: Source) -> list[tuple[tuple[str, str], str, Tensor, Tensor]]:
    """(names of A and B in the file, path of the module, A, B)."""
    found = []
    for key, tensor in source.tensors.items():
        parts = _FACTOR.fullmatch(key)
        if key.endswith(_ROWS):
            continue
        if parts is None:
            raise UserError(
                f"'{source.name}' holds '{key}' beside LoRA's A and B (DoRA, a trained bias, modules_to_save); there "
                "is no rule to combine that. Stack the adapters, or train without it."
            )
        if parts["side"] == "B":
            continue
        b_key = f"{parts['head']}B{parts['tail'] or ''}"
        found.append(((key, b_key), parts["path"], tensor.detach(), source.tensors[b_key].detach()))
    return found


def _module(key: str, parts: Sequence[_Factors], kind: str, how: Combination, svd_rank: int) -> tuple[Tensor, Tensor]:
    """A and B of one module in the new adapter, with scaling 1."""
    _check_one_base(key, parts)
    if kind in ("cat", "svd"):
        a = torch.cat([part.weight * part.scaling * part.a for part in parts])
        b = torch.cat([part.b for part in parts], dim=1)
        if kind == "svd":
            b, a = truncated_svd_of_product(b, a, svd_rank)
        return a, b
    generator = how.generator(_parsed(key)["path"])
    if kind.endswith("_svd"):
        changes = [part.scaling * part.b @ part.a for part in parts]
        b, a = truncated_svd(how.merge(changes, [part.weight for part in parts], generator), svd_rank)
        return a, b
    first = parts[0]
    other = next((part for part in parts if len(part.a) != len(first.a)), None)
    if other is not None:
        raise UserError(
            f"combination_type {kind} adds A to A and B to B, so ranks must be equal: at '{key}' '{first.adapter}' has "
            f"{len(first.a)} and '{other.adapter}' {len(other.a)}. Take svd or cat."
        )
    weights = [part.weight * part.scaling for part in parts]
    sizes = [math.sqrt(abs(weight)) for weight in weights]
    signed = [math.copysign(size, weight) for size, weight in zip(sizes, weights, strict=True)]
    rule = "linear" if kind == "linear" else how.rule
    a = how.merge([part.a for part in parts], signed, generator, rule)
    return a, how.merge([part.b for part in parts], sizes, generator, rule)


def _check_one_base(key: str, parts: Sequence[_Factors]) -> None:
    first = parts[0]
    for part in parts[1:]:
        mine, theirs = ((len(p.b), p.a.shape[1]) for p in (first, part))
        if mine != theirs:
            raise UserError(
                f"'{key}' belongs to a module of {list(mine)} in '{first.adapter}' and of {list(theirs)} in "
                f"'{part.adapter}': the adapters were made for different bases."
            )
