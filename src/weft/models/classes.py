"""The class of transformers that loads a model."""

from __future__ import annotations

from typing import TYPE_CHECKING

from torch import nn

from weft.errors import UserError
from weft.models.facts import ENCODERS

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel


class UnknownTypeError(UserError):
    """Weft has no use for this architecture."""


def is_encoder(config: object) -> bool:
    """Whether a configuration is that of an encoder that Weft knows."""
    return getattr(config, "model_type", "") in ENCODERS


def auto_class(config: PreTrainedConfig, name: str) -> object:
    """The transformers class that loads it. Encoders come with a classification head, so that their modules have the
    paths in PEFT's files; the head itself is then removed (every job has its own).

    Raises:
        UnknownTypeError: Its type has no language-modelling head, and is no encoder that is known.
    """
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoModelForSequenceClassification

    if getattr(config, "is_encoder_decoder", False):
        return AutoModelForSeq2SeqLM
    if is_encoder(config):
        return AutoModelForSequenceClassification
    kinds = [auto for auto in (AutoModelForCausalLM, AutoModelForSequenceClassification)
             if type(config) in auto._model_mapping]  # fmt: skip
    if kinds == [AutoModelForSequenceClassification]:
        raise UnknownTypeError(
            f"the model {name!r} is of the type {config.model_type}, which has no language-modelling head and is none "
            f"of the encoders that Weft knows: {', '.join(ENCODERS)}."
        )
    return AutoModelForCausalLM


def own_class(config: PreTrainedConfig, name: str) -> object:
    """The transformers class that the configuration names; if it names none, the usual one."""
    import transformers

    named = (config.architectures or [""])[0]
    found = getattr(transformers, named, None) if named.isidentifier() else None
    if isinstance(found, type) and issubclass(found, transformers.PreTrainedModel):
        return found
    return auto_class(config, name)


def headless(model: PreTrainedModel) -> nn.Module:
    """An encoder without the head on its body: transformers had to invent it, differently every time."""
    if is_encoder(model.config):
        for name, child in list(model.named_children()):
            if child is not model.base_model:
                setattr(model, name, nn.Identity())
    return model
