"""Site functions that give an adapter weights of its own in the place of the base's, which stay as they are.

``WeightDelta`` holds the change of a module's tensors (full fine-tuning). ``OwnWeights`` holds whole tensors that take
the place of the base's (``modules_to_save``, layer-norm tuning): PEFT's files hold them whole, and only a whole tensor
survives saving to the bit.
"""

from __future__ import annotations

import copy
from collections.abc import Collection, Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from weft.base.kinds import is_linear, is_norm
from weft.base.packed import PackedLinear
from weft.core.adapter import BuildContext
from weft.core.architecture import NEVER_CALLED
from weft.core.route import Segment
from weft.core.site import _SITE, plain_class, site_of
from weft.errors import UserError
from weft.methods.mergeable import MergedModule
from weft.ops.products import product
from weft.patterns import last_parts


def weight_parts(module: nn.Module, path: str) -> tuple[str, ...]:
    """The names of a module's own trainable tensors: ``weight``, ``bias``.

    Raises:
        UserError: It is no linear, norm or embedding, so the role of its tensors is not known.
    """
    whole = all(p.is_floating_point() for p in module.parameters(recurse=False))
    if not whole or isinstance(module, PackedLinear):
        raise UserError(f"module '{path}' is quantised; its weights cannot be trained. Load the base in bf16 or fp32.")
    parts = tuple(name for name, p in module.named_parameters(recurse=False) if p is not None)
    known = is_linear(module) or is_norm(module) or isinstance(module, nn.Embedding)
    if not known or not set(parts) <= {"weight", "bias"}:
        raise UserError(
            f"module '{path}' ({plain_class(module).__name__}) holds {', '.join(parts) or 'no tensors'}; weights can "
            "be given to linear, norm and embedding modules only."
        )
    return parts


def _computed(module: nn.Module, x: Tensor, tensors: Mapping[str, Tensor], segment: Segment | None = None) -> Tensor:
    """The forward of a base module with other tensors, by a copy: the module itself is not touched."""
    shell = copy.copy(module)
    shell.__dict__.pop(_SITE, None)
    shell.__dict__["_parameters"] = {**module._parameters, **tensors}
    shell.__class__ = plain_class(module)
    if segment is None or segment.call is None:
        return shell(x)
    return segment.call.run(lambda module, *args, **kwargs: module(*args, **kwargs), shell, x)


