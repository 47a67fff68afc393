"""The facts about architectures by ``model_type``, and a look at the modules for the rest."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Collection
from dataclasses import KW_ONLY, dataclass, replace
from typing import TYPE_CHECKING

from torch import nn

from weft.base.embeddings import config_of, input_embeddings, output_head
from weft.base.kinds import is_activation, is_experts, is_linear, is_norm, is_router, linear_shape, linears_in
from weft.core.architecture import Architecture, Installer
from weft.errors import UserError
from weft.libraries import paths_in_files
from weft.models.bloom import install_bloom
from weft.models.encoder_decoder import describe_encoder_decoder
from weft.models.interface import install_bidirectional, install_interface
from weft.ops.loss import HeadForm

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


@dataclass(frozen=True)
class Facts:
    """The last linears of attention and MLP within one block, and a few facts more. Loading a base proves them.

    ``install`` leads its attention along the stream, by the interface or in its own way (None: not at all). In an
    ``encoder`` every token sees the whole text, and its first token stands for the class, through a head of the kind
    ``head`` (``weft.heads``). With ``padding_first`` positions begin after the pad token's id. ``outside`` holds
    last parts of the paths of linears that stand before or after the blocks.
    """

    attention_output: str
    mlp_output: str
    install: Installer | None = install_interface
    _: KW_ONLY
    encoder: bool = False
    head: str = "score"
    padding_first: bool = False
    outside: tuple[str, ...] = ()


FACTS: dict[str, Facts] = {
    **dict.fromkeys(
        ("llama", "mistral", "qwen2", "qwen3", "gemma", "gemma2", "phi3", "olmo2", "granite", "cohere", "stablelm"),
        Facts("self_attn.o_proj", "mlp.down_proj"),
    ),
    "starcoder2": Facts("self_attn.o_proj", "mlp.c_proj"),
    "phi": Facts("self_attn.dense", "mlp.fc2"),
    "gpt2": Facts("attn.c_proj", "mlp.c_proj"),
    "gpt_neox": Facts("attention.dense", "mlp.dense_4h_to_h"),
    "opt": Facts("self_attn.out_proj", "fc2", outside=("project_in", "project_out")),
    "bloom": Facts("self_attention.dense", "mlp.dense_4h_to_h", install_bloom),
    "falcon": Facts("self_attention.dense", "mlp.dense_4h_to_h", None),
}


_BERT = functools.partial(Facts, "attention.output.dense", "output.dense", install_bidirectional, encoder=True)
ENCODERS: dict[str, Facts] = {
    "bert": _BERT(head="classifier"),
    **dict.fromkeys(("roberta", "xlm-roberta", "camembert"), _BERT(head="dense_classifier", padding_first=True)),
    "electra": _BERT(head="gelu_classifier"),
    "distilbert": Facts("attention.out_lin", "ffn.lin2", install_bidirectional, encoder=True, head="pre_classifier"),
}
# The usual names in other architectures, most specific first.
_ATTENTION_NAMES = ("o_proj", "out_proj", "dense", "c_proj", "wo", "proj")
_MLP_NAMES = ("down_proj", "dense_4h_to_h", "fc2", "c_proj", "w2", "fc_out")


def sketch(model: nn.Module, called: Collection[str] = ()) -> Architecture:
    """The ``Architecture`` of a transformers model as tables and names tell it: a model with a language-model head, or
    an encoder. Nothing in it is proved (``weft.models.proof``); the model may be on the meta device.

    ``called`` are the paths of the modules that a text goes through, where several lists of blocks could be the
    model's.

    Raises:
        UserError: The model has no list of blocks with linear modules in it.
    """
    pair = getattr(model.config, "is_encoder_decoder", False)
    shape = describe_encoder_decoder(model) if pair else _decoder_or_encoder(model, called)
    outside = [path for path in (shape.head, shape.embeddings) if path]
    return replace(shape, file_paths=paths_in_files(model, [*shape.linears, *outside]))


def _first_position(model: nn.Module, text: PreTrainedConfig, facts: Facts | None, limit: int | None) -> int:
    """The first position: RoBERTa and its kin begin behind the pad token, which has a row in their table."""
    if facts is not None:
        return int(text.pad_token_id) + 1 if facts.padding_first else 0
    tables = [m for path, m in model.named_modules() if "position" in path and isinstance(m, nn.Embedding)]
    return next((m.padding_idx + 1 for m in tables if m.num_embeddings == limit and m.padding_idx is not None), 0)


def _decoder_or_encoder(model: nn.Module, called: Collection[str]) -> Architecture:
    config = config_of(model)
    text = config.get_text_config()
    facts = FACTS.get(config.model_type) or ENCODERS.get(config.model_type)
    encoder = facts is not None and facts.encoder
    if encoder and getattr(config, "is_decoder", False):
        raise UserError(f"this {config.model_type} model is configured as a decoder (is_decoder), which is not known.")
    blocks = _blocks(model, called)
    linears = linears_in(model, blocks)
    if not linears:
        raise UserError(f"no blocks with linear modules found in this {config.model_type} model.")
    if facts and facts.outside:
        around = [path for path, module in model.named_modules() if is_linear(module)]
        linears += tuple(path for path in around if path.endswith(tuple(f".{name}" for name in facts.outside)))
    inside = [(p, m) for p, m in model.named_modules() if p.startswith(tuple(f"{block}." for block in blocks))]
    experts = tuple(path for path, module in inside if is_experts(path, module))
    wide = tuple(path for path in linears if linear_shape(model.get_submodule(path))[1] == int(text.hidden_size))
    heads = int(getattr(text, "num_attention_heads", None) or 1)  # a state-space model has none
    kv_heads = getattr(text, "num_key_value_heads", None) or _falcon_kv_heads(text) or heads
    limit = getattr(text, "max_position_embeddings", None)
    limit = limit if isinstance(limit, int) and limit > 0 else None  # XLNet says -1
    rope = getattr(text, "rope_parameters", None) or {}
    scaled = [one for one in (rope, *rope.values()) if isinstance(one, dict) and one.get("rope_type") == "dynamic"]
    if limit and scaled:  # the limit is that from before the scaling
        limit = int(limit * max(float(one.get("factor") or 1) for one in scaled))
    first = _first_position(model, text, facts, limit)
    pooler = _pooler(model) if encoder else None
    # A pooler sees one row per sequence, so nothing in it can be a site.
    modules = [(p, m) for p, m in model.named_modules() if pooler is None or not p.startswith(pooler)]
    return Architecture(
        model_type=config.model_type,
        hidden_size=int(text.hidden_size),
        num_layers=len(blocks),
        num_heads=heads,
        num_kv_heads=int(kv_heads),
        head_dim=int(getattr(text, "head_dim", None) or text.hidden_size // heads),
        blocks=blocks,
        linears=linears,
        norms=tuple(path for path, module in modules if is_norm(module)),
        attention_output=_outputs(blocks, wide, facts.attention_output if facts else None, "attn", _ATTENTION_NAMES),
        mlp_output=_outputs(blocks, wide, facts.mlp_output if facts else None, "mlp", _MLP_NAMES),
        activations=tuple(path for path, module in modules if is_activation(module)),
        experts=experts,
        routers=tuple(path for path, module in inside if path not in set(experts) and is_router(path, module)),
        single_outputs=frozenset(path for path in linears if linear_shape(model.get_submodule(path))[1] == 1),
        other_names=frozenset(path.rsplit(".", 1)[-1] for path, _ in model.named_modules() if path not in set(linears)),
        max_length=int(limit) - first if limit else None,
        install_attention=facts.install if facts else install_interface,
        head_form=_head_form(config),
        embedding_size=input_embeddings(model).weight.shape[1],
        embeddings=_path_of(model, input_embeddings(model)),
        head=_path_of(model, output_head(model)),
        rows_named={path: "position_ids" for path, module in modules if _asked_by_name(module)},
        bidirectional=encoder,
        norms_sums=encoder
        or bool(getattr(config, "apply_residual_connection_post_layernorm", False))
        or not getattr(config, "do_layer_norm_before", True),
        head_kind=facts.head if facts else "score",
        pooler=pooler,
        peft_task="FEATURE_EXTRACTION" if encoder else "CAUSAL_LM",
        first_position=first,
        token_types=int(getattr(text, "type_vocab_size", None) or 0) if encoder else 0,
    )


def _head_form(config: object) -> HeadForm:
    """The form of the logits by the configuration: a soft cap (Gemma 2), factors (Cohere, Granite)."""
    factor = float(getattr(config, "logit_scale", None) or 1.0) / float(getattr(config, "logits_scaling", None) or 1.0)
    return HeadForm(factor, getattr(config, "final_logit_softcapping", None))


def _asked_by_name(module: nn.Module) -> bool:
    """OPT's table of positions is called with a mask first, and the positions by name."""
    names = list(inspect.signature(type(module).forward).parameters)
    return isinstance(module, nn.Embedding) and "position_ids" in names[2:]


