"""Adapter folders in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

PEFT's configuration has no place for some of an adapter's facts. They lie beside it in ``weft.json``: the method's own
configuration, whole, the way its data was rendered, the SHA-256 of every tensor. So our folders load in peft, and
nothing is lost when we read them back.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import ValidationError
from torch import Tensor, nn

from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.adapters import Adapters
from weft.core.architecture import Architecture
from weft.core.route import Router
from weft.errors import UserError
from weft.files.peft_config import HEAD_MODULES, check_agreement, read_foreign, without_tables
from weft.files.tensor_names import in_file, normalised
from weft.files.tensors import check_digests, check_values, read_tensors, save_tensors
from weft.files.whole import make_folder, refilled_folder, write_text
from weft.foreign import entry, expect, read_json
from weft.heads.classification import PREFIXES
from weft.heads.reward import OwnHead, task_of
from weft.libraries import paths_in_files
from weft.methods.combined import CombinedConfig
from weft.methods.dense import how_kept
from weft.methods.registry import METHODS
from weft.ops.copying import checked
from weft.patterns import check_name

WEIGHTS = "adapter_model.safetensors"
EXTRA = "encoder.safetensors"
CONFIG = "adapter_config.json"
OWN_CONFIG = "weft.json"

# These settings are a side of the adapter's tensors; up to _SMALL nobody minds them.
_SIZES = ("r", "init_r", "target_r", "num_virtual_tokens", "encoder_hidden_size", "encoder_num_layers")
_SMALL = 512


def save(adapter: Adapter, architecture: Architecture, folder: Path, *, base_name: str = "") -> None:
    """Write ``adapter`` into ``folder``; several methods in one adapter each get a folder in it, which loads alone.

    If that fails, the folder is as it was.

    Raises:
        UserError: a tensor is not finite; names it.
        WriteError: The machine refuses to write the folder.
    """
    files = {WEIGHTS, EXTRA, *(cls.weights_file for cls in METHODS.values())}
    with refilled_folder(folder, drop=files) as part:  # an earlier adapter there may have had others of them
        _write(adapter, architecture, part, base_name)


def _write(adapter: Adapter, architecture: Architecture, folder: Path, base_name: str) -> None:
    check_values({**stored_tensors(adapter), **adapter.extra_tensors()}, f"adapter '{adapter.name}' is not saved")
    make_folder(folder)
    own: dict[str, object] = {"method": adapter.config.method}
    digests: dict[str, dict[str, str]] = {}
    if adapter.parts[0] is not adapter:
        names = [f"{i}-{part.config.method}" for i, part in enumerate(adapter.parts, 1)]
        for name, part in zip(names, adapter.parts, strict=True):
            part.record_origin(adapter.provenance or part.provenance, adapter.trained_on or part.trained_on)
            _write(part, architecture, folder / name, base_name)
        if own_head := stored_head(adapter):
            digests[WEIGHTS] = save_tensors(own_head, folder / WEIGHTS)
        own["parts"] = names
    else:
        own["config"] = adapter.stored_config().model_dump(mode="json")
        entries = adapter.config.own_layout(adapter.name, architecture)
        write_json(folder / CONFIG, entries or _peft_entries(adapter, architecture, base_name))
        file, tensors = adapter.config.weights_file, stored_tensors(adapter)
        if renamed := in_file(tensors, architecture.file_paths if adapter.config.peft_type == "LORA" else {}):
            own["renamed"] = renamed
        given = {key: name for name, key in renamed.items()}
        digests[file] = save_tensors({given.get(key, key): t for key, t in tensors.items()}, folder / file)
        if extra := adapter.extra_tensors():
            digests[EXTRA] = save_tensors(extra, folder / EXTRA)
    if adapter.head.labels:
        own["labels"] = list(adapter.head.labels)
    if adapter.provenance is not None:
        own["data"] = adapter.provenance
    if adapter.trained_on:
        own["base"] = adapter.trained_on
    own["sha256"] = digests
    write_json(folder / OWN_CONFIG, own)


def save_adapter(adapters: Adapters, name: str, folder: Path, *, base_name: str = "") -> None:
    """Write adapter ``name`` in PEFT's layout; ``base_name`` is what its config calls the base model.

    Raises:
        UserError: there is none, or a tensor is not finite.
    """
    adapter = adapters[name]
    if adapter.trained_on is None:
        adapter.record_origin(adapter.provenance, how_kept(adapters.model, adapters.dtype))
    save(adapter, adapters.architecture, folder, base_name=base_name)


def load_adapter(adapters: Adapters, name: str, folder: Path, *, tokenizer: Any = None) -> Adapter:
    """Add an adapter from a folder in PEFT's layout, ours or peft's.

    Raises:
        UserError: as ``read`` and ``Adapters.add``; the base is then as it was before.
    """
    config, tensors, task = read(folder, adapters.model)
    provenance = provenance_of(folder)
    adapter = add_with_tensors(adapters, name, config, tensors, tokenizer=tokenizer, head=task)
    adapter.record_origin(provenance, trained_on(folder) or {})
    return adapter


def add_with_tensors(
    adapters: Adapters, name: str, config: MethodConfig, tensors: Mapping[str, Tensor], **more: Any
) -> Adapter:
    """``Adapters.add`` with ``more``, then the values of ``tensors``, in the shapes of its file.

    Raises:
        UserError: The adapter cannot be added, or the tensors are not its own; the base is then as it was before.
    """
    adapter = adapters.add(name, config, blank=True, **more)
    try:
        with torch.no_grad():
            load_tensors(adapter, without_tables(adapter, tensors, adapters.model, adapters.architecture))
    except BaseException:
        adapters.remove(name)
        raise
    return adapter


@torch.no_grad()
def assemble(
    name: str, config: MethodConfig, tensors: Mapping[str, Tensor], model: nn.Module, architecture: Architecture
) -> Adapter:
    """An adapter with these values, beside a model whose shapes alone count: it may lie on the meta device."""
    widest = max((t.dtype for t in tensors.values() if t.is_floating_point()), key=lambda d: d.itemsize)
    context = BuildContext(
        model,
        architecture,
        torch.Generator(),
        dtype=torch.promote_types(widest, torch.float32),
        device=torch.device("cpu"),
        blank=True,
        router=Router(),
    )
    adapter = config.build(name, context)
    adapter.load_tensors(without_tables(adapter, tensors, model, architecture))
    return adapter


def stored_tensors(adapter: Adapter) -> dict[str, Tensor]:
    """All tensors in the adapter's file, in their own shapes: the method's and those of a classification head."""
    return {**adapter.file_tensors(), **stored_head(adapter)}


def stored_head(adapter: Adapter) -> Mapping[str, Tensor]:
    """The tensors of an adapter's own head, in their own shapes, by their names in its file; none without one."""
    return adapter.head.stored(PREFIXES[adapter.num_learned_tokens > 0])


