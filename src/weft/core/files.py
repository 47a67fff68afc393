"""Adapter folders in PEFT's layout: ``adapter_config.json`` and ``adapter_model.safetensors``.

What PEFT's configuration has no word for lies beside it in ``weft.json`` (the method's own configuration, whole), so
that our folders load in peft and nothing is lost when we read them back.
"""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft.core.adapter import Adapter
from weft.core.architecture import Architecture
from weft.core.config import MethodConfig
from weft.errors import UserError, nearest

WEIGHTS = "adapter_model.safetensors"
CONFIG = "adapter_config.json"
OWN_CONFIG = "weft.json"
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

# Filled by weft.methods: name -> configuration class.
METHODS: dict[str, type[MethodConfig]] = {}


def method_config(method: str) -> type[MethodConfig]:
    """The configuration class of a method by its name; UserError lists the methods."""
    if method not in METHODS:
        raise UserError(
            f"no method named {method!r}.{nearest(method, METHODS)} Methods: {', '.join(sorted(METHODS))}."
        )
    return METHODS[method]


def check_name(name: str) -> None:
    """An adapter's name is also a folder's: letters, digits, '.', '_', '-', not beginning with a dot."""
    if not re.fullmatch(r"[A-Za-z0-9_\-\u4e00-\u9fff][\w.\-]{0,99}", name):
        raise UserError(f"{name!r} is no name for an adapter: use letters, digits, '_', '-' and '.', at most 100.")


def save(adapter: Adapter, architecture: Architecture, folder: Path, *, base_name: str = "") -> None:
    """Write ``adapter`` into ``folder``."""
    folder.mkdir(parents=True, exist_ok=True)
    config = adapter.config
    entries: dict[str, Any] = {
        "peft_type": config.peft_type,
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base_name,
        "inference_mode": True,
        "revision": None,
        "auto_mapping": None,
        **config.to_peft(architecture),
    }
    tensors = {key: value.detach().cpu().contiguous() for key, value in adapter.tensors().items()}
    save_file(tensors, folder / WEIGHTS, metadata={"format": "pt"})
    _write_json(folder / CONFIG, entries)
    _write_json(folder / OWN_CONFIG, {"method": config.method, "config": config.model_dump(mode="json")})


def read(folder: Path) -> tuple[MethodConfig, dict[str, Tensor]]:
    """Read an adapter folder: the method's configuration and the tensors.

    Raises:
        UserError: a file is missing or broken, or holds what Weft does not know.
    """
    if not folder.is_dir():
        raise UserError(f"no adapter folder at {folder}.")
    if not (folder / WEIGHTS).is_file():
        other = folder / "adapter_model.bin"
        hint = f" {other.name} is a pickle, which can run code and is never loaded; convert it with peft."
        hint *= other.exists()
        raise UserError(f"{folder} holds no {WEIGHTS}.{hint}")
    entries = read_json(folder / CONFIG)
    tensors = read_tensors(folder / WEIGHTS)
    own = folder / OWN_CONFIG
    try:
        if own.is_file():
            stored = read_json(own)
            return method_config(stored["method"])(**stored["config"]), tensors
        by_type = {cls.peft_type: cls for cls in METHODS.values()}
        peft_type = entries.get("peft_type")
        if peft_type not in by_type:
            raise UserError(
                f"{folder / CONFIG}: peft_type is {peft_type!r}; Weft loads {', '.join(sorted(by_type))}."
            )
        rest = {key: value for key, value in entries.items() if key not in COMMON_KEYS}
        return by_type[peft_type].from_peft(rest, list(tensors)), tensors
    except (ValidationError, KeyError) as error:
        raise UserError(f"{folder}: the adapter's configuration cannot be used: {error}") from error


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a file, or UserError."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise UserError(f"{path} is missing.") from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise UserError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path} must hold a JSON object, not {type(value).__name__}.")
    return value


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, or UserError if it is truncated or broken."""
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None


def _write_json(path: Path, value: Any) -> None:
    path.write_text(json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False) + "\n", encoding="utf-8")
