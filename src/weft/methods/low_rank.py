"""The common part of LoRA and AdaLoRA: their modules, and the weights of the base that they may train beside them."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from typing import ClassVar, Literal

from pydantic import Field, field_validator, model_validator
from torch import nn

from weft.base.kinds import is_linear, linear_shape
from weft.core.adapter import BuildContext, MethodConfig
from weft.core.architecture import Architecture
from weft.core.site import plain_class
from weft.errors import UserError
from weft.foreign import expect
from weft.methods.own_weights import saved_biases, saved_modules
from weft.methods.site_adapter import SavesModules, SiteAdapter
from weft.methods.trainable_tokens import token_rows
from weft.patterns import last_parts, named, pattern


class LowRankConfig(SavesModules):
    """Settings with PEFT's names and meanings. Unlike PEFT's, the default targets are all linears of the blocks."""

    # These say how the base stores its weights, or how the adapter began: they do not change its results now.
    harmless_keys: ClassVar[frozenset[str]] = frozenset(
        {"fan_in_fan_out", "megatron_core", "qalora_group_size", "exclude_modules"}
    )
    # Fields that PEFT's configuration does not have.
    own_fields: ClassVar[frozenset[str]] = frozenset()
    not_in_peft: ClassVar[frozenset[str]] = frozenset({"target_modules", "layers_to_transform", "layers_pattern"})
    peft_defaults: ClassVar[Mapping[str, object]] = {"lora_alpha": 8}
    takes_embeddings: ClassVar[bool] = False

    target_modules: str | list[str] = Field(
        "all-linear", description="last parts of paths, an expression over whole paths, or all linears of the blocks"
    )
    lora_alpha: float = Field(16, gt=0, description="the change is scaled by this over its rank")
    lora_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout on what goes into A")
    layers_to_transform: list[int] | None = Field(
        None, description="numbers of the blocks that are adapted; default: all"
    )
    layers_pattern: str | list[str] | None = Field(
        None, description="name of the list of blocks in the modules' paths, if it is not a usual one"
    )
    bias: Literal["none", "all", "lora_only"] = Field("none", description="which biases are trained too")
    trainable_token_indices: list[int] | dict[str, list[int]] | None = Field(
        None,
        description="ids of tokens whose rows of the embeddings are trained too; or `{end of a path: ids}`, for the "
        "head as well; `add_tokens` sets it",
    )

    @field_validator("layers_to_transform", mode="before")
    @classmethod
    def _one_layer(cls, value: object) -> object:
        return [value] if isinstance(value, int) and not isinstance(value, bool) else value

    @model_validator(mode="after")
    def _pattern_of_layers(self) -> LowRankConfig:
        if self.layers_pattern and self.layers_to_transform is None:
            raise ValueError("layers_pattern says where layers_to_transform are; give layers_to_transform too")
        return self

    def targets(self, architecture: Architecture) -> list[str]:
        """Paths of the modules to tune: linears of the blocks, and the head or the token embeddings where named.

        ``all-linear`` leaves out linears with one output, where a low rank saves nothing, and those no file can name.

        Raises:
            UserError: A module is named that no file can name.
        """
        found = self._matched(architecture)
        names = [] if isinstance(self.target_modules, str) else self.target_modules
        left_out = next((name for name in names if not any(named(path, [name]) for path in found)), None)
        if left_out is not None:
            raise UserError(
                f"target_modules: '{left_out}' is in none of the layers that layers_to_transform "
                f"({self.layers_to_transform}) keeps, so it would not be tuned. Leave one of the two out; modules "
                "outside the blocks have no layer."
            )
        nameless = {path for path, other in architecture.file_paths.items() if other is None}
        nameless = nameless if self.peft_type == "LORA" else set()
        if self.target_modules == "all-linear":
            kept = [path for path in found if path not in nameless]
            return [path for path in kept if path not in architecture.single_outputs] or kept
        lost = next((path for path in found if path in nameless), None)
        if lost is not None:
            raise UserError(
                f"no LoRA file can name module '{lost}' of this {architecture.model_type} model: peft sends the names "
                "in it through transformers' list of renamed tensors, and would lose these in silence. Leave it out "
                "of target_modules."
            )
        return found

    def _matched(self, architecture: Architecture) -> list[str]:
        more = [architecture.head, *([architecture.embeddings] if self.takes_embeddings else [])]
        outside = [path for path in more if path and path not in architecture.linears]
        if not self.layers_pattern:
            return architecture.match(self.target_modules, self.layers_to_transform, outside)
        patterns = [self.layers_pattern] if isinstance(self.layers_pattern, str) else self.layers_pattern
        wanted = {str(layer) for layer in self.layers_to_transform or ()}
        found = []
        for path in architecture.match(self.target_modules, None, outside):
            numbers = (pattern(rf"(?:^|.*?\.){p}\.(\d+)\.", "layers_pattern").begins(path) for p in patterns)
            if next((found_in[1] for found_in in numbers if found_in), None) in wanted:
                found.append(path)
        if not found:
            raise UserError(
                f"layers_pattern {self.layers_pattern!r} with layers_to_transform {self.layers_to_transform} matches "
                f"no module; blocks are named like {architecture.blocks[0]}."
            )
        return found

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        entries = self.model_dump(mode="json", exclude=set(self.own_fields))
        if isinstance(self.target_modules, str) or self.layers_to_transform is not None:
            # PEFT applies an expression to every module (a norm would be an error), refuses layers beside one, and has
            # other ideas of what all-linear is (a pooler, on some bases experts and routers).
            entries["target_modules"] = architecture.naming(self.targets(architecture))
            entries["layers_to_transform"] = entries["layers_pattern"] = None
        return {**entries, "fan_in_fan_out": architecture.model_type == "gpt2"}

    @classmethod
    def from_peft(cls, entries: dict[str, object], keys: list[str]) -> MethodConfig:
        cls._check_foreign(entries)
        entries = {**entries, "target_modules": cls.tuned_modules(entries, keys)}
        entries["layers_to_transform"] = entries["layers_pattern"] = None
        return super().from_peft(entries, keys)

    @classmethod
    def tuned_modules(cls, entries: dict[str, object], keys: list[str]) -> list[str]:
        """The tuned modules by the file's keys; its target_modules may be a default that we would have to guess."""
        paths = (key.removeprefix(SiteAdapter.prefix) for key in keys if ".lora_" in key)
        return sorted({re.sub(r"\.lora_\w+(\.\w+)?$", "", path) for path in paths})

    @classmethod
    def _check_foreign(cls, entries: Mapping[str, object]) -> None:
        """Check the types of a foreign file's targets, although the tensors' names tell them."""
        for key, kind in (("target_modules", str), ("layers_pattern", str), ("layers_to_transform", int)):
            value, where = entries.get(key), f"adapter_config.json: {key}"
            for one in value if isinstance(value, list) else [] if value is None else [value]:
                expect(one, kind, where)
            if isinstance(value, str) and value != "all-linear":
                pattern(value, where)


