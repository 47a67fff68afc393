"""Partial fine-tuning (LLaMA-Factory's ``freeze``): ``y = f(x; W + ΔW)`` for the last k blocks, or for parameters
chosen by name; everything else stays frozen. As in full fine-tuning the adapter holds ΔW alone."""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from pydantic import Field

from weft.combine.rules import ON_CHANGES
from weft.core.adapter import BuildContext, MethodConfig
from weft.errors import UserError, nearest
from weft.methods.full import WeightDeltas
from weft.methods.own_weights import parameter_names
from weft.patterns import pattern as regular

_DEFAULT_LAYERS = 2


class FreezeConfig(MethodConfig):
    """The choice of the trained parameters: all that one of these keys names."""

    method: ClassVar[str] = "freeze"
    peft_type: ClassVar[str] = "FREEZE"
    default_learning_rate: ClassVar[float] = 2e-5
    small_learning_rate: ClassVar[float | None] = 3e-4
    combination_types: ClassVar[tuple[str, ...]] = ON_CHANGES
    tasks: ClassVar[frozenset[str]] = frozenset({"causal_lm", "sequence_classification"})

    num_layers_trainable: int | None = Field(
        None, description="k > 0: the last k blocks, k < 0: the first -k, 0: none; default: 2 if nothing else is chosen"
    )
    trainable_modules: list[str] = Field(
        [], description="of these blocks only parameters with such a part in their path (`mlp`, `q_proj`)"
    )
    name_patterns: list[str] = Field(
        [], description="parts of a parameter's path (`lm_head`, `mlp.up_proj`) or regular expressions over all of it"
    )
    train_norms: bool = Field(False, description="all norms too, wherever they are")
    train_embeddings: bool = Field(False, description="the embeddings too")
    train_head: bool = Field(False, description="the head too")

    def build(self, name: str, context: BuildContext) -> WeightDeltas:
        named = _matching(self.name_patterns, parameter_names(context.model), "name_patterns")
        chosen = self._of_blocks(context) | named | self._by_kind(context)
        if not chosen:
            raise UserError(
                "freeze finds nothing to train: num_layers_trainable is 0, and neither name_patterns nor train_norms, "
                "train_embeddings or train_head choose anything."
            )
        return WeightDeltas(self, name, context, chosen)

    def _of_blocks(self, context: BuildContext) -> set[str]:
        blocks = context.architecture.blocks
        other = self.name_patterns or self.train_norms or self.train_embeddings or self.train_head
        count = self.num_layers_trainable
        if count is None:
            count = 0 if other and not self.trainable_modules else min(_DEFAULT_LAYERS, len(blocks))
        if abs(count) > len(blocks):
            raise UserError(
                f"freeze: num_layers_trainable {count}: this model has {len(blocks)} blocks, so -{len(blocks)} to "
                f"{len(blocks)} is possible."
            )
        if not count:
            if self.trainable_modules:
                raise UserError("freeze: trainable_modules choose within blocks, and num_layers_trainable is 0.")
            return set()
        kept = blocks[-count:] if count > 0 else blocks[:-count]
        inside = [n for n in parameter_names(context.model) if n.startswith(tuple(f"{path}." for path in kept))]
        if not self.trainable_modules:
            return set(inside)
        return _matching(self.trainable_modules, inside, "trainable_modules")

    def _by_kind(self, context: BuildContext) -> set[str]:
        shape = context.architecture
        wanted = {
            "train_norms": shape.norms if self.train_norms else (),
            "train_embeddings": (shape.embeddings,) if self.train_embeddings else (),
            "train_head": (shape.head,) if self.train_head else (),
        }
        # A tied head has no parameter of its own: the embedding's is named first.
        own = {id(parameter): name for name, parameter in context.model.named_parameters()}
        found: set[str] = set()
        for key, paths in wanted.items():
            modules = [context.model.get_submodule(path) for path in paths if path]
            here = {own[id(parameter)] for module in modules for parameter in module.parameters()}
            if paths and not here:
                raise UserError(f"freeze: {key} finds nothing in this {shape.model_type} model.")
            found |= here
        return found


def _matching(patterns: Collection[str], names: Collection[str], key: str) -> set[str]:
    found: set[str] = set()
    for pattern in patterns:
        wanted = regular(pattern, f"freeze: {key}:")
        here = {n for n in names if f".{pattern}." in f".{n}." or wanted.full(n)}
        if not here:
            parts = sorted({part for name in names for part in name.split(".") if not part.isdecimal()})
            raise UserError(
                f"freeze: {key}: {pattern!r} matches no parameter.{nearest(pattern, parts)} "
                f"Parts of their names: {', '.join(parts)}."
            )
        found |= here
    return found
