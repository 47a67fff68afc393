"""Llama's norms, attention and MLP with fewer passes over memory: the same arithmetic, through ``weft.ops.fused``.

A block is recognised by its parts and by a trial of its results, not by its name (``recognise``). The classes of the
modules are swapped in place, below the adapters' own swap: a fused norm can be a site, and a fused attention applies
the adapters on each of its projections. Outside a route, on a GPU, in exact mode, while compiling, or where something
unusual hangs on a module, every module runs the forward of its own class.
"""

from __future__ import annotations

import inspect
import itertools
from collections.abc import Callable, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn
from transformers.activations import SiLUActivation

from weft.base.mixin import Mixin, mixed
from weft.core.adapter import SiteFunction
from weft.core.route import Route, Router, Segment, StreamRoute
from weft.core.site import Site, plain_class, replace_class, site_of
from weft.layouts.attention import attend
from weft.libraries import given_cache
from weft.methods.lora import LoraLinear
from weft.models.interface import Band, install_interface
from weft.models.products import frozen_weight
from weft.ops.attention import SequenceLayout
from weft.ops.fused import Piece, low_rank_linears, rms_norm, rms_norm_ref, rotary, swiglu
from weft.ops.low_rank_rows import low_rank_rows, rows_in_pieces
from weft.ops.packed import PackedRows
from weft.ops.products import Rows

_ROUTER = "_weft_fused_router"


def _usable(module: nn.Module, x: Tensor) -> Route | None:
    """The route, if the fused path may be taken for input x."""
    route: Route | None = module.__dict__[_ROUTER].current
    if route is None or route.exact or route.padded or x.device.type != "cpu" or torch.compiler.is_compiling():
        return None
    return route


class _DoubleNorm(Mixin):
    """A norm that computes in float64 under a route, for a float64 model.

    transformers computes even such a model's norms in float32: if a neighbour changes an input's last bit, that
    rounding turns it into the eighth digit.
    """

    weight: Tensor

    def forward(self, hidden_states: Tensor) -> Tensor:
        if hidden_states.dtype == torch.float64 and self.__dict__[_ROUTER].current is not None:
            return rms_norm_ref(hidden_states, *self.terms())
        return super().forward(hidden_states)

    def terms(self) -> tuple[Tensor, float]:
        """The weight [d] that multiplies the normalised rows, and epsilon."""
        return self.weight, _epsilon(self)


def _epsilon(norm: nn.Module) -> float:
    return float(getattr(norm, "variance_epsilon" if hasattr(norm, "variance_epsilon") else "eps"))


class _DoubleGemmaNorm(_DoubleNorm):
    def terms(self) -> tuple[Tensor, float]:
        return 1.0 + self.weight, _epsilon(self)


class _FusedNorm(_DoubleNorm):
    def forward(self, hidden_states: Tensor) -> Tensor:
        ours = hidden_states.dtype == self.weight.dtype and not self.weight.requires_grad
        if not ours or _usable(self, hidden_states) is None:
            return super().forward(hidden_states)
        return rms_norm(hidden_states, self.weight, _epsilon(self))


class _FusedAttention(Mixin):
    q_proj: nn.Module
    k_proj: nn.Module
    v_proj: nn.Module
    o_proj: nn.Module
    head_dim: int
    layer_idx: int
    scaling: float

    def forward(
        self,
        hidden_states: Tensor,
        position_embeddings: tuple[Tensor, Tensor] | None = None,
        attention_mask: object = None,
        **kwargs: object,
    ) -> tuple[Tensor, Tensor | None]:
        route = _usable(self, hidden_states)
        if route is None or given_cache(kwargs) is not None:
            return super().forward(hidden_states, position_embeddings, attention_mask, **kwargs)
        assert position_embeddings is not None
        cos, sin = (table[0] for table in position_embeddings)
        q, k, v = (
            y.reshape(len(cos), -1, self.head_dim)
            for y in project((self.q_proj, self.k_proj, self.v_proj), hidden_states, route)
        )
        q, k, v = (x.transpose(0, 1) for x in (rotary(q, cos, sin), rotary(k, cos, sin), v))
        window = attention_mask.window if isinstance(attention_mask, Band) else None
        router = self.__dict__[_ROUTER]
        out = attend(router, self.layer_idx, q, k, v, scale=self.scaling, sliding_window=window)
        return project((self.o_proj,), out.reshape(1, len(cos), -1), route)[0], None


