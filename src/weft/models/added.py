"""The checks of an adapter as soon as it is added: cheap ones, for faults that would else be silent.

``weft.models.attached`` proves more, when a run is prepared.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from weft.core.adapter import Adapter, MethodConfig
from weft.core.adapters import Adapters
from weft.core.site import plain_class, without_sites
from weft.core.stream import Part
from weft.errors import UserError

_TEXT = [1, 2, 3, 1]
# Units of the last place of the largest hidden state.
_UNITS = 64


def check_config(adapters: Adapters, config: MethodConfig) -> None:
    """Refuse what is no configuration of a method, and a method that is not made for the base's task.

    Raises:
        UserError: names the method and what it is made for.
    """
    if not isinstance(config, MethodConfig):
        given = repr(config) if isinstance(config, str) else f"{type(config).__module__}.{type(config).__qualname__}"
        raise UserError(
            f"an adapter is made of one of Weft's configurations, such as weft.LoraConfig(r=8), not {given}."
        )
    shape, tasks = adapters.architecture, adapters.layout.tasks
    for part in config.methods():
        if tasks.isdisjoint(part.tasks):
            raise UserError(
                f"method {part.method} does not work with {shape.model_type}, whose task is {shape.task}; it is made "
                f"for: {', '.join(sorted(part.tasks))}. Take another method (lora, for one) or another base."
            )


@torch.no_grad()
def check_added(adapters: Adapters, adapter: Adapter, *, fresh: bool) -> None:
    """Check an adapter; ``fresh``: its values are those it begins with, and not to be loaded yet.

    Raises:
        UserError: it would not begin as it promises, or would change the plain base's rows beside it.
    """
    shape = adapters.architecture
    if adapters.device.type == "meta":
        return
    if shape.by_ids and adapter.num_virtual_tokens:
        raise UserError(
            f"{adapter.config.method}: this {shape.model_type} model also looks its tokens up by id inside (scaled "
            "embeddings, or inputs per layer), and a virtual token has no id. Take another method (prefix_tuning or "
            "lora, for one)."
        )
    if fresh and adapter.inserted_blocks():
        _check_inserted(adapters, adapter)
    if fresh and adapter.num_prefix_tokens and adapters.layout.masks_prefixes:
        _check_beside(adapters, adapter)


def _run(adapters: Adapters, parts: Sequence[Part]) -> Tensor:
    """Hidden states [N, d] of a small batch."""
    return adapters.forward(adapters.stream(parts))


def _near(hidden: Tensor) -> Tensor:
    # transformers computes softmax and ALiBi of a float64 model in float32.
    return _UNITS * max(torch.finfo(hidden.dtype).eps, torch.finfo(torch.float32).eps) * hidden.abs().max()


def _check_inserted(adapters: Adapters, adapter: Adapter) -> None:
    """Refuse new blocks that are not the identity, as zeros in their last linears promise."""
    before, after = (_run(adapters, [Part(who, [_TEXT])]) for who in (None, adapter.name))
    if not adapter.begins_as_identity or bool(((after - before)[-len(_TEXT) :].abs() <= _near(before)).all()):
        return
    path, model_type = next(iter(adapter.inserted_blocks())), adapters.architecture.model_type
    block = plain_class(adapters.model.get_submodule(path)).__name__
    raise UserError(
        f"{adapter.config.method}: a copy of block '{path}' ({block}) with "
        f"zeros in its last linears is not the identity on this {model_type} model, so the "
        "adapter would not begin as the base. Take another method (bottleneck, for one)."
    )


def _check_beside(adapters: Adapters, adapter: Adapter) -> None:
    """Refuse a model that ignores the mask by which a padded batch hides some rows' learned keys from the others."""
    parts, model_type = [Part(adapter.name, [_TEXT]), Part(None, [_TEXT])], adapters.architecture.model_type
    try:
        with without_sites(adapters.model):
            alone = _run(adapters, parts[1:])
        beside = _run(adapters, parts)[-len(_TEXT) :]
    except (RuntimeError, IndexError, TypeError, ValueError, AttributeError) as error:
        raise UserError(
            f"{adapter.config.method}: this {model_type} model cannot attend to keys that "
            f"stand before a text ({type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}). Take "
            "another method."
        ) from error
    if not bool(((beside - alone).abs() <= _near(alone)).all()):
        raise UserError(
            f"{adapter.config.method}: the learned keys change the rows of the plain base beside them on this "
            f"{model_type} model. Take another method."
        )
