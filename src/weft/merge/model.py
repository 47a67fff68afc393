"""A plain transformers model of merged weights, with the base's class and configuration as far as the merge allows."""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, cast

import torch
from torch import Tensor, nn

from weft.base.embeddings import config_of
from weft.core.architecture import Architecture
from weft.core.head import Head
from weft.errors import UserError
from weft.files.tensors import read_tensors
from weft.merge.weights import MergedWeights
from weft.models.truth import name_of

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


def merged_model(
    model: nn.Module, shape: Architecture, merged: MergedWeights, head: Head | None = None
) -> PreTrainedModel:
    """The model with these weights, without a copy of them; to be saved, not run (its buffers are on the meta device).

    Args:
        model: the base, which is only read.
        head: the adapter's; with one that classifies the model is transformers' ``...ForSequenceClassification``.

    Raises:
        UserError: The architecture has no place for a tensor, or no such class.
    """
    config = copy.deepcopy(config_of(model))
    config._attn_implementation = "eager"  # the base's may be Weft's own; it is not saved
    if hasattr(config, "quantization_config"):
        del config.quantization_config
    if merged.untied:
        config.tie_word_embeddings = False
    if len(merged.blocks) != len(shape.blocks):
        _set_layers(config, merged.blocks)
    tensors = dict(merged.tensors)
    cls = cast("type[PreTrainedModel]", type(model))
    if head and head.labels:
        cls, tensors = _classifier(config, shape, tensors, head)
    elif not shape.writes:
        raise UserError(
            "an encoder's adapter without a classification head has nothing to answer with; nothing to merge."
        )
    if merged.added:
        config = _with_biases(config, cls, merged.added)
    new = _empty(cls, config)
    _put_in(new, tensors, merged)
    return new


def check_as_written(model: nn.Module, folder: Path) -> None:
    """Compare the tensors that transformers loaded from a folder with those in its files, by name.

    Raises:
        UserError: A tensor differs: some models overwrite a row of a loaded tensor (Youtu that of the pad token, which
            is a row of its output layer too).
    """
    loaded = model.state_dict()
    for path in sorted(folder.glob("*.safetensors")):
        for key, written in read_tensors(path).items():
            found = loaded.get(key)
            if found is None or found.shape != written.shape or not written.dim():
                continue
            found, wanted = found.cpu(), written.to(found.dtype)
            apart = (found != wanted) & ~(found.isnan() & wanted.isnan())
            rows = apart.reshape(len(written), -1).any(1).nonzero().flatten().tolist()
            if not rows:
                continue
            raise UserError(
                f"transformers does not load this {name_of(model)} as it is written: {len(rows)} of the {len(written)} "
                f"rows of '{key}' become others (row {rows[0]} first), so the merged model would not answer as the "
                "adapter does. Serve the adapter beside its base instead."
            )


def _empty(cls: type[PreTrainedModel], config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return cls(config).eval()


def _put_in(new: PreTrainedModel, tensors: dict[str, Tensor], merged: MergedWeights) -> None:
    known = new.state_dict()
    strange = sorted(set(tensors) - set(known))
    if strange:
        raise UserError(_no_place(new.config, strange))
    some = next(t for t in tensors.values() if t.is_floating_point())
    missing = set(known) - set(tensors)
    # A switch that gives some modules a bias gives one to others too.
    zeros = {key: torch.zeros(known[key].shape, dtype=some.dtype) for key in missing if key.endswith(".bias")}
    left = missing - set(zeros)
    if left or (zeros and not merged.added):
        raise UserError(
            f"{new.config.model_type} models of this shape have a tensor '{min(missing)}', which the base lacks."
        )
    new.load_state_dict({**tensors, **zeros}, assign=True)
    new.tie_weights()


def _set_layers(config: PreTrainedConfig, blocks: Sequence[int]) -> None:
    """Set the number of layers in the configuration, and its lists with an entry for each."""
    text = config.get_text_config()
    before = max(blocks) + 1
    for key, value in list(vars(text).items()):
        if "layer" in key and isinstance(value, (list, tuple)) and len(value) == before:
            setattr(text, key, [value[i] for i in blocks])
    text.num_hidden_layers = len(blocks)


def _with_biases(config: PreTrainedConfig, cls: type[PreTrainedModel], added: Collection[str]) -> PreTrainedConfig:
    """The configuration with those switches on that give the modules a bias (Llama: attention_bias, mlp_bias).

    Raises:
        UserError: There is no switch for some.
    """
    without = set(_empty(cls, config).state_dict())
    wanted = set(added) - without
    switched = copy.deepcopy(config)
    for key, value in vars(config).items():
        if "bias" in key and value is False:
            changed = copy.deepcopy(config)
            setattr(changed, key, True)
            gained = set(_empty(cls, changed).state_dict()) - without
            if gained & wanted:
                setattr(switched, key, True)
                wanted -= gained
    if wanted:
        raise UserError(_no_place(config, sorted(wanted)))
    return switched


def _no_place(config: PreTrainedConfig, keys: Sequence[str]) -> str:
    last = sorted({".".join(key.split(".")[-2:]) for key in keys})
    return (
        f"cannot be merged: {config.model_type} models have no place for {', '.join(last)} ({keys[0]}, for one), and "
        "no switch in their configuration makes one. Serve the adapter beside its base instead; or train with "
        "add_missing: false, or with target_modules that can have a bias."
    )


def _classifier(
    config: PreTrainedConfig, shape: Architecture, tensors: Mapping[str, Tensor], head: Head
) -> tuple[type[PreTrainedModel], dict[str, Tensor]]:
    """transformers' class for classification, and its tensors: the body's and the head's."""
    from transformers import AutoModelForSequenceClassification

    if type(config) not in AutoModelForSequenceClassification._model_mapping:
        raise UserError(
            f"cannot be merged: the adapter classifies, and transformers has no classification model of the type "
            f"{config.model_type}. Serve the adapter beside its base instead."
        )
    cls = cast("type[PreTrainedModel]", AutoModelForSequenceClassification._model_mapping[type(config)])
    config.id2label = dict(enumerate(head.labels))
    config.label2id = {label: i for i, label in config.id2label.items()}
    config.problem_type = "single_label_classification"
    body = {k: t for k, t in tensors.items() if not (shape.head and k.startswith(f"{shape.head}."))}
    dtype = next(t.dtype for t in body.values() if t.is_floating_point())
    return cls, {**body, **{key: t.detach().to(dtype) for key, t in head.stored("").items()}}