class _FusedMlp(Mixin):
    gate_proj: nn.Module
    up_proj: nn.Module
    down_proj: nn.Module
    act_fn: nn.Module

    def forward(self, x: Tensor) -> Tensor:
        route = _usable(self, x)
        # Beside experts it gets [N, d]; an expert gets some rows only.
        rows = x.unsqueeze(0) if x.dim() == 2 else x
        if route is None or rows.shape[:-1] != (1, sum(route.sizes)):
            return super().forward(x)
        gate, up = project((self.gate_proj, self.up_proj), rows, route)
        # The activation may be a site of some method, or another function than SiLU.
        plain_silu = type(self.act_fn) in (nn.SiLU, SiLUActivation) and not _hooked(self.act_fn)
        hidden = swiglu(gate, up) if plain_silu else self.act_fn(gate) * up
        return project((self.down_proj,), hidden, route)[0].view_as(x)


def project(modules: Sequence[nn.Module], x: Tensor, route: Route) -> Sequence[Tensor]:
    """The outputs of several modules, sites or not, for the same x [1, N, in]: [1, N, out] each.

    Frozen linears and the LoRA updates on them become one autograd node; other functions of a site follow it.
    """
    sites = [site_of(module) for module in modules]
    weights = [_weight(module, site, x) for module, site in zip(modules, sites, strict=True)]
    if any(weight is None for weight in weights):
        return [module(x) for module in modules]
    plain = all(isinstance(weight, Tensor) for weight in weights)
    if route.together is not None:
        joined: Sequence[Tensor] | None = route.together.project(modules, x) if plain else None
        return [module(x) for module in modules] if joined is None else joined
    # Not x[0], because its gradient would be written into a tensor of zeros.
    rows = x.squeeze(0)
    in_pieces = [rows_in_pieces(rows, weight) for weight in weights if weight is not None]
    if not plain and any(read is None for read in in_pieces):
        return [module(x) for module in modules]
    pieces, factors, begin = [], [], 0
    later: list[dict[int, list[SiteFunction]]] = [{} for _ in modules]
    for index, segment in enumerate(route.segments):
        updates: dict[int, LoraLinear] = {}
        for i, site in enumerate(sites):
            functions = _functions(site, segment)
            if (lora := _only_lora(functions, segment)) is not None:
                updates[i] = lora
            elif functions:
                later[i][index] = functions
        factors += [factor for lora in updates.values() for factor in (lora.lora_A, lora.lora_B)]
        scalings = tuple(lora.scaling for lora in updates.values())
        pieces.append(Piece(begin, begin + segment.tokens, tuple(updates), scalings))
        begin += segment.tokens
    biases = [cast(nn.Linear, module).bias for module in modules]
    if all(read is not None for read in in_pieces):
        found = low_rank_rows(rows, list(zip(cast(Sequence[Rows], in_pieces), biases, strict=True)), pieces, factors)
    else:
        linears = list(zip(cast(Sequence[Tensor], weights), biases, strict=True))
        found = low_rank_linears(rows, linears, pieces, factors)
    ys = (y.unsqueeze(0) for y in found)
    return [_follow(x, y, todo, route) if todo else y for y, todo in zip(ys, later, strict=True)]


def _functions(site: Site | None, segment: Segment) -> list[SiteFunction]:
    return [] if site is None or segment.adapter is None else site.functions.get(segment.adapter, [])


def _only_lora(functions: Sequence[SiteFunction], segment: Segment) -> LoraLinear | None:
    """The only function, if it is LoRA's own layer and draws nothing; a subclass may compute something else."""
    lora = functions[0] if len(functions) == 1 else None
    if type(lora) is not LoraLinear:
        return None
    return lora if lora.dropout == 0.0 or segment.seed is None else None


def _weight(module: nn.Module, site: Site | None, x: Tensor) -> Tensor | PackedRows | None:
    """The weight [out, in] of a frozen linear that is nothing else, for x [1, N, in]; None: it is something else."""
    if _hooked(module) or (site is not None and site.inputs):
        return None
    return frozen_weight(module, type(module) if site is None else site.base_class, x)


def _hooked(module: nn.Module) -> bool:
    """Whether more happens at its call than its class defines."""
    hooks = (module._forward_hooks, module._forward_pre_hooks, module._backward_hooks, module._backward_pre_hooks)
    return any(hooks) or "forward" in module.__dict__


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


# The classes that fuse a module, by name.
MIXINS: dict[str, type] = {
    mixin.__name__: mixin for mixin in (_FusedNorm, _DoubleGemmaNorm, _FusedMlp, _FusedAttention)
}
# Module path -> the class that is mixed into its own.
Kinds = dict[str, type]