@torch.no_grad()
def load_tensors(adapter: Adapter, tensors: Mapping[str, Tensor]) -> None:
    """Take over the tensors that ``read`` gave, each of the shape of the adapter's own."""
    rest = dict(tensors)
    for key, parameter in stored_head(adapter).items():
        parameter.copy_(checked(tensors, key, tuple(parameter.shape)))
        del rest[key]
    adapter.load_tensors(rest)


def _peft_entries(adapter: Adapter, architecture: Architecture, base_name: str) -> dict[str, object]:
    config, head = adapter.stored_config(), adapter.head
    entries = {
        "peft_type": config.peft_type,
        "task_type": head.peft_task or architecture.peft_task,
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "revision": None,
        "auto_mapping": None,
        **config.to_peft(architecture),
    }
    if head.labels:
        saved = entries.get("modules_to_save")
        entries["modules_to_save"] = [*(saved if isinstance(saved, list) else []), *HEAD_MODULES]
    return entries


def weights_path(folder: Path) -> Path:
    """The path of the file of tensors in an adapter's folder; under PEFT's name if there is no file."""
    names = dict.fromkeys((WEIGHTS, *(cls.weights_file for cls in METHODS.values())))
    return next((folder / name for name in names if (folder / name).is_file()), folder / WEIGHTS)


