"""The check of a model between whose blocks a merge puts new ones, so that the others get other numbers."""

from __future__ import annotations

import copy
from collections.abc import Callable

import torch
from torch import nn

from weft.base.embeddings import config_of
from weft.core.adapters import Adapters
from weft.core.stream import Part
from weft.errors import UserError

_TEXT = [1, 2, 3, 1]


@torch.no_grad()
def check_numbers(adapters: Adapters) -> None:
    """Refuse a model whose blocks cannot get other numbers, as they do when new ones are merged in between.

    Raises:
        UserError: A block's results depend on its number (GPT-2's scale by layer, DiffLlama's lambda).
    """
    model, shape = adapters.model, adapters.architecture

    def settings(path: str, of: nn.Module = model) -> list[object]:
        return [{k: v for k, v in vars(m).items() if type(v) is float} for m in of.get_submodule(path).modules()]

    numbered = [m for m in model.modules() if type(vars(m).get("layer_idx")) is int]
    before = adapters.forward(adapters.stream([Part(None, [_TEXT])]))
    for module in numbered:
        module.__dict__["layer_idx"] += 1
    try:
        after = adapters.forward(adapters.stream([Part(None, [_TEXT])]))
    finally:
        for module in numbered:
            module.__dict__["layer_idx"] -= 1
    counts = _counts_blocks(model, settings, shape.blocks[0]) or any(
        settings(path) != settings(shape.blocks[0]) for path in shape.blocks
    )
    if counts or not torch.equal(before, after):
        raise UserError(
            f"this adapter's blocks cannot be merged: what a block of a {shape.model_type} model computes depends on "
            "its number or on how many there are, and new ones change both. Serve the adapter beside its base instead "
            "(weft chat, weft generate)."
        )


def _counts_blocks(model: nn.Module, settings: Callable[..., list[object]], block: str) -> bool:
    """Whether a block has other settings in a model with one more block: MiniCPM scales by the number of blocks."""
    config = copy.deepcopy(config_of(model))
    text = config.get_text_config()
    text.num_hidden_layers += 1
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(types := getattr(text, name, None), list):
            setattr(text, name, [*types, types[-1]])
    try:
        with torch.device("meta"):
            longer = type(model)(config)
    except Exception:  # a configuration may have another list per layer; the merged folder's own proof sees the rest
        return False
    return settings(block, longer) != settings(block)
