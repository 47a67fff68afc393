"""What is checked of an adapter as soon as it is added: what costs little and would else be wrong without a word.

``weft.models.attached`` proves more, when a run is prepared.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.core.site import plain_class, without_sites
from weft.core.stream import Part
from weft.errors import UserError

if TYPE_CHECKING:
    from weft.core.adapters import Adapters

_TEXT = [1, 2, 3, 1]
# Units of the last place of the largest hidden state.
_UNITS = 64


@torch.no_grad()
def check_added(adapters: Adapters, name: str, *, fresh: bool) -> None:
    """Check adapter ``name``; ``fresh``: its values are those it begins with, and not to be loaded yet.

    Raises:
        UserError: it would not begin as it promises, or would change the plain base's rows beside it.
    """
    adapter, shape = adapters[name], adapters.architecture
    if adapters.device.type == "meta":
        return
    if shape.by_ids and adapter.num_virtual_tokens:
        raise UserError(
            f"{adapter.config.method}: this {shape.model_type} model also looks its tokens up by id inside (scaled "
            "embeddings, or inputs per layer), and a virtual token has no id. Take another method (prefix_tuning or "
            "lora, for one)."
        )
    if fresh and adapter.inserted_blocks():
        _check_inserted(adapters, name)
    if fresh and adapter.num_prefix_tokens and adapters.layout.masks_prefixes:
        _check_beside(adapters, name)


@torch.no_grad()
def check_numbers(adapters: Adapters) -> None:
    """Whether blocks may get other numbers, as they do when new ones are merged in between.

    Raises:
        UserError: what a block computes depends on its number (a scale by layer, for one).
    """
    model, shape = adapters.model, adapters.architecture

    def settings(path: str, of: Any = model) -> list[Any]:
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


def _counts_blocks(model: Any, settings: Callable[..., list[Any]], block: str) -> bool:
    """Whether a block of a model with one block more has other settings: some scale by how many there are."""
    config = copy.deepcopy(model.config)
    text = config.get_text_config()
    text.num_hidden_layers += 1
    for name in ("layer_types", "mlp_layer_types"):
        if isinstance(types := getattr(text, name, None), list):
            setattr(text, name, [*types, types[-1]])
    try:
        with torch.device("meta"):
            longer = type(model)(config)
    except Exception:  # a configuration with another list per layer: the merged folder's own proof sees the rest
        return False
    return settings(block, longer) != settings(block)


def _near(hidden: Tensor) -> Tensor:
    # transformers computes softmax and ALiBi of a float64 model in float32.
    return _UNITS * max(torch.finfo(hidden.dtype).eps, torch.finfo(torch.float32).eps) * hidden.abs().max()


def _check_inserted(adapters: Adapters, name: str) -> None:
    """New blocks are the identity, as zeros in their last linears promise."""
    before, after = (adapters.forward(adapters.stream([Part(who, [_TEXT])])) for who in (None, name))
    if not adapters[name].begins_as_identity or bool(((after - before)[-len(_TEXT) :].abs() <= _near(before)).all()):
        return
    path, config = next(iter(adapters[name].inserted_blocks())), adapters[name].config
    raise UserError(
        f"{config.method}: a copy of block '{path}' ({plain_class(adapters.model.get_submodule(path)).__name__}) with "
        f"zeros in its last linears is not the identity on this {adapters.architecture.model_type} model, so the "
        "adapter would not begin as the base. Take another method (bottleneck, for one)."
    )


def _check_beside(adapters: Adapters, name: str) -> None:
    """In a padded batch learned keys of some rows are masked for the others; not every model heeds the mask there."""
    parts: list[Any] = [Part(name, [_TEXT]), Part(None, [_TEXT])]
    try:
        with without_sites(adapters.model):
            alone = adapters.forward(adapters.stream(parts[1:]))
        beside = adapters.forward(adapters.stream(parts))[-len(_TEXT) :]
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{adapters[name].config.method}: this {adapters.architecture.model_type} model cannot attend to keys that "
            f"stand before a text ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Take "
            "another method."
        ) from error
    if not bool(((beside - alone).abs() <= _near(alone)).all()):
        raise UserError(
            f"{adapters[name].config.method}: the learned keys change the rows of the plain base beside them on this "
            f"{adapters.architecture.model_type} model. Take another method."
        )
