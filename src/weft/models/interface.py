"""Our attention for models that ask transformers' ``AttentionInterface`` for theirs."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface

from weft.core.route import Router
from weft.errors import UserError
from weft.layouts.attention import attend

NAME = "weft"
ROUTER = "_weft_router"
CAUSAL = "_weft_causal"
_LAYER = "_weft_layer"


class Band:
    """A stand-in for a mask: every token sees the ``window`` last ones, itself among them.

    Models pass it on from the making of masks to attention. Cutting it to some keys does not change it.
    """

    def __init__(self, window: int) -> None:
        self.window = window

    def __getitem__(self, key: object) -> Band:
        return self


def weft_attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: object = None,
    scaling: float | None = None,
    dropout: float = 0.0,
    softcap: float | None = None,
    **kwargs: Any,
) -> tuple[Tensor, None]:
    """Stream attention in the interface's shape: query [1, heads, N, head_dim] -> ([1, N, heads, head_dim], None).

    The window is the mask's, not the argument ``sliding_window``, which only some of transformers' own attentions read.

    Raises:
        UserError: The module asks for something that the stream does not do.
    """
    router: Router | None = module.__dict__.get(ROUTER)
    unknown = sorted(name for name, given in kwargs.items() if given is not None and name not in _HARMLESS)
    if router is None or unknown or not (attention_mask is None or isinstance(attention_mask, Band)):
        what = ", ".join(unknown) or ("a mask of its own" if router is not None else "no place in the stream")
        raise UserError(f"the attention {type(module).__name__} comes with {what}; use padded=True.")
    # Read at every call, because LLaMA-Pro's copies of a block have numbers of their own.
    layer: Any = module.__dict__.get(_LAYER, getattr(module, "layer_idx", None))
    bias: dict[str, object] = {}
    if attention_mask is not None:
        bias["sliding_window"] = attention_mask.window
    if softcap is not None:
        bias["softcap"] = softcap
    if kwargs.get("s_aux") is not None:
        bias["sinks"] = kwargs["s_aux"].flatten()
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    causal: bool = module.__dict__[CAUSAL]
    return attend(router, layer, query[0], key[0], value[0], scale=scale, causal=causal, **bias)[None], None


# Arguments that do not change the output, or that the stream knows. A model with any other one cannot use the stream:
# keys that an indexer has chosen (``indices``), biases by position, masks of blocks.
_HARMLESS = {
    "cache_position", "cu_seq_lens_k", "cu_seq_lens_q", "is_causal", "max_length_k", "max_length_q",
    "num_items_in_batch", "output_attentions", "output_hidden_states", "output_router_logits", "position_embeddings",
    "position_ids", "return_dict", "s_aux", "sliding_window", "use_cache",
}  # fmt: skip


def _band_or_none(*args: object, local_size: int | None = None, config: object = None, **kwargs: object) -> Band | None:
    """The stand-in for a mask. It is None where there is no window: the stream keeps its sequences apart and is causal
    by itself.

    Raises:
        UserError: The mask is neither causal nor a sliding window (chunks, blocks that see each other).
    """
    if kwargs.get("use_vmap") or (local_size is not None and local_size != getattr(config, "sliding_window", None)):
        raise UserError("attention in chunks, or under a mask of the model's own, does not run in the packed stream.")
    return None if local_size is None else Band(local_size)


AttentionInterface.register(NAME, weft_attention)
AttentionMaskInterface.register(NAME, _band_or_none)


def install_interface(model: nn.Module, router: Router, *, causal: bool = True) -> Callable[[], None]:
    """Let every attention module of ``model`` attend along the stream that ``router`` describes."""
    modules = list(model.modules())
    # DistilBERT's modules do not know their layer; there is one in each.
    unnumbered = [m for m in modules if "attention" in type(m).__name__.lower()]
    for number, module in enumerate(unnumbered):
        if getattr(module, "layer_idx", None) is None:
            module.__dict__[_LAYER] = number
    for module in modules:
        module.__dict__ |= {ROUTER: router, CAUSAL: causal}
    configs: dict[int, Any] = {id(m.config): m.config for m in modules if hasattr(m, "config")}
    before = {
        k: config._attn_implementation for k, config in configs.items() if hasattr(config, "_attn_implementation")
    }
    for key in before:
        configs[key]._attn_implementation = NAME

    def undo() -> None:
        for module in modules:
            for mark in (ROUTER, CAUSAL, _LAYER):
                module.__dict__.pop(mark, None)
        for key, implementation in before.items():
            configs[key]._attn_implementation = implementation

    return undo


def install_bidirectional(model: nn.Module, router: Router) -> Callable[[], None]:
    """``install_interface`` for encoders, whose tokens see the whole sequence."""
    return install_interface(model, router, causal=False)
