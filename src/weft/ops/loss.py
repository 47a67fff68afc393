"""Cross-entropy of a language-model head, never holding more than a chunk of the logits.

With h [S, d] the hidden states at the supervised positions, W [V, d] the head and t [S] the targets,

    z = logit_scale * (h W^T + b),   z <- c * tanh(z / c),   loss_i = logsumexp(z_i) - z_i[t_i],
    u_i = d loss_i / d h_i = ((softmax(z_i) - onehot(t_i)) * (1 - tanh^2) * logit_scale) W.

A frozen head needs only u for the backward pass, and u can be computed while the chunk's logits are at hand. That costs
two matrix products per chunk in the forward pass and none in the backward (recomputing the logits would make it three).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from weft.ops.autograd import Context
from weft.ops.products import add_product_, in_pieces, multiply

LOGIT_BYTES = 64 * 2**20  # default size of a chunk's logits in fp32; 524 tokens of a 32,000-word vocabulary


@dataclass(frozen=True)
class HeadForm:
    """Logits are ``c tanh(s (W h + b) / c)``: ``scale`` s and ``softcap`` c (None: no cap), W the output layer."""

    scale: float = 1.0
    softcap: float | None = None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, head: HeadForm) -> tuple[Tensor, Tensor | None]:
    """Logits [C, V] in fp32 (fp64 for fp64) and, with a softcap, tanh(z / c)."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    if in_pieces(hidden, weight.t()):
        z = multiply(hidden, weight.t(), wide)
        z = z if bias is None else z.add_(bias)
    else:
        z = torch.nn.functional.linear(hidden, weight, bias).to(wide)
    if head.scale != 1.0:
        z = z * head.scale
    if head.softcap is None:
        return z, None
    tanh = (z / head.softcap).tanh_()
    return tanh * head.softcap, tanh


def _dlogits(log_p: Tensor, targets: Tensor, tanh: Tensor | None, head: HeadForm) -> Tensor:
    """d loss / d (h W^T + b) [C, V]; overwrites log_p."""
    g = log_p.exp_()
    g.scatter_add_(1, targets[:, None], g.new_full((1, 1), -1.0).expand(len(g), 1))
    if tanh is not None:
        g.mul_(1 - tanh * tanh)
    return g if head.scale == 1.0 else g.mul_(head.scale)


class _FrozenHead(torch.autograd.Function):
    """A head that is not trained. It keeps u [S, d] alone."""

    @staticmethod
    def forward(
        ctx: Context,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: HeadForm,
        chunk: int,
        want_u: bool,
    ) -> Tensor:
        losses = []
        u = torch.empty_like(hidden) if want_u else None
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            z, tanh = _logits(hidden[part], weight, bias, head)
            log_p = z.log_softmax(-1)
            del z
            losses.append(-log_p.gather(1, targets[part, None])[:, 0])
            if u is not None:
                add_product_(u[part], _dlogits(log_p, targets[part], tanh, head).to(weight.dtype), weight, beta=0)
        if u is not None:
            ctx.save_for_backward(u)
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: Context, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        (u,) = ctx.saved_tensors
        return (d_loss[:, None] * u).to(u.dtype), None, None, None, None, None, None


class _TrainedContext(Context, Protocol):
    head: HeadForm
    chunk: int


class _TrainedHead(torch.autograd.Function):
    """A head whose weight or bias is trained. The backward pass computes each chunk's logits again."""

    @staticmethod
    def forward(
        ctx: _TrainedContext,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        head: HeadForm,
        chunk: int,
    ) -> Tensor:
        ctx.save_for_backward(hidden, weight, bias, targets)
        ctx.head, ctx.chunk = head, chunk
        losses = []
        for start in range(0, len(hidden), chunk):
            part = slice(start, start + chunk)
            log_p = _logits(hidden[part], weight, bias, head)[0].log_softmax(-1)
            losses.append(-log_p.gather(1, targets[part, None])[:, 0])
        return torch.cat(losses)

    @staticmethod
    @once_differentiable
    def backward(ctx: _TrainedContext, d_loss: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        need_h, need_w, need_b = ctx.needs_input_grad[:3]
        wide = torch.promote_types(weight.dtype, torch.float32)
        d_hidden = torch.empty_like(hidden) if need_h else None
        d_weight = torch.zeros_like(weight, dtype=wide) if need_w else None  # summed over chunks, so in fp32
        d_bias = torch.zeros_like(bias, dtype=wide) if need_b else None
        for start in range(0, len(hidden), ctx.chunk):
            part = slice(start, start + ctx.chunk)
            z, tanh = _logits(hidden[part], weight, bias, ctx.head)
            g = _dlogits(z.log_softmax(-1), targets[part], tanh, ctx.head).mul_(d_loss[part, None])
            if d_bias is not None:
                d_bias += g.sum(0)
            g = g.to(weight.dtype)
            if d_hidden is not None:
                add_product_(d_hidden[part], g, weight, beta=0)
            if d_weight is not None:
                d_weight += multiply(g.t(), hidden[part])
        d_weight = None if d_weight is None else d_weight.to(weight.dtype)
        d_bias = None if d_bias is None else d_bias.to(bias.dtype)
        return d_hidden, d_weight, d_bias, None, None, None


def linear_cross_entropy(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """Loss of each token, [S] in fp32 (fp64 for fp64).

    Gradients flow, once, to hidden and, where they are asked for, to weight and bias.

    Args:
        hidden: [S, d]. Every row counts: drop unsupervised positions before the call.
        weight: [V, d], in hidden's dtype.
        targets: [S] int64.
        bias: [V].
        chunk_tokens: The rows of logits that exist at a time (default: ``LOGIT_BYTES`` of them).

    Raises:
        ValueError: Hidden and weight differ in dtype.
    """
    if not hidden.dtype == weight.dtype:
        raise ValueError(f"hidden is {hidden.dtype}, the head {weight.dtype}; cast one of them")
    if len(hidden) == 0:
        return hidden.sum(1, dtype=torch.promote_types(hidden.dtype, torch.float32))  # empty, but still in the graph
    chunk = chunk_tokens or max(32, LOGIT_BYTES // (4 * len(weight)))
    head = HeadForm(float(logit_scale), softcap)
    grad = torch.is_grad_enabled()
    if grad and (weight.requires_grad or (bias is not None and bias.requires_grad)):
        return _TrainedHead.apply(hidden, weight, bias, targets, head, chunk)
    return _FrozenHead.apply(hidden, weight, bias, targets, head, chunk, grad and hidden.requires_grad)


def linear_cross_entropy_ref(
    hidden: Tensor,
    weight: Tensor,
    targets: Tensor,
    *,
    bias: Tensor | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    chunk_tokens: int | None = None,
) -> Tensor:
    """``linear_cross_entropy`` with all [S, V] logits at once, in fp32 (fp64 for fp64) throughout."""
    wide = torch.promote_types(hidden.dtype, torch.float32)
    z = hidden.to(wide) @ weight.to(wide).t()
    if bias is not None:
        z = z + bias.to(wide)
    z = z * logit_scale
    if softcap is not None:
        z = softcap * torch.tanh(z / softcap)
    return torch.logsumexp(z, -1) - z.gather(1, targets[:, None])[:, 0]


def losses_of_logits(logits: Tensor, targets: Tensor) -> Tensor:
    """``-log softmax(logits)[target]`` [n] (float32, or float64 for float64 input) of the logits [n, answers]."""
    wide = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return torch.nn.functional.cross_entropy(wide, targets, reduction="none")