class WeightDelta(nn.Module):
    """``y = f(x; W + ΔW, b + Δb)`` with the changes in the adapter's own dtype; they begin at zero.

    Every f here is linear in its weights (some norms: up to a constant), so y is f(x; W, b) plus a correction. The
    correction is exactly zero in the beginning, in any dtype. It is not rounded away beside a bf16 weight, and it keeps
    the changes that other methods of the same job made to y.

    ``shared`` holds changes by the ``id`` of the base's tensor, for modules that are tied (a head and its embedding).
    """

    base: nn.Module
    weight_delta: Tensor | None
    bias_delta: Tensor | None

    def __init__(
        self,
        module: nn.Module,
        parts: Sequence[str],
        context: BuildContext,
        shared: dict[int, nn.Parameter] | None = None,
    ) -> None:
        super().__init__()
        self.__dict__["base"] = module  # not a submodule: its tensors are not the adapter's
        self._linear_in_weight: bool | None = None
        known = {} if shared is None else shared
        for part in ("weight", "bias"):
            if part not in parts:
                self.register_parameter(f"{part}_delta", None)
                continue
            tensor = module.get_parameter(part)
            if id(tensor) not in known:
                known[id(tensor)] = nn.Parameter(context.zeros(*tensor.shape))
            self.register_parameter(f"{part}_delta", known[id(tensor)])

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """y [..., out] with the change for x [..., in] (ids [...] of an embedding).

        Raises:
            UserError: An embedding gets no ids.
        """
        base = self.base
        if self.weight_delta is None:
            return y if self.bias_delta is None else y + self.bias_delta.to(y.dtype)
        if is_norm(base):
            return y + self._norm(x, segment).to(y.dtype)
        weight = self.weight_delta.to(y.dtype)
        if isinstance(base, nn.Embedding):
            if x.is_floating_point():
                site = site_of(base)
                raise UserError(
                    f"module '{site.path if site else ''}' ({plain_class(base).__name__}) is not asked with ids, so "
                    "its weights cannot be trained. Take another method, such as lora."
                )
            # The row of padding_idx learns nothing, as in torch's own training.
            change = F.embedding(x + getattr(base, "offset", 0), weight, padding_idx=base.padding_idx)
            scale = getattr(base, "embed_scale", None)
            y = y + (change if scale is None else change * torch.as_tensor(scale).to(change))
        elif isinstance(base, nn.Linear):
            y = y + product(x, weight, flipped=True)
        else:
            y = y + product(x, weight)
        return y if self.bias_delta is None else y + self.bias_delta.to(y.dtype)

    def merge_into(self, merged: MergedModule) -> None:
        """W + ΔW, b + Δb."""
        if self.weight_delta is not None:
            merged.put(merged.weight + merged.laid_out(merged.cast(self.weight_delta)), merged.bias)
        if self.bias_delta is not None:
            merged.add_bias(self.bias_delta)

    def _norm(self, x: Tensor, segment: Segment) -> Tensor:
        """f(x; W + ΔW, b + Δb) - f(x; W, b), in the delta's precision."""
        assert self.weight_delta is not None
        norm, x = self.base, x.to(self.weight_delta.dtype)
        change = {"weight": self.weight_delta}
        if norm._parameters.get("bias") is not None:
            change["bias"] = torch.zeros_like(self.weight_delta) if self.bias_delta is None else self.bias_delta
        if self._linear_in_weight is None and (segment is None or segment.call is None):
            with torch.no_grad():
                some = torch.linspace(-1, 2, x.shape[-1], dtype=x.dtype, device=x.device)
                some = some.expand(*change["weight"].shape[:-1], x.shape[-1])
                none = {part: torch.zeros_like(delta) for part, delta in change.items()}
                try:
                    self._linear_in_weight = not bool(_computed(norm, some[None], none).any())
                except (ValueError, RuntimeError):  # xLSTM's wants its rows by head
                    self._linear_in_weight = False
        if self._linear_in_weight:
            return _computed(norm, x, change)
        base = {part: norm.get_parameter(part).to(x.dtype) for part in change}
        changed = {part: base[part] + delta for part, delta in change.items()}
        return _computed(norm, x, changed, segment) - _computed(norm, x, base, segment)


def parameter_names(model: nn.Module) -> list[str]:
    """The names of all parameters; a tied one has several. A weight in words, which is none, has its usual name."""
    packed = [f"{path}.weight" for path, module in model.named_modules() if isinstance(module, PackedLinear)]
    return [*packed, *(name for name, _ in model.named_parameters(remove_duplicate=False))]


def delta_layers(names: Collection[str], context: BuildContext) -> dict[str, WeightDelta]:
    """A ``WeightDelta`` per module that holds one of the parameters ``names``, by module path; tied ones share theirs.

    Raises:
        UserError: No module of a known kind holds a parameter (experts that are fused into one tensor, say).
    """
    model = context.model
    for path, module in model.named_modules():
        if isinstance(module, PackedLinear) and f"{path}.weight" in names:
            weight_parts(module, path)
    wanted = {id(p): name for name, p in model.named_parameters(remove_duplicate=False) if name in names}
    layers: dict[str, WeightDelta] = {}
    shared: dict[int, nn.Parameter] = {}
    refusals: dict[int, str] = {}
    idle: set[int] = set()
    for path, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False, remove_duplicate=False))
        parts = [part for part, p in own.items() if id(p) in wanted]
        if not parts:
            continue
        if context.architecture.unreachable.get(path) == NEVER_CALLED and all(id(own[p]) not in shared for p in parts):
            idle |= {id(own[part]) for part in parts}  # it plays no part in the model's answer
            continue
        try:
            context.architecture.check_reachable(path)
            weight_parts(module, path)
        except UserError as error:
            refusals |= {id(own[part]): str(error) for part in parts}
        else:
            layers[path] = WeightDelta(module, parts, context, shared)
    unknown = [key for key in wanted if key not in shared and key not in idle]
    if unknown:
        raise UserError(f"parameter '{wanted[unknown[0]]}' cannot be trained: {refusals[unknown[0]]}")
    return layers


