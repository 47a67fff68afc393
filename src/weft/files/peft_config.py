"""The reader of PEFT's ``adapter_config.json``, in folders of other programs and in ours, where both files agree."""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from weft.core.adapter import Adapter, MethodConfig
from weft.core.architecture import Architecture
from weft.errors import UserError
from weft.foreign import expect
from weft.heads.classification import PREFIXES, labels_of_tensors
from weft.heads.reward import OwnHead, task_of
from weft.methods.registry import METHODS
from weft.methods.trainable_tokens import TokenRows

# Under these two names peft looks for a classification head.
HEAD_MODULES = ("classifier", "score")
# Entries that every PEFT configuration has and that say nothing about the method.
COMMON_KEYS = (
    "task_type",
    "peft_type",
    "auto_mapping",
    "peft_version",
    "base_model_name_or_path",
    "revision",
    "inference_mode",
)


def read_foreign(
    path: Path, entries: dict[str, object], tensors: dict[str, Tensor]
) -> tuple[MethodConfig, dict[str, Tensor], OwnHead | None]:
    """The adapter of a folder that peft or AdapterHub wrote, from its ``adapter_config.json`` (at ``path``).

    Returns:
        The method's configuration, the tensors in the file's shapes, and the classes, if any.

    Raises:
        UserError: Its kind is not known, or a key changes its results in an unknown way.
    """
    for cls in METHODS.values():
        if (config := cls.from_layout(entries)) is not None:
            return config, tensors, None
    # Prefix tuning comes last, and so reads the files of P-tuning v2, which have its type.
    named_so = sorted(METHODS.values(), key=lambda cls: cls.method.upper() == cls.peft_type)
    by_type = {cls.peft_type: cls for cls in named_so}
    peft_type = expect(entries.get("peft_type", ""), str, f"{path}: peft_type")
    if peft_type not in by_type:
        raise UserError(f"{path}: peft_type is {peft_type!r}; Weft loads {', '.join(sorted(by_type))}.")
    rest = {key: value for key, value in entries.items() if key not in COMMON_KEYS}
    rows, virtual = tensors.get("prompt_embeddings"), entries.get("num_virtual_tokens") or 0
    two = entries.get("num_transformer_submodules") == 2
    if rows is not None and two and isinstance(virtual, int) and len(rows) == 2 * virtual:
        # Of an encoder-decoder's two sets of virtual tokens peft only ever uses the encoder's.
        tensors = {**tensors, "prompt_embeddings": rows[:virtual]}
    labels, of_head = labels_of_tensors(tensors) if entries.get("task_type") == "SEQ_CLS" else ((), [])
    task = task_of(labels) if labels else None
    if task is not None:
        saved = expect(rest.get("modules_to_save") or [], list, f"{path}: modules_to_save")
        rest["modules_to_save"] = [m for m in saved if m not in HEAD_MODULES] or None
    return by_type[peft_type].from_peft(rest, [key for key in tensors if key not in of_head]), tensors, task


def check_agreement(own: Path, config: MethodConfig, path: Path, entries: Mapping[str, object]) -> None:
    """Compare ``config`` of ``weft.json`` (``own``) with the ``entries`` of ``adapter_config.json`` beside it.

    Only keys that mean the same in both count; one that ``adapter_config.json`` lacks has PEFT's default.

    Raises:
        UserError: They disagree; the message shows both values of every key.
    """
    cls, lines = type(config), []
    theirs = cls.of_layout(entries)
    stated = config.in_peft()
    for key in [key for key in stated if key not in cls.renamed(theirs)]:
        value = stated[key]
        default = cls.peft_defaults.get(key, cls.model_fields[key].default if key in cls.model_fields else None)
        other = theirs.get(key, default)
        if key == "modules_to_save":
            value, other = _set(value), _set(other) - set(HEAD_MODULES)
        if value != other and not (_empty(value) and _empty(other)):
            missing = "" if key in theirs else "not there, which is "
            lines.append(f"  {key}: {_shown(value)} in {own.name}, {missing}{_shown(other)} in {path.name}")
    mine, their_targets = getattr(config, "target_modules", None), theirs.get("target_modules")
    if mine is not None and "target_modules" not in stated and not _same_targets(config, mine, their_targets):
        lines.append(f"  target_modules: {_shown(mine)} in {own.name}, {_shown(their_targets)} in {path.name}")
    if lines:
        raise UserError(
            f"{own.parent}: {own.name} and {path.name} disagree:\n" + "\n".join(lines) + "\nIt is not known with which "
            f"of them the tensors were trained. Put back the one that was changed, or delete {own.name}: the folder is "
            "then read as peft reads it."
        )


