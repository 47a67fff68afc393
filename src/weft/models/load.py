"""Loading a base: an embedded one, a folder, or a hub id."""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from weft.assets import EMBEDDED_MODELS, model_path
from weft.base.mapped import pages_returned
from weft.core.architecture import Architecture
from weft.errors import UserError, nearest, reason_of
from weft.files.whole import temporary_place, writing_temporary
from weft.machine import freed_memory_returned
from weft.models import gate
from weft.models.classes import UnknownTypeError, auto_class, headless, is_encoder, own_class
from weft.models.complete import check_complete
from weft.models.facts import sketch
from weft.models.hub import Hub, fetch_model, folder_of
from weft.models.int8 import without_rounded_inputs
from weft.models.offload import Offload, QuantizedFiles, check_mapped, check_offload, check_weights, stored_dtype
from weft.models.originals import HeldWeights, OriginalWeights
from weft.models.proof import describe
from weft.models.quantize import Kind, Quantization, cast_rest, one_kernel
from weft.models.shapes import random_model, tiny_config, tiny_tokenizer
from weft.models.stored import check_blocks, loading_options, was_stored
from weft.models.token_rows import add_rows, add_tokens, check_special_tokens, token_rows
from weft.ops.four_bit import forget_rooms
from weft.paths import is_hub_id, local_path, names_in

if TYPE_CHECKING:
    from transformers import PreTrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

Shape = Literal["full", "tiny"]

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
    """A loaded base model: the model, its tokenizer, the places of its parts, and its name.

    ``original_weight`` gives the weight [out, in] of the module at a path before quantisation. ``added_ids`` are the
    tokens of ``add_tokens``, whose rows the adapters train.
    """

    model: nn.Module
    tokenizer: PreTrainedTokenizerBase
    architecture: Architecture
    _: KW_ONLY
    name: str
    original_weight: Callable[[str], Tensor] | None = None
    added_ids: tuple[int, ...] = ()

    @property
    def token_rows(self) -> int:
        """The number of tokens that have a row in the embeddings."""
        return token_rows(self.model)


def resolve_model(name: str) -> str:
    """The folder of an embedded model's name, the absolute path of a folder, or a hub id as it is.

    Raises:
        UserError: It looks like a path and does not exist, or the folder holds no model.
    """
    path = local_path(name)
    if name in EMBEDDED_MODELS:
        return str(model_path(name))
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise UserError(f"{path} is a folder without a config.json; a Hugging Face model folder has one.")
        return str(path.resolve())
    if not is_hub_id(name):
        beside = [str(Path(name).parent / one) for one in names_in(path.parent)] if "/" in name else names_in(Path())
        hint = nearest(name, [*EMBEDDED_MODELS, *beside])
        raise UserError(
            f"no model at {name!r}.{hint} A model is a Hugging Face folder, a hub id such as Qwen/Qwen2.5-0.5B, or one "
            f"of the embedded ones: {', '.join(EMBEDDED_MODELS)}."
        )
    return name


def resolve_dtype(name: str) -> torch.dtype | str:
    """``auto`` (the dtype in the checkpoint's config) or a torch dtype.

    Raises:
        UserError: There is no such dtype.
    """
    if name == "auto":
        return "auto"
    if name not in DTYPES:
        raise UserError(f"dtype {name!r} is not known.{nearest(name, DTYPES)} Use auto or one of {', '.join(DTYPES)}.")
    return DTYPES[name]


def check_device(name: str) -> None:
    """Refuse what is no name of a device that Weft runs on; whether it is there shows only with torch.

    Raises:
        UserError: It is none.
    """
    if not re.fullmatch(r"auto|cpu(:0)?|cuda(:\d+)?", name):
        hint = nearest(name, ("auto", "cpu", "cuda"))
        raise UserError(
            f"device {name!r} is not known.{hint} Weft runs on cpu and cuda; use auto, cpu, cuda or cuda:0."
        )


def check_number_format(dtype: torch.dtype, device: torch.device) -> None:
    """Refuse a dtype that the device cannot compute in by itself.

    Raises:
        UserError: It cannot: torch would emulate it, many times as slow, and say nothing.
    """
    if device.type != "cuda" or dtype != torch.bfloat16:
        return
    with torch.cuda.device(device):
        if not torch.cuda.is_bf16_supported(including_emulation=False):
            raise UserError(
                f"the GPU {torch.cuda.get_device_name()} does not compute in bfloat16. Take dtype: float16 or float32, "
                "or device: cpu."
            )


