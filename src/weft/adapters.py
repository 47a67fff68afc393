"""``Adapters`` as a user has them: what ``weft.core`` runs, with files, merging and combining."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from weft.combine.rules import Combination, Source, combine
from weft.core import adapters as core
from weft.core.adapter import Adapter
from weft.errors import UserError
from weft.files.adapter_folder import add_with_tensors, load_adapter, save_adapter
from weft.merge.weights import MergedWeights, merge_adapter
from weft.ops.combine import MajoritySign


class Adapters(core.Adapters):
    """Many adapters, of any methods, over one base model: added, loaded, run, combined, merged and saved.

    See ``weft.core.adapters.Adapters`` for how it is made and how batches run.
    """

    def save(self, name: str, folder: str | Path, *, base_name: str = "") -> None:
        """Write the adapter in PEFT's layout; ``base_name`` is what its config calls the base model.

        Raises:
            UserError: There is none of that name, or a tensor is not finite.
        """
        save_adapter(self, name, Path(folder), base_name=base_name)

    def load(self, name: str, folder: str | Path, *, tokenizer: Any = None) -> Adapter:
        """Add an adapter from a folder in PEFT's layout, ours or peft's.

        Raises:
            UserError: A file is missing, broken, or made for another base; nothing is added then.
        """
        return load_adapter(self, name, Path(folder), tokenizer=tokenizer)

    def merge(self, name: str, dtype: torch.dtype | None = None) -> MergedWeights:
        """The weights of a model that computes by itself what the base computes with adapter ``name``.

        Raises:
            UserError: What the adapter, or a part of it, computes cannot be weights of the base.
        """
        return merge_adapter(self, name, dtype)

    def combine(
        self,
        name: str,
        names: Sequence[str],
        weights: Sequence[float] | None = None,
        *,
        combination_type: str = "linear",
        density: float | None = None,
        majority_sign_method: MajoritySign = "total",
        svd_rank: int | None = None,
        seed: int = 0,
    ) -> Adapter:
        """A new adapter ``name`` made of trained ones of one kind; PEFT's ``add_weighted_adapter`` and its names.

        ``weights``: one per adapter; default: the same share for each (1 where virtual tokens are put together).
        What each setting means, and which rule works for which method: ``weft.combine.rules``, docs/cli.md.

        Raises:
            UserError: The adapters do not fit together, or their method has no such rule.
        """
        headed = [part for part in names if self[part].head.labels]
        if headed:
            raise UserError(f"'{headed[0]}' has a classification head; heads trained apart cannot be made one.")
        given = tuple(float(weight) for weight in weights or ())
        how = Combination(
            given, combination_type, density, majority_sign_method=majority_sign_method, svd_rank=svd_rank, seed=seed
        )
        sources = [Source(part, self[part].config, self[part].tensors()) for part in names]
        return add_with_tensors(self, name, *combine(sources, how))
