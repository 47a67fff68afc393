"""The only door to transformers' loaders, after a check of a folder's files.

A model's files are data to Weft. To transformers they also name code to import (``auto_map``, ``tokenizer_class``),
kernels to fetch and run (``attn_implementation``), packages to load (``quantization_config``), other files to open
(``weight_map``, ``vocab_file``) and sizes to allocate. So every call of ``from_pretrained`` and ``from_config`` stands
here (a test checks that), passes ``trust_remote_code=False`` (else transformers asks on stdin), and comes after the
checks of ``weft.models.vetting``.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.errors import UserError
from weft.foreign import check_json, check_regular
from weft.models.intact import check_whole
from weft.models.originals import INDEX, WEIGHTS, weight_map
from weft.models.vetting import (
    bits_of,
    check_budget,
    check_config,
    check_generation,
    check_layers,
    check_tokenizer,
    check_tokenizer_json,
    no_implementation,
)

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

# The endings of files of weights that are pickles, or run code in other ways.
PICKLES = (".bin", ".pt", ".pth", ".ckpt", ".pkl")
_TOKENIZER_CHECKS: dict[str, Callable[[Path], object]] = {
    "config.json": check_config,
    "tokenizer_config.json": check_tokenizer,
    **dict.fromkeys(("vocab.json", "added_tokens.json", "special_tokens_map.json"), check_json),
    "tokenizer.json": check_tokenizer_json,
}
_CHAT_TEMPLATES = "additional_chat_templates"


@contextmanager
def no_questions() -> Iterator[None]:
    """Inside, every question that transformers would ask on stdin is answered with no, also deep in its loaders."""
    from transformers import dynamic_module_utils

    dynamic: Any = dynamic_module_utils
    before = getattr(dynamic, "TIME_OUT_REMOTE_CODE", None)
    dynamic.TIME_OUT_REMOTE_CODE = 0  # its own switch for machines without a person
    try:
        yield
    finally:
        dynamic.TIME_OUT_REMOTE_CODE = before


def load_config(source: str | Path, *, local_files_only: bool = False) -> PreTrainedConfig:
    """transformers' configuration of the model in a folder, or under a hub's id.

    Raises:
        UserError: It asks for something that Weft does not do for a file.
        Exception: transformers' own, for a folder that is no model.
    """
    from transformers import AutoConfig

    path = _file(source, "config.json", local_files_only)
    if path is not None:
        check_config(path)
    with no_questions():
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, local_files_only=local_files_only)
    no_implementation(config)
    return config


def load_tokenizer(source: str | Path, *, local_files_only: bool = False) -> PreTrainedTokenizerBase:
    """transformers' tokenizer in a folder, or under a hub's id. It raises as ``load_config`` does."""
    from transformers import AutoTokenizer

    for name, check in _TOKENIZER_CHECKS.items():
        path = _file(source, name, local_files_only)
        if path is not None:
            check(path)
    if Path(source).is_dir():
        _check_files(Path(source))
    with no_questions():
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False, local_files_only=local_files_only)


def load_weights(auto: Any, source: str | Path, config: PreTrainedConfig, **options: Any) -> PreTrainedModel:
    """``auto.from_pretrained`` of safetensors only, after a comparison of the files with the configuration."""
    if Path(source).is_dir():
        stored, tensors = _check_weights(Path(source))
        _check_files(Path(source))
        check_layers(config, tensors, f"{source}/config.json")
        check_budget(empty_model(auto, config), stored, f"{source}/config.json", bits_of(config))
    path = _file(source, "generation_config.json", False)
    if path is not None:
        check_generation(path)
    with no_questions():
        return auto.from_pretrained(source, config=config, trust_remote_code=False, use_safetensors=True, **options)


def load_gguf(path: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model of a GGUF file in 32 bits, and its tokenizer.

    Raises:
        Exception: transformers' own, for a file that it does not read.
    """
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder, name = path.parent, path.name
    with no_questions():
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=torch.float32, trust_remote_code=False, local_files_only=True
        )
        tokenizer = AutoTokenizer.from_pretrained(
            folder, gguf_file=name, trust_remote_code=False, local_files_only=True
        )
    return model.eval(), tokenizer


def check_folder(source: str | Path, config: PreTrainedConfig) -> None:
    """Refuse early, for a folder with its weights in it, some of what ``load_weights`` refuses."""
    folder = Path(source)
    if folder.is_dir() and any((folder / name).exists() for name in (WEIGHTS, INDEX)):
        check_layers(config, _check_weights(folder)[1], f"{source}/config.json")


def build_model(auto: Any, config: PreTrainedConfig, dtype: Any) -> PreTrainedModel:
    """A model of that configuration, with random weights (none on the meta device); ``auto`` may be its own class."""
    with no_questions():
        if not hasattr(auto, "from_config"):
            return auto._from_config(config, dtype=dtype)
        return auto.from_config(config, dtype=dtype, trust_remote_code=False)


def empty_model(auto: Any, config: PreTrainedConfig) -> PreTrainedModel:
    """The model on the meta device: its shapes alone."""
    import copy

    import torch

    with torch.device("meta"):
        return build_model(auto, copy.deepcopy(config), torch.float32)


def _file(source: str | Path, name: str, local_files_only: bool) -> Path | None:
    """The path of a file of a folder or of a hub's id; None if there is none (or the hub does not say)."""
    if Path(source).is_dir():
        path = Path(source) / name
        return path if os.path.lexists(path) else None
    from transformers.utils import cached_file

    try:
        found = cached_file(str(source), name, local_files_only=local_files_only,
                            _raise_exceptions_for_missing_entries=False)  # fmt: skip
    except Exception:  # the hub's client raises many kinds; the loader then meets the same error and reports it
        return None
    return None if found is None else Path(found)


def _check_files(folder: Path) -> None:
    """Check the files that transformers opens beside the two configurations."""
    beside = [folder / "chat_template.jinja", folder / "chat_template.json", *folder.glob("*.model")]
    if (folder / _CHAT_TEMPLATES).is_dir():
        beside += (folder / _CHAT_TEMPLATES).glob("*.jinja")
    for path in beside:
        if os.path.lexists(path):
            check_regular(path)


def _check_weights(folder: Path) -> tuple[int, int]:
    """The numbers of bytes and tensors in a model's files of weights.

    Raises:
        UserError: They are pickles, or a file of safetensors cannot be one.
    """
    if (folder / "adapter_config.json").exists():
        raise UserError(
            f"{folder} holds an adapter (adapter_config.json) beside the files of a model, and would be loaded with it "
            "or without it depending on what is installed. Move the adapter's files into a folder of their own."
        )
    index, one = folder / INDEX, folder / WEIGHTS
    if os.path.lexists(one):
        files = {one}
    elif os.path.lexists(index):
        files = {folder / name for name in weight_map(index).values()}
    else:
        pickles = sorted(path.name for path in folder.iterdir() if path.name.endswith(PICKLES))
        if pickles:
            raise UserError(
                f"{folder} keeps its weights in {pickles[0]}, a pickle, which can run code and is never loaded. "
                f"Convert it to safetensors first: weft convert {folder} NEW_FOLDER"
            )
        raise UserError(f"{folder} holds no weights: neither {WEIGHTS} nor {INDEX} is there.")
    tensors = sum(len(check_whole(path)) for path in files)
    return sum(path.stat().st_size for path in files), tensors
