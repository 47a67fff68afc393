"""BitFit (Ben Zaken et al. 2021): only bias terms are trained. The adapter holds the *change* of each bias, so that
``y = base(x) + delta`` and many of them can share one base."""

from __future__ import annotations

from typing import ClassVar

from torch import Tensor, nn

from weft.core.adapter import Adapter, SiteAdapter
from weft.core.architecture import is_linear, linear_shape
from weft.core.compose import ON_CHANGES
from weft.core.config import BuildContext, MethodConfig
from weft.core.route import Segment
from weft.errors import UserError


class BitFitConfig(MethodConfig):
    """``target_modules``: last parts of paths to keep (default: every bias); ``add_missing``: also give a bias to the
    linear and norm modules of the blocks that have none."""

    method: ClassVar[str] = "bitfit"
    peft_type: ClassVar[str] = "BITFIT"
    default_learning_rate: ClassVar[float] = 1e-3
    combination_types: ClassVar[tuple[str, ...]] = ON_CHANGES

    target_modules: list[str] | None = None
    add_missing: bool = False

    def build(self, name: str, context: BuildContext) -> Adapter:
        return BitFit(self, name, context)


class BiasDelta(nn.Module):
    """The change of one bias."""

    def __init__(self, size: int, context: BuildContext) -> None:
        super().__init__()
        self.bias_delta = nn.Parameter(context.zeros(size))

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        return y + self.bias_delta.to(y.dtype)


class BitFit(SiteAdapter):
    """A bias change on every module that has a bias (or is given one)."""

    def __init__(self, config: BitFitConfig, name: str, context: BuildContext) -> None:
        sizes = _bias_sizes(config, context)
        super().__init__(config, name, {path: BiasDelta(size, context) for path, size in sizes.items()})


def _bias_sizes(config: BitFitConfig, context: BuildContext) -> dict[str, int]:
    """Module path -> length of its bias."""
    shape = context.architecture
    blocks = tuple(f"{path}." for path in shape.blocks)
    sizes: dict[str, int] = {}
    could = set()
    for path in (*shape.linears, *shape.norms):
        module = context.model.get_submodule(path)
        if not is_linear(module) and module.get_parameter("weight").dim() != 1:
            continue  # Cohere's norms of queries and keys have a weight per head and no bias
        if getattr(module, "bias", None) is None and not (config.add_missing and path.startswith(blocks)):
            continue
        last = path.rsplit(".", 1)[-1]
        could.add(last)
        if config.target_modules is None or last in config.target_modules:
            sizes[path] = linear_shape(module)[1] if is_linear(module) else module.get_parameter("weight").shape[0]
    stray = sorted(set(config.target_modules or ()) - could)
    if could and stray:
        raise UserError(f"bitfit: target_modules {stray} match no bias; there are: {', '.join(sorted(could))}.")
    if sizes:
        return sizes
    if could:
        raise UserError(f"bitfit: target_modules {config.target_modules} matches no bias; there are: {sorted(could)}.")
    raise UserError(
        f"bitfit finds nothing to tune: this {context.architecture.model_type} model has no bias terms. Set "
        "add_missing: true to give its linear and norm modules new ones, or take another method (lora, for one)."
    )
