"""Where bottleneck adapters sit: the sub-layers of each architecture, and the modules around them."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Protocol

from weft.core.adapter import BuildContext
from weft.core.architecture import Architecture
from weft.errors import UserError


class _Settings(Protocol):
    """The configuration of a bottleneck adapter, as far as it is asked here."""

    @property
    def mh_adapter(self) -> bool: ...

    @property
    def output_adapter(self) -> bool: ...

    @property
    def is_parallel(self) -> bool: ...

    @property
    def original_ln_before(self) -> bool: ...

    @property
    def original_ln_after(self) -> bool: ...

    @property
    def residual_before_ln(self) -> bool | str: ...

    @property
    def leave_out(self) -> Sequence[int]: ...

    @property
    def factors(self) -> Mapping[str, float]: ...


@dataclass(frozen=True)
class Surroundings:
    """The modules of a block around its sub-layers, in pairs for attention and MLP.

    They are the modules whose input is the residual stream before the sub-layer ("": there is none, because the
    sub-layers run side by side), the norms after the addition, and AdapterHub's name for the holder of its adapters.
    """

    reads: tuple[str, str]
    norms: tuple[str, str] | None = None
    holders: tuple[str, str] = ("attention_adapters", "output_adapters")


_PRE = Surroundings(("input_layernorm", "post_attention_layernorm"))
_BERT_NORMS = ("attention.output.LayerNorm", "output.LayerNorm")
_BERT = Surroundings(("attention.self.query", "intermediate.dense"), _BERT_NORMS, ("attention.output", "output"))
_AROUND: dict[str, Surroundings] = {
    **dict.fromkeys(("llama", "mistral", "qwen2", "qwen3", "gemma", "phi3", "starcoder2", "stablelm"), _PRE),
    **dict.fromkeys(("bloom", "falcon", "gpt_neox"), _PRE),
    "gpt2": Surroundings(("ln_1", "ln_2")),
    "opt": Surroundings(("self_attn_layer_norm", "final_layer_norm")),
    "phi": Surroundings(("input_layernorm", "")),
    **dict.fromkeys(("bert", "roberta", "xlm-roberta", "camembert", "electra"), _BERT),
    "distilbert": Surroundings(("attention.q_lin", "ffn.lin1"), ("sa_layer_norm", "output_layer_norm")),
}


@dataclass(frozen=True)
class Place:
    """The place of one bottleneck: after sub-layer ``kind`` (0: attention, 1: MLP) of block ``layer``, on ``path``.

    ``path`` is a linear. ``read`` and ``norm`` are needed only if the configuration asks for the residual stream.
    """

    layer: int
    kind: int
    path: str
    _: KW_ONLY
    read: str | None = None
    norm: str | None = None


def holders(shape: Architecture, places: Collection[Place]) -> list[str]:
    """The modules that hold the bottlenecks in AdapterHub's files; every sub-layer of T5 is one."""
    names = _AROUND.get(shape.model_type, _PRE).holders
    at = [p.path.rsplit(".", 2)[0] if shape.stacks > 1 else shape.blocks[p.layer] for p in places]
    return [f"{path}.{names[place.kind]}" for path, place in zip(at, places, strict=True)]


def bottleneck_places(config: _Settings, context: BuildContext) -> list[Place]:
    """All bottlenecks, those of a block together.

    Raises:
        UserError: No place is left, a layer is not there, or the residual stream of an unknown block is asked for.
    """
    shape = context.architecture
    named = [int(key) for key in config.factors if key != "default"]
    for key, numbers in (("leave_out", config.leave_out), ("reduction_factor", named)):
        # AdapterHub numbers the layers of an encoder-decoder through both stacks.
        if wrong := [i for i in numbers if not 0 <= i < len(shape.blocks)]:
            raise UserError(f"bottleneck: {key} {wrong}: this model's layers are 0 to {len(shape.blocks) - 1}.")
    outputs = (shape.attention_output * config.mh_adapter, shape.mlp_output * config.output_adapter)
    found = [
        _place(config, context, layer, kind, path)
        for layer, block in enumerate(shape.blocks)
        if layer not in config.leave_out
        for kind, paths in enumerate(outputs)
        for path in paths
        if path.startswith(f"{block}.")
    ]
    if not found:
        raise UserError(
            "bottleneck finds nothing to tune: mh_adapter and output_adapter are both off, every layer is in "
            f"leave_out, or the sub-layers of this {shape.model_type} model were not recognised."
        )
    return found


def _place(config: _Settings, context: BuildContext, layer: int, kind: int, path: str) -> Place:
    shape, c = context.architecture, config
    asks = [("is_parallel", c.is_parallel, "false"), ("original_ln_before", c.original_ln_before, "false"),
            ("original_ln_after", not c.original_ln_after, "true")]  # fmt: skip
    wanted = next(((key, other) for key, asked, other in asks if asked), None)
    if wanted is None:
        return Place(layer, kind, path)
    trouble = f"bottleneck: {wanted[0]} needs the residual stream before the {('attention', 'MLP')[kind]}, which "
    around, block = _AROUND.get(shape.model_type), shape.blocks[layer]
    if around is None or (shape.norms_sums and shape.writes):
        raise UserError(f"{trouble}is not known of this {shape.model_type} model; set it to {wanted[1]}.")
    if around.norms is None and c.residual_before_ln == "post_add":
        raise UserError(f"bottleneck: residual_before_ln is true or false in a {shape.model_type} model; 'post_add' "
                        "needs a norm after the addition, as in BERT.")  # fmt: skip
    inside = {name for name, _ in context.model.get_submodule(block).named_modules()}
    if around.reads[kind] not in inside or (not around.reads[kind] and (c.is_parallel or not c.original_ln_after)):
        raise UserError(f"{trouble}this {shape.model_type} model has not; set it to {wanted[1]}.")
    norm = f"{block}.{around.norms[kind]}" if around.norms else None
    reads = around.reads[kind] and (c.is_parallel or c.original_ln_before or norm is None)
    return Place(layer, kind, path, read=f"{block}.{around.reads[kind]}" if reads else None, norm=norm)
