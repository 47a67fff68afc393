"""Trainable tokens: single rows of the token embeddings (and of the output layer) are trained, the others stay.

New tokens need it: ``add_tokens`` gives the base rows for them, and the adapter holds what it learns. PEFT's files hold
the rows whole. A head that is tied to the embeddings follows them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.base.embeddings import input_embeddings, output_head
from weft.combine.rules import Combination, Source
from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.route import Segment
from weft.errors import UserError, nearest
from weft.methods.combined import CombinedConfig
from weft.methods.full import FullConfig
from weft.methods.mergeable import MergedModule
from weft.methods.own_weights import weight_parts
from weft.methods.site_adapter import SiteAdapter


class TrainableTokensConfig(MethodConfig):
    """The choice of the trained rows."""

    method: ClassVar[str] = "trainable_tokens"
    peft_type: ClassVar[str] = "TRAINABLE_TOKENS"
    default_learning_rate: ClassVar[float] = 1e-3
    small_learning_rate: ClassVar[float | None] = 1e-1
    whole_values: ClassVar[bool] = True
    # How the rows began.
    harmless_keys: ClassVar[frozenset[str]] = frozenset({"init_weights"})

    token_indices: list[int] = Field([], description="ids of the tokens; default: those of `add_tokens`")
    target_modules: str | list[str] | None = Field(
        None, description="last parts of paths: the token embeddings, the head; default: the embeddings"
    )

    def build(self, name: str, context: BuildContext) -> Adapter:
        if not self.token_indices:
            raise UserError("trainable_tokens: token_indices names no token; say which, or give the run add_tokens.")
        named = [self.target_modules] if isinstance(self.target_modules, str) else self.target_modules or [""]
        return SiteAdapter(self, name, token_rows("token_indices", dict.fromkeys(named, self.token_indices), context))

    def combine(self, sources: Sequence[Source], how: Combination) -> tuple[MethodConfig, dict[str, Tensor]] | None:
        if any(source.config != self for source in sources):
            raise UserError("the adapters train different tokens, and there is no rule to combine these.")
        return super().combine(sources, how)


class TokenRows(nn.Module):
    """Rows [n, d] of the token embeddings E, or of the output layer, in the place of the base's; at first the base's.

    One object sits on a table and on all that is tied to it.
    """

    stored_whole = True
    # Changes that other methods make here come after, as in a merge.
    replaces_output = True
    # In peft's files, where the rows belong to a method with parameters of its own.
    wrapper = "token_adapter."
    base: nn.Module
    ids: Tensor

    def __init__(self, module: nn.Module, ids: Sequence[int], context: BuildContext) -> None:
        super().__init__()
        self.__dict__["base"] = module
        self.register_buffer("ids", torch.tensor(ids, device=context.device), persistent=False)
        rows = context.zeros(len(ids), module.get_parameter("weight").shape[1])
        self.trainable_tokens_delta = nn.Parameter(rows if context.blank else self._rows_of_base().to(rows))

    def _rows_of_base(self) -> Tensor:
        return self.base.get_parameter("weight").detach()[self.ids]

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """y [..., d] of the ids x [...] with the own rows; or the logits y [..., V] of the hidden states x [..., d]."""
        rows = self.trainable_tokens_delta
        if x.is_floating_point():
            change = x.to(rows.dtype) @ (rows - self._rows_of_base().to(rows)).t()
            return y.index_add(-1, self.ids, change.to(y.dtype))
        hit = x[..., None] == self.ids
        scale = getattr(self.base, "embed_scale", None)
        own = (hit.to(rows.dtype) @ rows).to(y.dtype)  # exact: one 1 in a row
        own = own if scale is None else own * torch.as_tensor(scale).to(own)
        return torch.where(hit.any(-1, keepdim=True), own, y)

    def replaces(self, weight: Tensor) -> bool:
        """Whether the rows take the place of those of ``weight`` [V, d]."""
        return self.base.get_parameter("weight") is weight

    def merge_into(self, merged: MergedModule) -> None:
        """E with the own rows."""
        merged.put(merged.weight.index_copy(0, self.ids, merged.cast(self.trainable_tokens_delta)), merged.bias)


def token_rows(key: str, wanted: Mapping[str, Sequence[int]], context: BuildContext) -> dict[str, TokenRows]:
    """Own rows, by path, for the tokens of each module that ``wanted`` names by the end of its path ("": embeddings).

    Raises:
        UserError: The setting ``key`` names another module, or a token that has no row there.
    """
    places = _tables(context.model)
    table = input_embeddings(context.model)
    shared: dict[int, TokenRows] = {}
    for name, ids in wanted.items():
        paths = [path for path, m in places.items() if (path.endswith(name) if name else m is table)]
        if not paths:
            raise UserError(
                f"{key}: {name!r} is neither the token embeddings nor the head of this model.{nearest(name, places)} "
                f"There are: {', '.join(places)}."
            )
        for path in paths:
            weight = places[path].get_parameter("weight")
            if id(weight) not in shared:
                weight_parts(places[path], path)
                _check_ids(f"{key} ({path})", ids, len(weight))
                shared[id(weight)] = TokenRows(places[path], ids, context)
            elif shared[id(weight)].ids.tolist() != list(ids):
                raise UserError(f"{key}: '{path}' is tied to the embeddings, so both must train the same tokens.")
    # An encoder-decoder's stacks have tables too, but ask the shared one.
    by_path = {path: shared.get(id(module.get_parameter("weight"))) for path, module in places.items()}
    return {path: rows for path, rows in by_path.items() if rows and path not in context.architecture.unreachable}


def _check_ids(key: str, ids: Sequence[int], rows: int) -> None:
    if len(set(ids)) < len(ids):
        raise UserError(f"{key} names a token twice.")
    if wrong := next((i for i in ids if not 0 <= i < rows), None):
        raise UserError(
            f"{key}: token {wrong} has no row; there are {rows}. To train new tokens, name them in add_tokens, which "
            "makes rows for them. An adapter of a base that was resized (resize_token_embeddings) needs that base: "
            "save it with save_pretrained, and name its folder (--model; in Python model=)."
        )


def with_token_rows(config: MethodConfig, ids: Sequence[int], model: nn.Module) -> MethodConfig:
    """The settings of a method that also trains the rows of the tokens ``ids``: by itself, or as a part beside it."""
    parts = list(config.methods())
    if not ids or any(isinstance(part, FullConfig) for part in parts):
        return config  # full fine-tuning trains every row
    takes = [i for i, part in enumerate(parts) if isinstance(part, TrainableTokensConfig)]
    takes += [i for i, part in enumerate(parts) if "trainable_token_indices" in type(part).model_fields]
    if not takes:
        takes = [len(parts)]
        parts.append(TrainableTokensConfig())
    tables: dict[int, list[str]] = {}
    for path, module in _tables(model).items():
        tables.setdefault(id(module.weight), []).append(path)
    parts[takes[0]] = _with_rows(parts[takes[0]], ids, list(tables.values()))
    return parts[0] if len(parts) == 1 else CombinedConfig(parts=tuple(parts))


def _with_rows(config: Any, ids: Sequence[int], tables: Sequence[Sequence[str]]) -> MethodConfig:
    """The settings with ``ids`` beside the tokens that they name. ``tables`` are the paths that share a tensor."""
    if isinstance(config, TrainableTokensConfig):
        every = list(dict.fromkeys([*config.token_indices, *ids]))
        return config.model_copy(update={"token_indices": every, "target_modules": [paths[0] for paths in tables]})
    given, whole = config.trainable_token_indices or {}, tuple(config.modules_to_save or ())
    given = given if isinstance(given, dict) else {tables[0][0]: given}
    rows = {}
    for paths in tables:
        before = [i for name, own in given.items() if any(path.endswith(name) for path in paths) for i in own]
        if before or not any(path.endswith(whole) for path in paths):
            rows[paths[0]] = list(dict.fromkeys([*before, *ids]))
    return config.model_copy(update={"trainable_token_indices": rows or None})


def _tables(model: nn.Module) -> dict[str, nn.Embedding | nn.Linear]:
    """The token embeddings and the head, if there is one, by path."""
    paths = {id(module): path for path, module in model.named_modules()}
    return {paths[id(module)]: module for module in (input_embeddings(model), output_head(model)) if module is not None}
