"""Models that ask transformers' ``AttentionInterface`` for their attention: they are given ours."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from weft.core.attention import attend
from weft.core.route import Router
from weft.errors import UserError

NAME = "weft"
ROUTER = "_weft_router"
CAUSAL = "_weft_causal"
_LAYER = "_weft_layer"


def weft_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stream attention in the interface's shape: query [1, heads, N, head_dim] -> ([1, N, heads, head_dim], None)."""
    if kwargs.get("s_aux") is not None:
        raise UserError("attention sinks (s_aux) are not implemented in the packed stream; use padded=True.")
    router: Router = module.__dict__[ROUTER]
    # Asked each time: LLaMA-Pro's copies of a block have numbers of their own.
    layer: int = module.__dict__.get(_LAYER, getattr(module, "layer_idx", None))
    bias: dict[str, Any] = {}
    if sliding_window is not None:
        bias["sliding_window"] = sliding_window
    if softcap is not None:
        bias["softcap"] = softcap
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal: bool = module.__dict__[CAUSAL]
    return attend(router, layer, query[0], key[0], value[0], scale=scale, causal=causal, **bias)[None], None


def _no_mask(*args: Any, **kwargs: Any) -> None:
    return None


AttentionInterface.register(NAME, weft_attention)
AttentionMaskInterface.register(NAME, _no_mask)


def install_interface(model: nn.Module, router: Router, *, causal: bool = True) -> Callable[[], None]:
    """Let every attention module of ``model`` attend along the stream that ``router`` describes."""
    attentions = [m for m in model.modules() if "attention" in type(m).__name__.lower()]
    configs: dict[int, Any] = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = {key: config._attn_implementation for key, config in configs.items()}
    for number, module in enumerate(attentions):
        # DistilBERT's do not know which layer they are in; there is one in each.
        module.__dict__ |= {ROUTER: router, CAUSAL: causal}
        if getattr(module, "layer_idx", None) is None:
            module.__dict__[_LAYER] = number
    for config in configs.values():
        config._attn_implementation = NAME

    def undo() -> None:
        for module in attentions:
            for mark in (ROUTER, CAUSAL, _LAYER):
                module.__dict__.pop(mark, None)
        for key, config in configs.items():
            config._attn_implementation = before[key]

    return undo


def install_bidirectional(model: nn.Module, router: Router) -> Callable[[], None]:
    """The same for encoders, whose tokens see the whole sequence."""
    return install_interface(model, router, causal=False)
