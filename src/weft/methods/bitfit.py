"""BitFit (Ben Zaken et al. 2021): only bias terms are trained, ``y = W x + b + Δb`` and, of norms,
``y = g · n(x) + b + Δb``. The adapter holds the *change* Δb of each, so that many of them can share one base."""

from __future__ import annotations

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


class BitFitConfig(MethodConfig):
    """The choice of the trained biases."""

    method: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "BITFIT"
    default_learning_rate: ClassVar[float] = 1e-3
    small_learning_rate: ClassVar[float | None] = 3e-2
    combination_types: ClassVar[tuple[str, ...]] = ON_CHANGES

    target_modules: list[str] | None = Field(
        None,
        description="which biases: last parts of module paths (`query`, `q_proj`) or the groups `attention`, `mlp` "
        "(their linear modules) and `norm`; default: all that are there, norms' and the head's too",
    )
    add_missing: bool = Field(
        False, description="also give a bias to the linear and norm modules of the blocks that have none"
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

    def merge_into(self, merged: MergedModule) -> None:
        """b + Δb."""
        merged.add_bias(self.bias_delta)


class BitFit(SiteAdapter):
    """A bias change on every module that has a bias or gets one."""

    def __init__(self, config: BitFitConfig, name: str, context: BuildContext) -> None:
        sizes = _bias_sizes(config, context)
        super().__init__(config, name, {path: BiasDelta(size, context) for path, size in sizes.items()})


def _bias_sizes(config: BitFitConfig, context: BuildContext) -> dict[str, int]:
    """Module path -> the length of its bias."""
    shape = context.architecture
    blocks = tuple(f"{path}." for path in shape.blocks)
    wanted = config.target_modules
    sizes: dict[str, int] = {}
    could: set[str] = set()
    head = (shape.head,) if shape.head and shape.head not in shape.linears else ()
    for path in (*shape.linears, *shape.norms, *head):
        module = context.model.get_submodule(path)
        if not is_linear(module) and module.get_parameter("weight").dim() != 1:
            continue  # Cohere's norms of queries and keys have a weight per head and no bias
        if getattr(module, "bias", None) is None and not (config.add_missing and path.startswith(blocks)):
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
        f"bitfit finds nothing to tune: this {shape.model_type} model has no bias terms. Set add_missing: true to give "
        "its linear and norm modules new ones, or take another method (lora, for one)."
    )


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
