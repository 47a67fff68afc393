"""Attention under a route: per sequence, with the adapter's prefix before it, or as the cache of a text has it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from weft.core.route import Router
from weft.ops.attention import varlen_attention


def attend(
    router: Router, layer: int, q: Tensor, k: Tensor, v: Tensor, *, scale: float, causal: bool = True, **bias: Any
) -> Tensor:
    """Attention of layer ``layer`` for the stream that ``router`` describes.

    Args:
        q: [heads, N, head_dim], positions already applied, as in k.
        k: [kv_heads, N, head_dim].
        v: [kv_heads, N, head_dim]. Values may be narrower than keys (multi-head latent attention).
        causal: False where every token sees its whole sequence (encoders, which never decode).
        bias: ``alibi_slopes``, ``sliding_window``, ``softcap``, ``sinks`` as in ``varlen_attention``.

    Returns:
        [N, heads, head_dim], where head_dim is that of the values.
    """
    if (width := v.shape[-1]) < q.shape[-1]:
        v = functional.pad(v, (0, q.shape[-1] - width))
        return attend(router, layer, q, k, v, scale=scale, causal=causal, **bias)[..., :width].contiguous()
    route = router.current
    if route is None:
        raise RuntimeError(
            "this model carries Weft's attention and was called outside a route; call it through Adapters.forward, or "
            "Adapters.close() to get the plain model back"
        )
    if route.cache is not None and (cached := route.cache.attend(layer, q, k, v, scale=scale, **bias)) is not None:
        return cached
    assert route.layout is not None
    prefix: dict[int, tuple[Tensor, Tensor]] = {
        group: (states[layer][0].to(k.dtype), states[layer][1].to(v.dtype))
        for group, states in route.prefixes.items()
        if layer < len(states)  # an inserted block has no learned keys
    }
    for group, begin, end, seen_from in route.sharing:
        seen = k[:, begin:end], v[:, begin:end]
        learned = prefix.get(seen_from)
        both = seen if learned is None else tuple(torch.cat(pair, 1) for pair in zip(learned, seen, strict=True))
        prefix[group] = both[0], both[1]
    return varlen_attention(q, k, v, route.layout, scale=scale, prefix=prefix, causal=causal, **bias)
