"""``Adapters`` as a user has them: what ``weft.core`` runs, with files, merging and combining."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Self

import torch
from torch import Tensor, nn

from weft.base.checkpointing import Checkpointing
from weft.base.checkpointing import checkpointing as checkpointed
from weft.base.offload import Place
from weft.base.streaming import streamed
from weft.combine.rules import Combination, Source, combine
from weft.core import adapters as core
from weft.core.adapter import Adapter, MethodConfig
from weft.core.architecture import Architecture
from weft.core.head import TokenHead
from weft.core.layout import Counts
from weft.core.stream import Stream
from weft.errors import UserError
from weft.files.adapter_folder import add_with_tensors, load_adapter, save_adapter
from weft.layouts.choice import layout_for
from weft.merge.weights import MergedWeights, merge_adapter
from weft.methods.combined import Combined, CombinedConfig
from weft.methods.weighted import WeightedSum
from weft.models.added import check_added, check_config
from weft.models.offload import Offload
from weft.models.products import install_products
from weft.ops.combine import MajoritySign


class Adapters(core.Adapters):
    """Many adapters, of any methods, over one base model: added, loaded, run, combined, merged and saved.

    The model is not wrapped: its modules, keys and parameters stay in place, frozen and in evaluation mode while
    ``Adapters`` is open. ``close()``, or the end of a ``with``, gives back exactly the model that came in.
    ``weft.core.adapters.Adapters`` says how batches run.

    Args:
        model: A transformers model.
        architecture: The places of its parts (``weft.models.describe``).
        padded: Run padded batches through the model's own attention. Default: only if the model can do nothing else.
        exact: Compute one matrix product per adapter, so that no bit of its numbers depends on its neighbours.
        checkpointing: Recompute blocks in the backward pass instead of keeping their activations: all (True), every
            k-th (a number k), or their cheap operations alone (``cheap``: results of matrix products are kept).
        offload: Where that which is still kept goes: ``cpu`` (from a GPU) or ``disk``. None: it stays.
        offload_folder: The folder for ``disk``; default: that of temporary files.
        offload_param: ``disk``: weights that lie in mapped files are in memory only while a pass goes through their
            block (``load_base(..., offload_param="disk")`` gives such a base).
        original_weight: Of a quantised base, the weight [out, in] before, by the module's path (LoftQ asks for it).
    """

    def __init__(
        self,
        model: nn.Module,
        architecture: Architecture,
        *,
        padded: bool | None = None,
        exact: bool = False,
        checkpointing: Checkpointing = False,
        offload: Place | None = None,
        offload_folder: str | None = None,
        original_weight: Callable[[str], Tensor] | None = None,
        offload_param: Offload | None = None,
    ) -> None:
        super().__init__(
            model,
            architecture,
            layout_for(architecture, padded, exact),
            exact=exact,
            # The last stands outermost: a recomputation in the backward pass is inside the visit of its block.
            installers=(
                install_products,
                checkpointed(architecture.blocks, checkpointing, offload, offload_folder),
                *((streamed(architecture.blocks),) if offload_param else ()),
            ),
            original_weight=original_weight,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    _latest: tuple[weakref.ref[Tensor], Stream] | None = None

    def _check_new(self, name: str, config: MethodConfig | None = None) -> None:
        super()._check_new(name)
        if config is not None:
            check_config(self, config)

    def _check(self, adapter: Adapter, *, fresh: bool) -> None:
        check_added(self, adapter, fresh=fresh)

    def forward(self, stream: Stream) -> Tensor:
        """Last hidden states [N, d] of the stream, before the head."""
        hidden = super().forward(stream)
        self._latest = weakref.ref(hidden), stream
        return hidden

    def logits(self, hidden: Tensor, rows: Counts | Stream = ()) -> Tensor:
        """The head's logits [n, vocabulary] for hidden states [n, d].

        ``rows`` says whose they are: the stream that all of them come from, or (adapter, number of rows) in order.
        It may be left out for what ``forward`` has just given, and as long as no adapter changes the head.

        Raises:
            UserError: It is left out, and one does.
        """
        if self._latest is not None and not rows and self._latest[0]() is hidden:
            rows = self._latest[1]
        if isinstance(rows, Stream):
            rows = [(segment.adapter, segment.tokens) for segment in rows.route.segments]
        elif not rows and (changed := [name for name in self.names if self.changes_head(name)]):
            raise UserError(
                f"adapter '{changed[0]}' changes the head, so its logits depend on whose rows these are: give the "
                "stream too, logits(hidden, stream), or [(adapter, number of rows), ...]."
            )
        return super().logits(hidden, rows)

    def stack(self, name: str, names: Sequence[str]) -> Adapter:
        """Let several adapters act on the same rows, in this order, under a new name; nothing is copied.

        They stay what they are and can be used by themselves; training the stack trains them.

        Raises:
            UserError: A name is missing, taken or given twice, or two of them have classification heads.
        """
        self._check_new(name)
        parts = [self[part] for part in names]
        if len(set(names)) < max(len(names), 1):
            raise UserError(f"a stack needs adapters to apply, each once, not {list(names)}.")
        heads = [part.head for part in parts if part.head.labels]
        if len(heads) > 1:
            raise UserError(f"{', '.join(names)}: more than one of them has a classification head of its own.")
        adapter = Combined(CombinedConfig(parts=tuple(part.config for part in parts)), name, parts)
        adapter.set_up(self.architecture.hidden_size, heads[0] if heads else TokenHead())
        return self._attach(name, adapter)

    def weighted_sum(self, name: str, names: Sequence[str], weights: Sequence[float]) -> Adapter:
        """The weighted sum of several adapters' changes of the base's weights, under a new name; nothing is copied.

        It can be run and merged. Unlike in a stack, no adapter sees what the others do.

        Raises:
            UserError: A name is missing, taken or given twice, or an adapter does what no sum of weights can be.
        """
        self._check_new(name)
        if len(set(names)) < max(len(names), 1) or len(weights) != len(names):
            raise UserError(f"a weighted sum needs adapters, each once with a weight: {list(names)} {list(weights)}.")
        if not all(math.isfinite(weight) for weight in weights):
            raise UserError(f"weights {list(weights)}: every weight must be a finite number.")
        adapter = WeightedSum(name, [self[part] for part in names], weights, self.model)
        adapter.set_up(self.architecture.hidden_size, TokenHead())
        return self._attach(name, adapter)

    def save(self, name: str, folder: str | Path, *, base_name: str = "") -> None:
        """Write the adapter in PEFT's layout.

        ``base_name`` is what its config calls the base model; default: the folder or hub id that it was loaded from.

        Raises:
            UserError: There is none of that name, or a tensor is not finite.
        """
        known = str(getattr(self.model.config, "name_or_path", ""))
        save_adapter(self, name, Path(folder), base_name=base_name or known)

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
