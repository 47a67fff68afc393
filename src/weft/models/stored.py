"""Checkpoints whose weights are quantised already: what their config.json says, and what is asked of the loader."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, get_args

import torch
from torch import nn

from weft.errors import UserError
from weft.models.quantize import Quantization, StoredKind
from weft.models.quantizers import packed_entries

if TYPE_CHECKING:
    from transformers import PreTrainedConfig


def stored_quantization(config: PreTrainedConfig) -> Quantization | None:
    """How the weights of a checkpoint are kept, as far as its configuration says; None: they are plain."""
    found = _entries(config)
    if found is None:
        return None
    if found.get("quant_method") in get_args(StoredKind):
        return Quantization(found["quant_method"])
    if found.get("load_in_8bit"):
        return Quantization("int8")
    computes = str(found.get("bnb_4bit_compute_dtype") or "float32").removeprefix("torch.")
    return Quantization(
        found.get("bnb_4bit_quant_type", "fp4"),
        double=bool(found.get("bnb_4bit_use_double_quant")),
        compute_dtype=computes,
    )


def loading_options(
    config: PreTrainedConfig, asked: Quantization | None, dtype: torch.dtype | str, where: torch.device
) -> tuple[torch.dtype | str, dict[str, Any]]:
    """The dtype and the further options with which transformers loads a model; this may change ``config``.

    Raises:
        UserError: The checkpoint is quantised otherwise than asked, or bitsandbytes is not installed.
    """
    stored = stored_quantization(config)
    if stored is None and asked is None:
        return dtype, {}
    place = {"device_map": {"": where}}
    if stored is None and asked is not None:
        if asked.kind in get_args(StoredKind):
            raise UserError(f"the base of the training was quantised by {asked.kind}, and this one is not quantised.")
        dtype = dtype if isinstance(dtype, torch.dtype) else torch.bfloat16
        return dtype, {"quantization_config": asked.config(dtype), **place}
    assert stored is not None
    # That the scales are quantised too is what nobody says, and what adapters of before there was a choice do not say.
    if asked is not None and (asked.kind != stored.kind or (stored.double and not asked.double)):
        raise UserError(
            f"its weights are quantised already ({_told(stored)}), and asked for is {_told(asked)}. Leave quantization "
            "out, or take the model from before it was quantised."
        )
    if stored.kind in get_args(StoredKind):
        config.quantization_config = packed_entries(_entries(config))  # type: ignore[arg-type]
        return dtype, place
    stored.config(torch.float32)  # a plain line if bitsandbytes is missing
    computes = asked.compute_dtype if asked is not None else None
    if computes is None and isinstance(dtype, torch.dtype):
        computes = str(dtype).removeprefix("torch.")
    if computes is not None and stored.kind != "int8":
        config.quantization_config = {**_entries(config), "bnb_4bit_compute_dtype": computes}  # type: ignore[dict-item]
    return dtype, place


def check_blocks(model: nn.Module, name: str, asked: Quantization | None) -> None:
    """Refuse blocks of another size than asked: only the loaded tensors say it.

    Raises:
        UserError: They have another size.
    """
    sizes = {state.blocksize for p in model.parameters() if (state := getattr(p, "quant_state", None)) is not None}
    if asked is not None and sizes - {asked.block_size}:
        raise UserError(
            f"the model {name!r} is quantised already in blocks of {min(sizes)}, and quantization_block_size is "
            f"{asked.block_size}. Leave it out, or take the model from before it was quantised."
        )


def was_stored(model: nn.Module) -> bool:
    """Whether a loaded model's checkpoint was quantised."""
    return bool(getattr(getattr(model, "hf_quantizer", None), "pre_quantized", False))


def _entries(config: PreTrainedConfig) -> dict[str, Any] | None:
    found = getattr(config, "quantization_config", None)
    if found is None:
        return None
    return dict(found) if isinstance(found, Mapping) else dict(found.to_dict())


def _told(one: Quantization) -> str:
    """What the configuration of a checkpoint says of it."""
    double = f", double quantization {'on' if one.double else 'off'}" if one.kind in ("nf4", "fp4") else ""
    return f"{one.kind}{double}"