def resolve_device(name: str) -> torch.device:
    """The device of a name; ``auto`` takes a GPU if there is one.

    Raises:
        UserError: The device is unknown or missing; there is no fallback.
    """
    check_device(name)
    if name == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    device = torch.device(name)
    if device.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (device.index or 0) >= count:
            raise UserError(f"device {name!r} is not there: this machine has {count} CUDA device(s). Use device: cpu.")
    return device


def load_tokenizer(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a base (or of a run folder).

    Raises:
        UserError: It cannot be loaded.
    """
    try:
        return gate.load_tokenizer(resolve_model(name) if not Path(name).is_dir() else name)
    except Exception as error:  # as in load_base
        there = not Path(name).is_dir() or (Path(name) / "tokenizer.json").is_file()
        hint = "" if there else " (no tokenizer.json there)"
        raise UserError(f"the tokenizer of {name!r} cannot be loaded{hint}: {reason_of(error)}") from error


def _source(name: str, shape: Shape, hub: Hub) -> str:
    # A tiny base needs no file of a hub.
    return resolve_model(name) if shape == "tiny" else fetch_model(resolve_model(name), hub)


def sketch_base(
    name: str,
    *,
    dtype: str = "auto",
    shape: Shape = "full",
    hub: Hub = "huggingface",
    tokens: Sequence[str] = (),
) -> Base:
    """The base without its weights, all tensors on the meta device: enough to check a configuration against it.

    ``tokens`` are added to the tokenizer, and to the base where it has no rows for them.

    Raises:
        UserError: It does not exist, or its configuration cannot be read.
    """
    source, kind = _source(name, shape, hub), resolve_dtype(dtype)
    tokenizer = tiny_tokenizer(source) if shape == "tiny" else load_tokenizer(source)
    try:
        config = tiny_config(source, tokenizer) if shape == "tiny" else gate.load_config(source)
        if shape == "full":
            gate.check_folder(source, config)
        auto = auto_class(config, name)
        kind = (getattr(config, "dtype", None) or torch.float32) if kind == "auto" else kind
        with torch.device("meta"):
            model = headless(gate.build_model(auto, config, kind))
    except UnknownTypeError:
        raise
    except Exception as error:  # as in load_base
        raise UserError(f"the model {name!r} cannot be loaded: {reason_of(error)}") from error
    added = _add(model, tokenizer, tokens, name)
    return Base(model.eval(), tokenizer, describe(model), name=name, added_ids=added)


def load_base(
    name: str,
    *,
    dtype: str = "auto",
    device: str = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    shape: Shape = "full",
    quantization: Quantization | Kind | None = None,
    hub: Hub = "huggingface",
    tokens: Sequence[str] = (),
    offload_param: Offload | None = None,
) -> Base:
    """Load a base model, in evaluation mode: a decoder with its head, an encoder without.

    ``shape="tiny"`` gives the same architecture shrunk, with random weights. ``quantization`` is that of its linears;
    None: as the checkpoint has them, which may be quantised. ``tokens`` as in ``sketch_base``. With
    ``offload_param="disk"`` the weights stay in their files, mapped; open the base with
    ``Adapters(..., offload_param="disk")``, so that they are read block by block.

    Raises:
        UserError: It does not exist, cannot be read, is quantised otherwise already, the device is missing, or its
            weights cannot stay on the disk.
    """
    kind, where, quantization = resolve_dtype(dtype), resolve_device(device), Quantization.of(quantization)
    if isinstance(kind, torch.dtype):
        check_number_format(kind, where)
    if offload_param is not None:
        check_offload(where, quantization)
    source = _source(name, shape, hub)
    originals: Callable[[str], Tensor] | None = None
    folder: Path | None = None
    if shape == "tiny":
        tokenizer = tokenizer or tiny_tokenizer(source)
        with temporary_place() as made:
            # It goes through a folder, so that it is loaded and quantised like a real one.
            config = tiny_config(source, tokenizer)
            with writing_temporary():
                random_model(auto_class(config, name), config).save_pretrained(made)
            model = _load(name, str(made), kind, where, quantization, offload_param, made)
            originals = HeldWeights(str(made)) if quantization else None
    else:
        model = _load(name, source, kind, where, quantization, offload_param)
        originals = OriginalWeights(source) if quantization and not was_stored(model) else None
        tokenizer = tokenizer or load_tokenizer(source)
        folder = folder_of(source)
    if kind == "auto":
        check_number_format(next(model.parameters()).dtype, where)
    added = _add(model, tokenizer, tokens, name)
    architecture = describe(model, folder)
    if offload_param is not None:
        check_mapped(model, architecture, name, folder)
    return Base(model, tokenizer, architecture, name=name, original_weight=originals, added_ids=added)


def _add(model: nn.Module, tokenizer: PreTrainedTokenizerBase, tokens: Sequence[str], name: str) -> tuple[int, ...]:
    """Add the tokens to both, and check that those that stand in every text have rows; returns their ids."""
    ids = add_tokens(tokenizer, tokens)
    add_rows(model, max(ids, default=-1) + 1)
    check_special_tokens(model, tokenizer, name)
    return ids


def load_plain(
    name: str, *, device: str = "auto", quantization: Kind | None = None
) -> tuple[PreTrainedModel, list[str]]:
    """A model as its own folder describes it, in evaluation mode: with its head, in its dtype, and no adapters.

    Returns:
        The model, and the names of tensors in its files that it has no place for.

    Raises:
        UserError: As ``load_base``.
    """
    source = fetch_model(resolve_model(name))
    model, report = _loaded(name, source, own_class, "auto", resolve_device(device), Quantization.of(quantization))
    check_complete(
        name,
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        mismatched=report["mismatched_keys"],
    )
    _place(model, resolve_device(device))
    return model.eval(), sorted(report["unexpected_keys"])


def _load(
    name: str,
    source: str,
    kind: torch.dtype | str,
    where: torch.device,
    quantization: Quantization | None,
    offload: Offload | None,
    cache: Path | None = None,
) -> nn.Module:
    """``_load_model``, or with ``offload`` a model whose weights are mapped; ``cache`` is for quantised ones."""
    if offload is None:
        return _load_model(name, source, kind, where, quantization)
    folder = folder_of(source)
    if quantization is None:
        if folder is not None:
            check_weights(folder)
        return _load_model(name, source, kind, where, None)
    found = Path(folder_of(source) or source)
    # They are mapped only in the dtype of the files.
    model = _load_model(name, source, stored_dtype(found) or "auto", where, None)
    compute = kind if isinstance(kind, torch.dtype) else torch.bfloat16
    QuantizedFiles.of(found, quantization, compute, cache).quantize(model, sketch(model).blocks, found)
    return model


def _load_model(
    name: str, source: str, kind: torch.dtype | str, where: torch.device, quantization: Quantization | None
) -> nn.Module:
    model, report = _loaded(name, source, auto_class, kind, where, quantization)
    own = set(headless(model).state_dict(keep_vars=True))
    check_complete(
        name,
        missing=report["missing_keys"],
        unexpected=report["unexpected_keys"],
        mismatched=report["mismatched_keys"],
        # What an encoder lacks of a head is of no matter, for the head is removed.
        own=own if is_encoder(model.config) else own | set(report["missing_keys"]),
    )
    # What an adapter's file calls its base: for transformers a hub's model is the folder in which its files lie.
    model.config.name_or_path = resolve_model(name)
    _place(model, where)
    check_blocks(model, name, quantization)
    if was_stored(model) and isinstance(kind, torch.dtype):
        cast_rest(model, kind)  # transformers leaves the rest of such a checkpoint in the dtype of its files
    return model.eval()


def _pages_returned(source: str, options: Mapping[str, Any]) -> contextlib.AbstractContextManager[None]:
    """While tensors are quantised as they are loaded, take their files out of memory."""
    folder = folder_of(source)
    if folder is None or "quantization_config" not in options:
        return contextlib.nullcontext()
    return pages_returned(folder)


def _place(model: nn.Module, where: torch.device) -> None:
    if not getattr(model, "is_quantized", False):
        nn.Module.to(model, where)
    one_kernel(model)
    without_rounded_inputs(model)


def _loaded(
    name: str,
    source: str,
    choose: Callable[[PreTrainedConfig, str], object],
    kind: torch.dtype | str,
    where: torch.device,
    quantization: Quantization | None,
) -> tuple[PreTrainedModel, Mapping[str, Any]]:
    """A model of the class that ``choose`` gives, and transformers' report of its tensors."""
    from transformers.utils import logging as transformers_logging

    transformers_logging.disable_progress_bar()
    verbosity = transformers_logging.get_verbosity()
    try:
        config = gate.load_config(source)
        auto = choose(config, name)
        kind, options = loading_options(config, quantization, kind, where)
        # transformers' own report of missing tensors would name the head that is removed; ours comes later.
        transformers_logging.set_verbosity_error()
        options |= {"dtype": kind, "output_loading_info": True, "ignore_mismatched_sizes": True}
        with freed_memory_returned(), _pages_returned(source, options):
            loaded: Any = gate.load_weights(auto, source, config, **options)
    except UnknownTypeError:
        raise
    except Exception as error:  # transformers raises many kinds for a folder that is no model
        raise UserError(f"the model {name!r} cannot be loaded: {reason_of(error)}") from error
    finally:
        transformers_logging.set_verbosity(verbosity)
        forget_rooms()
    model, report = loaded
    return model, report