def is_adapter(folder: Path) -> bool:
    """Whether the folder holds an adapter, or what is left of one; a merged model is none."""
    files = (folder / CONFIG, folder / OWN_CONFIG, weights_path(folder))
    return merged_from(folder) is None and any(path.is_file() for path in files)


def name_for(folder: Path) -> str:
    """The name that an adapter gets from its folder's."""
    return re.sub(r"[^\w\-]", "_", folder.resolve().name, flags=re.ASCII).strip("_") or "adapter"


def read(
    folder: Path, model: nn.Module | None = None
) -> tuple[MethodConfig, dict[str, Tensor], OwnHead | None]:
    """Read an adapter folder: the method's configuration, the tensors in the file's shapes, its head's task if any.

    ``model`` is the base. Where another program's file gives its modules a longer path, they get the base's own.

    Raises:
        UserError: A file is missing or broken, or holds something unknown to Weft; two files disagree; a tensor is not
            the one that was saved, not finite, or not of floating point.
    """
    if not folder.is_dir():
        raise UserError(f"no adapter folder at {folder}.")
    path = folder / OWN_CONFIG
    own = read_own(folder)
    try:
        task = task_of(_labels(own, folder)) if "labels" in own else None
        if "parts" in own:
            read_parts = [read(folder / name) for name in _parts(own)]
            joined = {f"{i}.{key}": t for i, (_, part, _) in enumerate(read_parts) for key, t in part.items()}
            if (folder / WEIGHTS).is_file():
                joined |= _checked_tensors(folder / WEIGHTS, own)
            return CombinedConfig(parts=tuple(config for config, _, _ in read_parts)), joined, task
        weights = _weights_of(folder)
        tensors = _checked_tensors(weights, own)
        entries = read_json(folder / CONFIG)
        if own:
            method, settings = entry(own, "method", str, str(path)), entry(own, "config", dict, str(path))
            _check_sizes(settings, tensors, str(path))
            config = METHODS.find(method).model_validate(settings)
            check_agreement(path, config, folder / CONFIG, entries)
            if (folder / EXTRA).is_file():  # inference does not need it
                tensors |= _checked_tensors(folder / EXTRA, own)
            renamed = expect(own.get("renamed", {}), dict, f"{path}: renamed")
            names = {key: expect(name, str, f"{path}: renamed: {key}") for key, name in renamed.items()}
            return config, {names.get(key, key): t for key, t in tensors.items()}, task
        _check_sizes(entries, tensors, str(folder / CONFIG))
        modules = None if model is None else {name for name, _ in model.named_modules()}
        given = {} if model is None else paths_in_files(model, modules or ())
        others = {name: path for path, name in given.items() if name}
        return read_foreign(folder / CONFIG, entries, normalised(tensors, entries, modules, others))
    except (ValidationError, KeyError) as error:
        raise UserError(f"{folder}: the adapter's configuration cannot be used: {error}") from error


def _digests(own: Mapping[str, object]) -> dict[str, object]:
    """The SHA-256 of each file's tensors; empty in folders of earlier versions."""
    found = own.get("sha256", {})
    if not isinstance(found, dict):
        raise UserError(f"{OWN_CONFIG}: sha256 must be a JSON object, not {type(found).__name__}.")
    return found


def _checked_tensors(path: Path, own: Mapping[str, object]) -> dict[str, Tensor]:
    """The tensors of a file, if they are those that were saved, finite, and of floating point."""
    tensors = read_tensors(path)
    if path.name in (digests := _digests(own)):
        check_digests(path, tensors, digests[path.name], path.with_name(OWN_CONFIG))
    check_values(tensors, path)
    return tensors


def read_own(folder: Path) -> dict[str, object]:
    """``weft.json``; empty if the folder has none. A file that cannot be read is an error."""
    return read_json(folder / OWN_CONFIG) if os.path.lexists(folder / OWN_CONFIG) else {}


def labels_of(folder: Path) -> tuple[str, ...]:
    """What the outputs of the head in an adapter's folder are called; none: it writes text.

    Raises:
        UserError: The file that should say so is damaged.
    """
    own = read_own(folder)
    return _labels(own, folder) if "labels" in own else ()


