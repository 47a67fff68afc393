"""BLOOM does not use the attention interface. Its attention modules are swapped for one that attends along the stream,
with ALiBi (Press et al. 2021) from the start of each sequence."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from transformers.models.bloom.modeling_bloom import BloomAttention

from weft.base.embeddings import config_of
from weft.core.route import Router
from weft.layouts.attention import attend
from weft.models.interface import NAME, ROUTER


def alibi_slopes(heads: int) -> Tensor:
    """One slope per head, [heads] float32: powers of 2^(-8/n) for n heads a power of two, else interleaved with the odd
    powers of the next one."""
    power = 1 << (heads.bit_length() - 1)
    slopes = [2.0 ** (-8.0 * (i + 1) / power) for i in range(power)]
    slopes += [2.0 ** (-4.0 * (2 * i + 1) / power) for i in range(heads - power)]
    return torch.tensor(slopes)


class StreamBloomAttention(BloomAttention):
    """BLOOM's attention over [1, N, d]; the residual is added inside, as in the original."""

    def forward(  # type: ignore[override]
        self, hidden_states: Tensor, residual: Tensor, **kwargs: object
    ) -> tuple[Tensor, None]:
        """Attention's output [1, N, d] plus ``residual``, of hidden states [1, N, d]."""
        fused = self.query_key_value(hidden_states)[0]
        q, k, v = fused.view(-1, self.num_heads, 3, self.head_dim).permute(2, 1, 0, 3)
        out = attend(
            self.__dict__[ROUTER],
            int(self.layer_idx or 0),
            q,
            k,
            v,
            scale=self.inv_norm_factor,
            alibi_slopes=alibi_slopes(self.num_heads).to(q.device),
        )
        return residual + self.dense(out.reshape(1, -1, self.hidden_size)), None


def install_bloom(model: nn.Module, router: Router) -> Callable[[], None]:
    """Swap every attention module; returns the function that swaps back."""
    attentions = [m for m in model.modules() if type(m) is BloomAttention]
    config = config_of(model)
    before = config._attn_implementation
    # BLOOM asks the mask interface, not the attention interface. This keeps it from making an [N, N] mask.
    config._attn_implementation = NAME
    for module in attentions:
        module.__dict__[ROUTER] = router
        module.__class__ = StreamBloomAttention

    def undo() -> None:
        config._attn_implementation = before
        for module in attentions:
            module.__dict__.pop(ROUTER, None)
            module.__class__ = BloomAttention

    return undo
