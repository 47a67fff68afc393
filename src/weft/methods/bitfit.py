"""BitFit (Ben Zaken et al. 2021): only bias terms are trained, ``y = W x + b + Δb`` and, of norms,
``y = g · n(x) + b + Δb``. The adapter holds the *change* Δb of each, so that many of them can share one base."""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from pydantic import Field
from torch import Tensor, nn

from weft.base.kinds import is_linear, linear_shape
from weft.combine.rules import ON_CHANGES
from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.architecture import Architecture
from weft.core.route import Segment
from weft.errors import UserError, nearest
from weft.methods.mergeable import MergedModule
from weft.methods.site_adapter import SiteAdapter
from weft.ops.grouped import RowForm


class BitFitConfig(MethodConfig):
    """The choice of the trained biases. A classification learns them at a third of the default rate (measured at widths
    of 64 and 128: the loss on SST-2 falls from that of guessing to 0.62 and 0.64)."""

    method: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "BITFIT"
    peft_defaults: ClassVar[Mapping[str, object]] = {"add_missing": False}
    default_learning_rate: ClassVar[float] = 1e-3
    small_learning_rate: ClassVar[float | None] = 3e-2
    combination_types: ClassVar[tuple[str, ...]] = ON_CHANGES

    target_modules: list[str] | None = Field(
        None,
        description="which biases: last parts of module paths (`query`, `q_proj`) or the groups `attention`, `mlp` "
        "(their linear modules) and `norm`; default: all that are there, norms' and the head's too",
    )
    add_missing: bool | None = Field(
        None,
        description="also give a bias to the linear and norm modules of the blocks that have none; default: to the "
        "linear ones, if the model has no bias at all (a Llama)",
    )

    def build(self, name: str, context: BuildContext) -> Adapter:
        return BitFit(self, name, context)


class BiasDelta(nn.Module):
    """The change of one bias."""

    def __init__(self, size: int, context: BuildContext) -> None:
        super().__init__()
        self.bias_delta = nn.Parameter(context.zeros(size))

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """``y + Δb`` of y [..., out]."""
        return y + self.bias_delta.to(y.dtype)

    def row_form(self) -> RowForm:
        """``y + Δb``."""
        return RowForm(bias=self.bias_delta)

    def merge_into(self, merged: MergedModule) -> None:
        """b + Δb."""
        merged.add_bias(self.bias_delta)


class BitFit(SiteAdapter):
    """A bias change on every module that has a bias or gets one."""

    def __init__(self, config: BitFitConfig, name: str, context: BuildContext) -> None:
        own = _for_base(config, context)
        sizes = _bias_sizes(own, context)
        super().__init__(own, name, {path: BiasDelta(size, context) for path, size in sizes.items()})
        if own.add_missing and config.add_missing is None:
            self.note = (
                f"this {context.architecture.model_type} model has no bias terms, so bitfit gives it {len(sizes)} new "
                f"ones (add_missing: true, target_modules: [{', '.join(own.target_modules or ())}])."
            )

    def default_learning_rate(self, parameter: str, writes: bool = True) -> float:
        rate = super().default_learning_rate(parameter, writes)
        return rate if writes or parameter.startswith("head.") else rate / 3


def _for_base(config: BitFitConfig, context: BuildContext) -> BitFitConfig:
    """The settings, with what ``add_missing`` is by default on this base."""
    if config.add_missing is not None:
        return config
    if any(_has_bias(path, context) for path in _places(context.architecture)):
        return config.model_copy(update={"add_missing": False})
    # A bias of a norm gives nothing beside those of the linears after it, and a merged Llama has no place for it.
    there = {group for path in context.architecture.linears for group in _group(path, context.architecture)}
    targets = sorted(there) if config.target_modules is None else config.target_modules
    return config.model_copy(update={"add_missing": True, "target_modules": targets})


def _bias_sizes(config: BitFitConfig, context: BuildContext) -> dict[str, int]:
    """Module path -> the length of its bias."""
    shape = context.architecture
    blocks = tuple(f"{path}." for path in shape.blocks)
    wanted = config.target_modules
    sizes: dict[str, int] = {}
    could: set[str] = set()
    for path in _places(shape):
        module = context.model.get_submodule(path)
        if not is_linear(module) and module.get_parameter("weight").dim() != 1:
            continue  # Cohere's norms of queries and keys have a weight per head and no bias
        if not _has_bias(path, context) and not (config.add_missing and path.startswith(blocks)):
            continue
        names = {path.rsplit(".", 1)[-1], *_group(path, shape)}
        could |= names
        if wanted is None or names & set(wanted):
            sizes[path] = linear_shape(module)[1] if is_linear(module) else module.get_parameter("weight").shape[0]
    for name in wanted or ():
        if could and name not in could:
            raise UserError(
                f"bitfit: target_modules: {name!r} matches no bias of this {shape.model_type} model; "
                f"there are: {', '.join(sorted(could))}.{nearest(name, could)}"
            )
    if sizes:
        return sizes
    if could:
        raise UserError(f"bitfit: target_modules is empty. What it can hold: {', '.join(sorted(could))}.")
    raise UserError(
        f"bitfit finds nothing to tune: this {shape.model_type} model has no bias terms, and add_missing is false. "
        "Leave that out to give its linear modules new ones, or take another method (lora, for one)."
    )


def _has_bias(path: str, context: BuildContext) -> bool:
    return getattr(context.model.get_submodule(path), "bias", None) is not None


def _places(shape: Architecture) -> tuple[str, ...]:
    """The paths of the modules that can have a bias."""
    head = (shape.head,) if shape.head and shape.head not in shape.linears else ()
    return (*shape.linears, *shape.norms, *head)


def _group(path: str, shape: Architecture) -> tuple[str, ...]:
    """The groups of a module: ``norm``, ``attention``, ``mlp`` or none."""
    if path in shape.norms:
        return ("norm",)
    if path not in shape.linears:
        return ()
    block = next(block for block in shape.blocks if path.startswith(f"{block}."))
    inside = path.removeprefix(block).lower()
    # BERT's attention.output is attention, its intermediate and output are the MLP; OPT's fc1 has no parent.
    return ("attention",) if "attn" in inside or "attention" in inside else ("mlp",)
