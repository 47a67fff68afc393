"""Loading a base: an embedded one, a folder, or a hub id."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from weft.assets import EMBEDDED_MODELS, model_path
from weft.core.architecture import Architecture
from weft.errors import UserError, nearest
from weft.models.encoder_decoder import auto_class
from weft.models.facts import describe

DTYPES = {
    "float32": torch.float32,
    "fp32": torch.float32,
    "bfloat16": torch.bfloat16,
    "bf16": torch.bfloat16,
    "float16": torch.float16,
    "fp16": torch.float16,
    "float64": torch.float64,
    "fp64": torch.float64,
}


@dataclass(frozen=True)
class Base:
    """A loaded base model: the model, its tokenizer, where its parts are, and where it came from."""

    model: nn.Module
    tokenizer: Any
    architecture: Architecture
    name: str


def resolve_model(name: str) -> str:
    """An embedded model's name becomes its folder, a folder its absolute path; a hub id stays.

    Raises:
        UserError: it looks like a path and nothing is there, or the folder holds no model.
    """
    if name in EMBEDDED_MODELS:
        return str(model_path(name))
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is a folder without a config.json; a Hugging Face model folder has one.")
        return str(path.resolve())
    looks_like_path = name.startswith((".", "/", "~")) or name.count("/") > 1 or path.exists()
    if looks_like_path or "/" not in name:
        hint = nearest(name, EMBEDDED_MODELS)
        raise UserError(
            f"no model at {name!r}.{hint} A model is a Hugging Face folder, a hub id such as Qwen/Qwen2.5-0.5B, or one "
            f"of the embedded ones: {', '.join(EMBEDDED_MODELS)}."
        )
    return name


def resolve_dtype(name: str) -> torch.dtype | str:
    """``auto`` (what the checkpoint's config says) or a torch dtype."""
    if name == "auto":
        return "auto"
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not known.{nearest(name, DTYPES)} Use auto or one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def resolve_device(name: str) -> torch.device:
    """``auto`` takes a GPU if there is one; a device that is asked for and not there is an error, never a fallback."""
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UserError(f"device {name!r} is not known; use auto, cpu, cuda or cuda:0.") from None
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device {name!r} is not there: this machine has {count} CUDA device(s). Use device: cpu.")
    elif device.type != "cpu":
        raise UserError(f"device {name!r}: Weft runs on cpu and cuda.")
    return device


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a base (or of a run folder)."""
    from transformers import AutoTokenizer

    try:
        return AutoTokenizer.from_pretrained(resolve_model(name) if not Path(name).is_dir() else name)
    except Exception as error:  # as in load_base
        there = not Path(name).is_dir() or (Path(name) / "tokenizer.json").is_file()
        hint = "" if there else " (no tokenizer.json there)"
        raise UserError(f"the tokenizer of {name!r} cannot be loaded{hint}: {_first_line(error)}") from error


def sketch_base(name: str, *, dtype: str = "auto", tokenizer: Any = None) -> Base:
    """The base without its weights, all tensors on the meta device: enough to check a configuration against it.

    Raises:
        UserError: it is not there, or its configuration cannot be read.
    """
    from transformers import AutoConfig

    source, kind = resolve_model(name), resolve_dtype(dtype)
    try:
        config = AutoConfig.from_pretrained(source)
        kind = (getattr(config, "dtype", None) or torch.float32) if kind == "auto" else kind
        with torch.device("meta"):
            model = auto_class(config).from_config(config, dtype=kind)
    except Exception as error:  # as in load_base
        raise UserError(f"the model {name!r} cannot be loaded: {_first_line(error)}") from error
    return Base(model.eval(), tokenizer or load_tokenizer(source), describe(model), name)


def load_base(name: str, *, dtype: str = "auto", device: str = "auto", tokenizer: Any = None) -> Base:
    """Load a base model with its head, in evaluation mode.

    Raises:
        UserError: it is not there, cannot be read, or the device is missing.
    """
    from transformers import AutoConfig
    from transformers.utils import logging as transformers_logging

    source, where, kind = resolve_model(name), resolve_device(device), resolve_dtype(dtype)
    transformers_logging.disable_progress_bar()
    try:
        loaded: Any = auto_class(AutoConfig.from_pretrained(source)).from_pretrained(
            source, dtype=kind, output_loading_info=True, ignore_mismatched_sizes=True
        )
    except Exception as error:  # a folder that is no model makes transformers raise whatever it comes across
        raise UserError(f"the model {name!r} cannot be loaded: {_first_line(error)}") from error
    model, report = loaded
    # transformers only warns of either, and fills in random numbers.
    missing = sorted(report["missing_keys"])
    if missing:
        raise UserError(f"the model {name!r} lacks {len(missing)} of its tensors: {', '.join(missing[:3])} ...")
    for key, found, wanted in sorted(report["mismatched_keys"]):
        raise UserError(
            f"the model {name!r} is damaged: {key} is {tuple(found)}, its config.json says {tuple(wanted)}."
        )
    nn.Module.to(model, where).eval()
    if tokenizer is None:
        tokenizer = load_tokenizer(source)
    return Base(model, tokenizer, describe(model), name)


def _first_line(error: BaseException) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()] or [type(error).__name__]
    # A line that ends with a colon says nothing without the next.
    return " ".join(lines[:2]) if lines[0].endswith(":") else lines[0]