def _empty(value: object) -> bool:
    return value is None or (isinstance(value, (list, dict, set, str)) and not value)


def _set(value: object) -> set[str]:
    return set(map(str, value)) if isinstance(value, (list, tuple)) else set()


def _shown(value: object) -> str:
    text = repr(sorted(value) if isinstance(value, set) else value)
    return text if len(text) <= 200 else f"{text[:200]} …"


def _same_targets(config: MethodConfig, mine: str | Collection[str], theirs: object) -> bool:
    """Whether PEFT's targets can be ours. It has paths where we have an expression, names of layers, or all of them."""
    if mine in ("all-linear", theirs):
        return True
    if not isinstance(theirs, (list, tuple)) or not all(isinstance(name, str) for name in theirs):
        return False
    if isinstance(mine, str):
        try:
            return all(re.fullmatch(mine, name) for name in theirs)
        except re.error:
            return False

    def under(path: str, names: Collection[str]) -> bool:
        return any(path == name or path.endswith(f".{name}") for name in names)

    # With layers chosen, a name may have no module left.
    whole = getattr(config, "layers_to_transform", None) is not None or all(
        any(under(path, [name]) or under(name, [path]) for path in theirs) for name in mine
    )
    return whole and all(under(path, mine) or any(under(name, [path]) for name in mine) for path in theirs)


def _same_table(table: Tensor, weight: Tensor, adapter: Adapter) -> bool:
    """Whether a table [V, d] is the base's, but for rows that the adapter replaces in it."""
    trained = [layer.ids for layer in adapter.modules() if isinstance(layer, TokenRows) and layer.replaces(weight)]
    different = (table != weight).any(-1).nonzero().flatten()
    return bool(torch.isin(different, torch.cat([*trained, different[:0]])).all())


def without_tables(
    adapter: Adapter, tensors: Mapping[str, Tensor], model: nn.Module, shape: Architecture
) -> dict[str, Tensor]:
    """``tensors`` without the base's own table of embeddings and output layer, [V, d] each.

    peft adds them where they were tuned or the vocabulary was resized (``save_embedding_layers``). Those of the
    adapter's own tensors stay. Rows that it trains may differ.

    Raises:
        UserError: A table is not the base's, or the base's has another number of rows.
    """
    rest, own = dict(tensors), adapter.tensors().keys()
    for path in dict.fromkeys(path for path in (shape.embeddings, shape.head) if path):
        base = model.get_submodule(path)
        for part, weight in base.named_parameters(recurse=False):
            inside = (f"{PREFIXES[0]}{path}.{layer}base_layer.{part}" for layer in ("", "token_adapter."))
            for key in (*(f"{prefix}{path}.{part}" for prefix in PREFIXES), *inside):
                if key not in rest:
                    continue
                table = rest[key]
                if table.shape != weight.shape:
                    raise UserError(
                        f"tensor '{key}' is a table of shape {tuple(table.shape)}, and this base's is "
                        f"{tuple(weight.shape)}: the adapter was made on a base whose vocabulary was resized "
                        "(resize_token_embeddings), and does not fit this one. Load it on the base that was resized "
                        "and saved, with its tokenizer (--model)."
                    )
                if key in own:
                    continue
                if weight.is_meta or not _same_table(table.to(weight), weight, adapter):
                    compared = "cannot be compared with the base's here" if weight.is_meta else "is not the base's"
                    raise UserError(
                        f"tensor '{key}' is a table of its own that {compared}: peft saved the base's embeddings with "
                        "the adapter (save_embedding_layers), as it does when the vocabulary was resized, and loading "
                        "would replace those of this base. Load it on the base that it was made on (--model); or, if "
                        "the tables are the same, save it with save_embedding_layers=False."
                    )
                del rest[key]
    return rest
