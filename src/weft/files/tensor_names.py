"""The names of tensors in others' files, changed to those that PEFT's ``save_pretrained`` gives."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping

from torch import Tensor

from weft.errors import UserError
from weft.foreign import expect

PREFIX = "base_model.model."
# The words that torch.compile, FSDP and activation checkpointing put between a module's name and its parent's.
_WRAPPERS = re.compile(r"(^|\.)(_orig_mod|_fsdp_wrapped_module|_checkpoint_wrapped_module)(?=\.)")
# The word that DistributedDataParallel puts before every name inside it.
_PARALLEL = re.compile(rf"^(?:module\.)*({re.escape(PREFIX)})?(?:module\.)*")
# The names under which a model of texts and images keeps its language model.
_LANGUAGE_MODELS = ("language_model", "text_model")
_PARTS = (
    "lora_A|lora_B|lora_E|lora_embedding_A|lora_embedding_B|lora_magnitude_vector|ia3_l|vera_lambda_b|vera_lambda_d|"
    "vera_A|vera_B|ln_tuning_layers"
)
# A state dict names the adapter behind each part of it; save_pretrained takes the name out.
_NAMED = re.compile(rf"\.({_PARTS})\.(?!weight$|bias$)([^.]+)(?=$|\.weight$|\.bias$)")
_SAVED = re.compile(r"\.modules_to_save\.([^.]+)(?=\.)")
_PROMPT = re.compile(r"^prompt_encoder\.([^.]+)\.embedding\.weight$")
# The rest of a name from here on is the method's, and no module of the base.
_OWN = re.compile(rf"\.(({_PARTS})(\..*)?|(base_layer\.)?(weight|bias))$")


def in_file(tensors: Mapping[str, Tensor], file_paths: Mapping[str, str | None]) -> dict[str, str]:
    """The names that a LoRA file must give to some tensors, of any shape (``Architecture.file_paths``) -> their own.

    Raises:
        UserError: No name leads to a tensor's module.
    """
    found: dict[str, str] = {}
    for key in tensors if file_paths else ():
        path = _OWN.sub("", key).removeprefix(PREFIX)
        if path not in file_paths or ".lora_" not in key:
            continue
        other = file_paths[path]
        if other is None:
            raise UserError(f"no LoRA file can name module '{path}': peft would lose '{key}' in silence.")
        found[f"{PREFIX}{other}{key.removeprefix(PREFIX + path)}"] = key
    return found


def normalised(
    tensors: Mapping[str, Tensor],
    entries: Mapping[str, object],
    modules: Collection[str] | None = None,
    others: Mapping[str, str] | None = None,
) -> dict[str, Tensor]:
    """The tensors, of any shape, under PEFT's names.

    An adapter's name (``.default``), ``_orig_mod.``, ``_fsdp_wrapped_module.``, ``module.`` and, where the base's
    ``modules`` have no such prefix, ``language_model.`` are left out. ``others`` maps paths that files may give to some
    modules to the modules' own.

    Raises:
        UserError: Two names become one, the tensors are of several adapters, or a pattern in ``entries``
            (``adapter_config.json``) may mean a part that is left out.
    """
    names: dict[str, str] = {}
    adapters: dict[str, str] = {}
    moved: str | None = None
    for key in tensors:
        plain = _PARALLEL.sub(r"\1", _WRAPPERS.sub("", key).lstrip("."))
        for found in (_NAMED.search(plain), _SAVED.search(plain), _PROMPT.search(plain)):
            if found is not None:
                adapters.setdefault(found[found.re.groups], key)
        plain = _SAVED.sub("", _NAMED.sub(r".\1", plain))
        plain = _PROMPT.sub("prompt_embeddings", plain)
        plain = plain.removesuffix(".weight") if plain.endswith(".lora_magnitude_vector.weight") else plain
        path = _OWN.sub("", plain).removeprefix(PREFIX)
        if others and path in others and (modules is None or path not in modules):
            plain = f"{PREFIX}{others[path]}{plain.removeprefix(PREFIX + path)}"
        placed = plain if modules is None else _placed(plain, key, modules)
        if placed != plain:
            moved = moved or key
        if placed in names:
            raise UserError(f"tensors '{names[placed]}' and '{key}' of the adapter's file have one name, '{placed}'.")
        names[placed] = key
    if len(adapters) > 1:
        listed = ", ".join(f"{name} ('{key}')" for name, key in sorted(adapters.items())[:5])
        raise UserError(f"the file holds tensors of several adapters: {listed}. Save one of them (save_pretrained).")
    keys = ("rank_pattern", "alpha_pattern")
    given = [expect(entries.get(key) or {}, dict, f"adapter_config.json: {key}") for key in keys]
    patterns = [p for one in given for p in one if re.search(r"\W", p)]
    if moved is not None and patterns:
        raise UserError(
            f"adapter_config.json: the pattern {patterns[0]!r} may be meant for paths such as that of '{moved}'. This "
            "base has other paths (without the language model's prefix), so it is not known which modules it is for."
        )
    return {placed: tensors[key] for placed, key in names.items()}


def _placed(plain: str, key: str, modules: Collection[str]) -> str:
    """``plain`` without the prefix of a language model inside another model, if this base's module has no prefix.

    Raises:
        UserError: This base has the module neither with nor without it.
    """
    path = _OWN.sub("", plain).removeprefix(PREFIX)
    parts = plain.removeprefix(PREFIX).split(".")
    prefix = next((name for name in _LANGUAGE_MODELS if name in parts), None)
    if prefix is None or not plain.startswith(PREFIX) or path in modules:
        return plain
    shorter = _OWN.sub("", ".".join(part for part in path.split(".") if part != prefix))
    if shorter in modules:
        return PREFIX + ".".join(part for part in parts if part != prefix)
    raise UserError(
        f"tensor '{key}' is for module '{path}' of a model that holds a language model as '{prefix}.'; this base has "
        f"neither that module nor '{shorter}'."
    )