def _path_of(model: nn.Module, wanted: nn.Module | None) -> str:
    return next((path for path, module in model.named_modules() if module is wanted), "")


def _pooler(model: nn.Module) -> str | None:
    """BERT's pooler: a layer of the base below its classification heads."""
    found = getattr(model.base_model, "pooler", None)
    return _path_of(model, found) if found is not None else None


def _falcon_kv_heads(config: object) -> int | None:
    """The number of Falcon's keys in its cache: one head in the 7B; the new architecture repeats them per query."""
    few = getattr(config, "multi_query", False) and not getattr(config, "new_decoder_architecture", False)
    return 1 if few else None


def _blocks(model: nn.Module, called: Collection[str] = ()) -> tuple[str, ...]:
    """Paths of the blocks: the longest ModuleList that holds linear modules (and that a text goes through)."""
    best: tuple[str, ...] = ()
    for path, module in model.named_modules():
        if called and f"{path}.0" not in called:
            continue
        longer = isinstance(module, nn.ModuleList) and len(module) > len(best)
        if longer and any(is_linear(inner) for inner in module[0].modules()):
            best = tuple(f"{path}.{i}" for i in range(len(module)))
    return best


def _outputs(
    blocks: tuple[str, ...], linears: tuple[str, ...], known: str | None, part: str, names: tuple[str, ...]
) -> tuple[str, ...]:
    if known:
        return tuple(f"{block}.{known}" for block in blocks if f"{block}.{known}" in set(linears))
    found = []
    for block in blocks:
        inside = [path for path in linears if path.startswith(f"{block}.")]
        in_attention = [p for p in inside if "attn" in p.lower() or "attention" in p.lower()]
        pool = in_attention if part == "attn" else [p for p in inside if p not in set(in_attention)]
        found += [path for name in names for path in pool if path.endswith(f".{name}")][:1]
    return tuple(found)