class OwnWeights(nn.Module):
    """``y = f(x; W', b')`` with W' (and b') whole, in the adapter's own dtype; they begin as the base's."""

    stored_whole = True
    base: nn.Module

    def __init__(self, module: nn.Module, parts: Sequence[str], context: BuildContext) -> None:
        super().__init__()
        self.__dict__["base"] = module
        for part in parts:
            base = module.get_parameter(part).detach()
            value = torch.empty(base.shape, dtype=context.dtype, device=context.device) if context.blank else base
            # Contiguous, because torch's fused AdamW wants a restored state in the parameter's memory order.
            own = value.to(context.device, context.dtype, copy=True, memory_format=torch.contiguous_format)
            self.register_parameter(part, nn.Parameter(own))

    @property
    def replaces_output(self) -> bool:
        """Whether the module's own output plays no part, so that another method's change must come after."""
        return set(self._parameters) != {"bias"}

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """f(x; W', b') of x [..., in] (ids [...] of an embedding), [..., out] as y."""
        base = self.base
        if not self.replaces_output:
            bias = self.get_parameter("bias")
            return y + (bias - base.get_parameter("bias").to(bias.dtype)).to(y.dtype)
        own = {part: value.to(base.get_parameter(part).dtype) for part, value in self.named_parameters()}
        return _computed(base, x, own, segment).to(y.dtype)

    def merge_into(self, merged: MergedModule) -> None:
        """W', b'."""
        own = {part: merged.cast(value) for part, value in self.named_parameters()}
        if not self.replaces_output:
            assert merged.base_bias is not None
            merged.add_bias(own["bias"] - merged.base_bias)
            return
        weight = merged.laid_out(own["weight"]) if "weight" in own else merged.base_weight
        merged.put(weight, own.get("bias", merged.base_bias))


def saved_modules(names: Sequence[str] | None, context: BuildContext) -> dict[str, OwnWeights]:
    """Whole weights, by path, for the modules that ``modules_to_save`` names, or for all modules inside them.

    Raises:
        UserError: A name matches no module, or one whose weights cannot be trained.
    """
    own: dict[str, OwnWeights] = {}
    for path, module in _modules_named(context.model, names or ()).items():
        inside = [
            (p, m) for p, m in module.named_modules(prefix=path) if next(m.parameters(recurse=False), None) is not None
        ]
        if not inside:
            raise UserError(f"modules_to_save: module '{path}' ({plain_class(module).__name__}) holds no weights.")
        for reached, _ in inside:
            context.architecture.check_reachable(reached)
        own |= {p: OwnWeights(m, weight_parts(m, p), context) for p, m in inside}
    return own


def saved_biases(
    bias: str, context: BuildContext, targets: Collection[str], besides: Collection[str] = ()
) -> dict[str, OwnWeights]:
    """Own biases by PEFT's ``bias``: for every module that has one ("all"), for the targets ("..._only"), or none.

    ``besides`` are modules that are trained whole already.
    """
    if bias == "none":
        return {}
    return {
        path: OwnWeights(module, ("bias",), context)
        for path, module in context.model.named_modules()
        if (bias == "all" or path in targets) and path not in besides
        if (is_linear(module) or is_norm(module)) and module._parameters.get("bias") is not None
        if path not in context.architecture.unreachable
    }


def _modules_named(model: nn.Module, names: Sequence[str]) -> dict[str, nn.Module]:
    """Modules, by path, whose path ends with one of ``names``, at a dot or not, as in PEFT's ``modules_to_save``.

    So ``norm`` names every ``input_layernorm`` too.

    Raises:
        UserError: A name matches no module.
    """
    paths = {path: module for path, module in model.named_modules() if path}
    found: dict[str, nn.Module] = {}
    for name in names:
        own = {p: m for p, m in paths.items() if name and p.endswith(name)}
        if not own:
            last = sorted(last_parts(p for p, m in paths.items() if next(m.parameters(False), None) is not None))
            raise UserError(f"modules_to_save: {name!r} matches no module of this model; there are: {', '.join(last)}.")
        found |= own
    return found