def _labels(own: Mapping[str, object], folder: Path) -> tuple[str, ...]:
    where = f"{folder / OWN_CONFIG}: labels"
    return tuple(expect(label, str, where) for label in expect(own["labels"], list, where))


def _check_sizes(entries: Mapping[str, object], tensors: Mapping[str, Tensor], where: str) -> None:
    """Refuse ranks and lengths far beyond any side of the file's tensors, before they take memory."""
    largest = max((side for tensor in tensors.values() for side in tensor.shape), default=0)
    pattern = entries.get("rank_pattern")
    given = {key: entries.get(key) for key in _SIZES} | (pattern if isinstance(pattern, dict) else {})
    for key, value in given.items():
        if isinstance(value, int) and value > max(largest, _SMALL):
            raise UserError(f"{where}: {key} is {value}, and no side of the file's tensors is more than {largest}.")


def base_of(folder: Path) -> str | None:
    """The name of the base in the adapter's ``folder``; of several methods in one adapter, the first one's."""
    parts = _parts(read_own(folder))
    named = read_json(folder / parts[0] / CONFIG if parts else folder / CONFIG).get("base_model_name_or_path")
    return named if isinstance(named, str) and named else None


def provenance_of(folder: Path) -> dict[str, object] | None:
    """The way the adapter's data was read and rendered (``weft.data.provenance``); None if the folder does not say.

    Raises:
        UserError: The file that should say so is damaged.
    """
    return _section(folder, "data")


def trained_on(folder: Path) -> dict[str, Any] | None:
    """The ``dtype`` and ``quantization`` of the base in the adapter's training; None if the folder does not say."""
    return _section(folder, "base")


def added_tokens(folder: Path, tokenizer: Any = None) -> list[str]:
    """The tokens, in order, that training added, so that the adapter's base must have rows for them.

    Where the folder does not say: those that ``tokenizer``, which came with it, calls added and whose rows it trained.
    """
    settings = expect((provenance_of(folder) or {}).get("settings") or {}, dict, f"{folder / OWN_CONFIG}: settings")
    said: list[str] = expect(settings.get("add_tokens", []), list, f"{folder / OWN_CONFIG}: add_tokens")
    if "add_tokens" in settings or tokenizer is None or not (folder / CONFIG).is_file():
        return said
    entries = read_json(folder / CONFIG)
    given: Any = entries.get("trainable_token_indices") or entries.get("token_indices") or []
    trained = {i for ids in (given.values() if isinstance(given, dict) else [given]) for i in ids}
    return [token for token, number in tokenizer.get_added_vocab().items() if number in trained]


def merged_from(folder: Path) -> dict[str, object] | None:
    """The origin of a model's folder that ``weft merge`` wrote; None for any other folder."""
    return _section(folder, "merged") if (folder / "config.json").is_file() else None


def _section(folder: Path, key: str) -> dict[str, Any] | None:
    own = read_own(folder)
    section = own.get(key)
    if section is not None and not isinstance(section, dict):
        raise UserError(f"{folder / OWN_CONFIG}: {key} must be a JSON object, not {type(section).__name__}.")
    return section


def _parts(own: Mapping[str, object]) -> list[str]:
    """The folders of an adapter's parts."""
    parts = own.get("parts", [])
    if not isinstance(parts, list) or ("parts" in own and not parts):
        raise UserError(f"{OWN_CONFIG}: parts is {parts!r}; it must name the folders of the adapter's parts.")
    for part in parts:
        check_name(str(part))
    return [str(part) for part in parts]


def _weights_of(folder: Path) -> Path:
    path = weights_path(folder)
    if not path.is_file():
        pickles = [name for name in ("adapter_model.bin", "pytorch_adapter.bin") if (folder / name).exists()]
        hint = f" {''.join(pickles)} is a pickle, which can run code and is never loaded. Convert it: "
        hint += f"weft convert {folder} NEW_FOLDER"
        raise UserError(f"{folder} holds no {WEIGHTS}.{hint * bool(pickles)}")
    return path


def write_json(path: Path, value: object) -> None:
    """Write a JSON file in the form of all files of an adapter's folder: sorted keys, two spaces.

    Raises:
        WriteError: The machine refuses to write it.
    """
    write_text(path, json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n")