def find_targets(
    config: LowRankConfig, context: BuildContext, more: Sequence[str] = (), *, optional: bool = False
) -> tuple[dict[str, nn.Module], dict[str, nn.Module]]:
    """The modules to tune and the weights that are trained whole beside them, by path.

    ``more`` are linears that another key names. With ``optional`` an empty target_modules is no error.

    Raises:
        UserError: A target is not there, or of a kind that cannot be tuned.
    """
    shape, names = context.architecture, config.target_modules
    for name in [] if isinstance(names, str) else names:
        _refuse_other_kinds(name, config, context)
    own: dict[str, nn.Module] = dict(saved_modules(config.modules_to_save, context))
    # As in peft, a module that is trained whole gets no update.
    targets = [] if names == [] and (more or optional) else config.targets(shape)
    rows = _rows_beside(config, context, {*targets, *own})
    paths = [path for path in dict.fromkeys((*targets, *more)) if path not in own]
    if not paths and not (optional and not targets):
        raise UserError(
            f"target_modules {names!r}: every module it names is in modules_to_save {config.modules_to_save} as well, "
            "so nothing is left to tune."
        )
    own |= saved_biases(config.bias, context, set(paths), set(own)) | rows
    return {path: context.model.get_submodule(path) for path in paths}, own


def _rows_beside(config: LowRankConfig, context: BuildContext, others: Collection[str]) -> dict[str, nn.Module]:
    """The rows of tokens that are trained beside the modules ``others``, by path."""
    given, key = config.trainable_token_indices, "trainable_token_indices"
    rows = token_rows(key, given if isinstance(given, dict) else {"": given}, context) if given else {}
    if both := rows.keys() & set(others):
        raise UserError(
            f"{key} (which add_tokens sets) trains rows of '{min(both)}', which target_modules or modules_to_save "
            "trains as well. Leave it out of one of them."
        )
    return dict(rows)


def _refuse_other_kinds(name: str, config: LowRankConfig, context: BuildContext) -> None:
    """Refuse a name that matches modules of other kinds only. (``Architecture.match`` refuses one without a match.)"""
    shape = context.architecture
    found = {p: m for p, m in context.model.named_modules() if p and named(p, [name])}
    could = {*shape.linears, shape.head, *([shape.embeddings] if config.takes_embeddings else [])}
    if found and not could & set(found):
        for path in found:
            shape.check_reachable(path)
        path, module = next(iter(found.items()))
        names = sorted(last_parts(could) - {""})
        raise UserError(
            f"target_modules {name!r} matches no linear module: '{path}' is of the kind "
            f"{plain_class(module).__name__}, on which {config.method} cannot be. "
            f"What can match: {', '.join(names)} (or 'all-linear')."
        )


def check_rank(key: str, rank: int, path: str, module: nn.Module, context: BuildContext) -> int:
    """The rank, if the module is large enough for it. A loaded file may have any rank.

    Raises:
        UserError: It is not.
    """
    if isinstance(module, nn.Embedding):
        largest = min(module.num_embeddings, module.embedding_dim)
    else:
        assert is_linear(module)
        largest = min(linear_shape(module))
    if not 1 <= rank <= largest and not context.loading:
        raise UserError(f"{key} is {rank}, but at module '{path}' it can be 1 to {largest}, the module's smaller side.")
    return rank
