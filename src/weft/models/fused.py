"""Llama's norms, attention and MLP with fewer passes over memory: the same arithmetic, through ``weft.ops.fused``.

The classes of the modules are swapped in place, below the adapters' own swap: a fused norm can be a site, and a fused
attention asks each of its projections what the adapters want there. Outside a route, on a GPU, in exact mode, while
compiling, or where something unusual hangs on a module, every module does what its own class does.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from weft.core.adapter import SiteFunction
from weft.core.attention import attend
from weft.core.route import Route, Router, Segment
from weft.core.site import Site, site_of
from weft.libraries import given_cache
from weft.methods.lora import LoraLinear
from weft.models.interface import install_interface
from weft.ops.fused import Piece, low_rank_linears, rms_norm, rms_norm_ref, rotary, swiglu

_ROUTER = "_weft_fused_router"


def _usable(module: nn.Module, x: Tensor) -> Route | None:
    """The route, if the fused path may be taken for input x."""
    route: Route | None = module.__dict__[_ROUTER].current
    if route is None or route.exact or route.padded or x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return route


class _DoubleNorm:
    """transformers computes even a float64 model's norms in float32: where neighbours change an input's last bit, that
    rounding makes it the eighth digit. Under a route they are computed in float64."""

    def forward(self, hidden_states: Tensor) -> Tensor:
        module: Any = self
        if hidden_states.dtype == torch.float64 and module.__dict__[_ROUTER].current is not None:
            return rms_norm_ref(hidden_states, *self.terms())
        return super().forward(hidden_states)  # type: ignore[misc]

    def terms(self) -> tuple[Tensor, float]:
        """The weight that the normalised rows are multiplied by, and epsilon."""
        module: Any = self
        return module.weight, module.variance_epsilon


class _DoubleGemmaNorm(_DoubleNorm):
    def terms(self) -> tuple[Tensor, float]:
        module: Any = self
        return 1.0 + module.weight, module.eps


class _FusedNorm(_DoubleNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        module: Any = self
        ours = hidden_states.dtype == module.weight.dtype and not module.weight.requires_grad
        if not ours or _usable(module, hidden_states) is None:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, module.weight, module.variance_epsilon)


class _FusedAttention:
    def forward(
        self, hidden_states: Tensor, position_embeddings: Any = None, attention_mask: Any = None, **kwargs: Any
    ) -> Any:
        route = _usable(self, hidden_states)  # type: ignore[arg-type]
        module: Any = self
        if route is None or given_cache(kwargs) is not None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)  # type: ignore[misc]
        cos, sin = (table[0] for table in position_embeddings)
        q, k, v = (
            y.reshape(len(cos), -1, module.head_dim)
            for y in project((module.q_proj, module.k_proj, module.v_proj), hidden_states, route)
        )
        q, k, v = (x.transpose(0, 1) for x in (rotary(q, cos, sin), rotary(k, cos, sin), v))
        # Qwen2 decides by layer; Mistral has one window for all, in its configuration.
        window = getattr(module, "sliding_window", getattr(module.config, "sliding_window", None))
        bias = {} if window is None else {"sliding_window": window}
        out = attend(module.__dict__[_ROUTER], module.layer_idx, q, k, v, scale=module.scaling, **bias)
        return project((module.o_proj,), out.reshape(1, len(cos), -1), route)[0], None


class _FusedMlp:
    def forward(self, x: Tensor) -> Tensor:
        route = _usable(self, x)  # type: ignore[arg-type]
        module: Any = self
        if route is None:
            return super().forward(x)  # type: ignore[misc]
        gate, up = project((module.gate_proj, module.up_proj), x, route)
        # The activation may be a site of some method, or another function than SiLU.
        plain_silu = type(module.act_fn) in (nn.SiLU, SiLUActivation)
        hidden = swiglu(gate, up) if plain_silu else module.act_fn(gate) * up
        return project((module.down_proj,), hidden, route)[0]


def project(modules: Sequence[nn.Module], x: Tensor, route: Route) -> Sequence[Tensor]:
    """What the modules, sites or not, give for the same x [1, N, in]: [1, N, out] each.

    Frozen linears and the LoRA updates on them become one autograd node; other functions of a site follow it.
    """
    sites = [site_of(module) for module in modules]
    if not all(_is_plain(module, site) for module, site in zip(modules, sites, strict=True)):
        return [module(x) for module in modules]
    pieces, factors, begin = [], [], 0
    later: list[dict[int, list[SiteFunction]]] = [{} for _ in modules]
    for index, segment in enumerate(route.segments):
        updates: dict[int, LoraLinear] = {}
        for i, site in enumerate(sites):
            functions = _functions(site, segment)
            if len(functions) == 1 and _is_plain_lora(only := functions[0]) and _draws_nothing(only, segment):
                updates[i] = only
            elif functions:
                later[i][index] = functions
        factors += [factor for lora in updates.values() for factor in (lora.lora_A, lora.lora_B)]
        scalings = tuple(lora.scaling for lora in updates.values())
        pieces.append(Piece(begin, begin + segment.tokens, tuple(updates), scalings))
        begin += segment.tokens
    linears: list[Any] = [(module.weight, module.bias) for module in modules]
    # Not x[0], whose gradient is written into a tensor of zeros.
    ys = (y.unsqueeze(0) for y in low_rank_linears(x.squeeze(0), linears, pieces, factors))
    return [_follow(x, y, todo, route) if todo else y for y, todo in zip(ys, later, strict=True)]


def _functions(site: Site | None, segment: Segment) -> list[SiteFunction]:
    return [] if site is None or segment.adapter is None else site.functions.get(segment.adapter, [])


def _is_plain_lora(function: SiteFunction) -> TypeGuard[LoraLinear]:
    """Not a subclass, which may compute something else."""
    return type(function) is LoraLinear


def _draws_nothing(lora: LoraLinear, segment: Segment) -> bool:
    return lora.dropout == 0.0 or segment.seed is None


def _is_plain(module: nn.Module, site: Site | None) -> bool:
    """A frozen nn.Linear and nothing else."""
    kind = type(module) if site is None else site.base_class
    if site is not None and site.inputs:
        return False
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    hooked = any(hooks) or "forward" in module.__dict__
    return kind is nn.Linear and not hooked and not any(p.requires_grad for p in module.parameters())


def _follow(x: Tensor, y: Tensor, functions: dict[int, list[SiteFunction]], route: Route) -> Tensor:
    """Apply the functions of each segment to its rows."""
    if len(route.segments) == 1:
        xs, ys = [x], [y]
    else:
        xs, ys = list(x.split(route.sizes, 1)), list(y.split(route.sizes, 1))
    for index, todo in functions.items():
        for function in todo:
            ys[index] = function(xs[index], ys[index], route.segments[index])
    return ys[0] if len(ys) == 1 else torch.cat(ys, 1)


# Class of transformers -> what takes its place. Only classes whose forward was compared with ours.
_FAMILIES = ("Llama", "Mistral", "Qwen2")
_FUSED: dict[str, type] = {
    **{f"{family}RMSNorm": _FusedNorm for family in _FAMILIES},
    **{f"{family}Attention": _FusedAttention for family in _FAMILIES},
    **{f"{family}MLP": _FusedMlp for family in _FAMILIES},
    **{f"{family}RMSNorm": _DoubleGemmaNorm for family in ("Gemma", "Gemma2")},
    **{f"{family}RMSNorm": _DoubleNorm for family in ("Qwen3", "Phi3")},
}


@functools.cache
def _fused_class(mixin: type, base_class: type[nn.Module]) -> type[nn.Module]:
    return type(f"Fused{base_class.__name__}", (mixin, base_class), {"__module__": __name__})


def install_fused(model: nn.Module, router: Router) -> Callable[[], None]:
    """``install_interface``, and the fused modules; returns the function that undoes both."""
    undo_attention = install_interface(model, router)
    swapped = []
    for module in model.modules():
        mixin = _FUSED.get(type(module).__name__)
        if mixin is None or "forward" in module.__dict__:
            continue
        swapped.append((module, type(module)))
        module.__dict__[_ROUTER] = router
        kind: type = type(module)
        module.__class__ = _fused_class(mixin, kind)

    def undo() -> None:
        for module, kind in swapped:
            module.__class__ = kind
            del module.__dict__[_ROUTER]
        undo_attention()

    return undo