@torch.no_grad()
def recognise(model: nn.Module) -> Kinds:
    """The modules of a model that are Llama's norm, attention or MLP, by their parts and by a trial of each kind.

    The trial compares the module's own forward with ours on a few random rows. Modules of one class with the same
    settings are tried once.
    """
    router, tried, kinds = Router(), dict[tuple[object, ...], type | None](), Kinds()
    undo = install_interface(model, router)
    # Linears in few bits do not say in which dtype rows come to them.
    rows = next((p.dtype for p in model.parameters() if p.dtype.is_floating_point), torch.float32)
    try:
        for path, module in model.named_modules():
            candidates = _candidates(module)
            if not candidates or "forward" in module.__dict__:
                continue
            key = (type(module), *_settings(module))
            if key not in tried:
                tried[key] = next((mixin for mixin in candidates if _alike(module, mixin, router, rows)), None)
            if (mixin := tried[key]) is not None:
                kinds[path] = mixin
    finally:
        undo()
    return kinds


def _settings(module: nn.Module) -> list[tuple[str, object]]:
    """The plain attributes of a module, by which two of one class may differ, without the number of the layer."""
    plain = {name: value for name, value in vars(module).items() if isinstance(value, (bool, int, float, str))}
    # The number may decide something (the first layers have no positions), but that is an attribute too.
    return sorted((name, value) for name, value in plain.items() if name not in ("layer_idx", "_weft_layer"))


def _candidates(module: nn.Module) -> list[type]:
    names = {name for name, _ in module.named_children()}
    own = {name for name, _ in module.named_parameters(recurse=False)}
    takes = [p for p in inspect.signature(type(module).forward).parameters if p != "self"]
    scaled = own == {"weight"} and not names and module.get_parameter("weight").dim() == 1
    if scaled and len(takes) == 1 and (hasattr(module, "variance_epsilon") or hasattr(module, "eps")):
        return [_FusedNorm, _DoubleGemmaNorm]
    if names == {"gate_proj", "up_proj", "down_proj", "act_fn"} and len(takes) == 1 and not own:
        return [_FusedMlp]
    known = all(hasattr(module, name) for name in ("head_dim", "scaling", "layer_idx", "config"))
    if names == {"q_proj", "k_proj", "v_proj", "o_proj"} and known and "position_embeddings" in takes and not own:
        return [_FusedAttention]
    return []


def _alike(module: nn.Module, mixin: type, router: Router, rows_in: torch.dtype) -> bool:
    """Whether the module computes the same with the mixin, on five random rows; of ``rows_in``, if its weights are not
    floating."""
    some = next(itertools.chain(module.parameters(), module.buffers()))
    dtype = some.dtype if some.dtype.is_floating_point else rows_in
    generator = torch.Generator().manual_seed(0)

    def rows(width: int) -> Tensor:
        return torch.randn(1, 5, width, generator=generator).to(some.device, dtype)

    source: Any = module
    more: dict[str, Any] = {}
    route = StreamRoute((Segment(None, 5, 1, lengths=(5,)),), SequenceLayout.build([5], device=some.device))
    own: Any = type(module)
    module.__dict__[_ROUTER] = router
    try:
        if mixin is _FusedAttention:
            x = rows(source.q_proj.in_features)
            more = {"position_embeddings": (rows(source.head_dim), rows(source.head_dim)), "attention_mask": None}
        else:
            x = rows(source.gate_proj.in_features if mixin is _FusedMlp else len(source.weight))
        with router.use(route):
            expected = _first(module(x, **more))
            module.__class__ = mixed("Fused", mixin, own)
            if isinstance(module, _DoubleNorm):
                found = rms_norm_ref(x, *module.terms())
            else:
                found = _first(module(x, **more))
    except Exception:  # an unknown module may raise anything for rows that are not its own
        return False
    finally:
        module.__class__ = own
        del module.__dict__[_ROUTER]
    # The class of a norm computes in float32 even in a float64 model.
    eps = max(torch.finfo(dtype).eps, torch.finfo(torch.float32).eps) if issubclass(mixin, _DoubleNorm) else None
    near = 16 * (eps or torch.finfo(dtype).eps) * float(expected.abs().max())
    return expected.shape == found.shape and bool(((expected - found).abs() <= near).all())


def _first(out: Tensor | tuple[Tensor, ...]) -> Tensor:
    return out[0] if isinstance(out, tuple) else out


def install_fused(model: nn.Module, router: Router, kinds: Kinds) -> Callable[[], None]:
    """Call ``install_interface`` and fuse the modules; returns the function that undoes both."""
    undo_attention = install_interface(model, router)
    swapped = []
    for path, mixin in kinds.items():
        module = model.get_submodule(path)
        if "forward" in module.__dict__:
            continue
        own = plain_class(module)
        swapped.append((module, own))
        module.__dict__[_ROUTER] = router
        replace_class(module, mixed("Fused", mixin, own))

    def undo() -> None:
        for module, own in swapped:
            replace_class(module, own)
            del module.__dict__[_ROUTER]
        undo_attention()

    return undo
