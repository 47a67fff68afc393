"""IA3 (Liu et al. 2022, "Few-Shot Parameter-Efficient Fine-Tuning is Better and Cheaper than In-Context Learning"):
learned vectors, which begin as ones, multiply keys, values and the MLP's inner activations element by element:
``softmax(Q (l_k * K)^T / sqrt(d)) (l_v * V)`` and ``W_2 (l_ff * f(W_1 x))``.

The base itself does not change: its inputs or its outputs are scaled. So its weights may be stored in any way.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import ClassVar

from pydantic import Field, model_validator
from torch import Tensor, nn

from weft.base.kinds import linear_shape
from weft.core.adapter import Adapter, BuildContext, InputFunction, MethodConfig, SiteFunction
from weft.core.architecture import Architecture
from weft.core.route import Segment
from weft.errors import UserError
from weft.methods.mergeable import MergedModule
from weft.methods.site_adapter import SiteAdapter
from weft.ops.grouped import RowForm
from weft.patterns import last_parts, pattern

# The linears of the keys and of the values. The paper never scales keys alone (Zaya's values come from two linears of
# other names).
_KEYS_VALUES = (("k_proj", "v_proj"), ("key", "value"), ("k", "v"), ("key_proj", "value_proj"), ("k_lin", "v_lin"))
_FUSED = ("query_key_value", "c_attn", "qkv_proj", "Wqkv", "qkv", "W_pack")


class IA3Config(MethodConfig):
    """Settings with PEFT's names."""

    method: ClassVar[str] = "ia3"
    peft_type: ClassVar[str] = "IA3"
    default_learning_rate: ClassVar[float] = 3e-3
    small_learning_rate: ClassVar[float | None] = 1e-1
    not_in_peft: ClassVar[frozenset[str]] = frozenset({"target_modules", "feedforward_modules"})
    harmless_keys: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "exclude_modules"})

    target_modules: str | list[str] | None = Field(
        None,
        description="last parts of paths, or an expression over whole paths; default: keys and values (where one "
        "linear gives queries too, all of its output) and the MLP's last linear",
    )
    feedforward_modules: str | list[str] | None = Field(
        None, description="those of `target_modules` whose input is scaled instead of the output"
    )
    init_ia3_weights: bool = Field(True, description="begin at 1, as the base; off: at random")

    @model_validator(mode="after")
    def _subset(self) -> IA3Config:
        targets, inner = self.target_modules, self.feedforward_modules
        if isinstance(targets, list) and isinstance(inner, list) and not set(inner) <= set(targets):
            stray = sorted(set(inner) - set(targets))
            raise ValueError(f"feedforward_modules {stray} are not among target_modules {targets}")
        return self

    def build(self, name: str, context: BuildContext) -> Adapter:
        return IA3(self, name, context)

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        targets, inner = self.places(architecture)
        entries = {"target_modules": targets, "feedforward_modules": inner, "modules_to_save": None}
        gpt2 = architecture.model_type == "gpt2"
        return {**entries, "init_ia3_weights": self.init_ia3_weights, "fan_in_fan_out": gpt2}

    def places(self, architecture: Architecture) -> tuple[list[str], list[str]]:
        """Paths of all targets, and of those whose input is scaled.

        Raises:
            UserError: No module matches, or a module of ``feedforward_modules`` is no target.
        """
        targets = architecture.match(self._targets(architecture))
        if self.feedforward_modules is None:
            return targets, [path for path in targets if path in set(architecture.mlp_output)]
        inner = [path for path in targets if _scales_input(path, self.feedforward_modules)]
        if self.feedforward_modules and not inner:
            raise UserError(
                f"ia3: feedforward_modules {self.feedforward_modules!r} is none of the targets, which are: "
                f"{', '.join(sorted(last_parts(targets)))}."
            )
        return targets, inner

    def _targets(self, architecture: Architecture) -> str | list[str]:
        if self.target_modules is not None:
            return self.target_modules
        last = last_parts(architecture.linears)
        found = [name for pair in _KEYS_VALUES if last.issuperset(pair) for name in pair]
        found = found or [name for name in _FUSED if name in last][:1]
        if not found:
            raise UserError(
                f"ia3 cannot tell which modules of this {architecture.model_type} model give keys and values; name "
                f"them, and the MLP's last linear, in target_modules. There are: {', '.join(sorted(last))}."
            )
        return [*found, *architecture.mlp_output]

    @classmethod
    def from_peft(cls, entries: dict[str, object], keys: list[str]) -> MethodConfig:
        # The file's keys show the tuned modules; target_modules may be a default that we would have to guess.
        tuned = [key for key in keys if key.endswith(".ia3_l")]
        targets = sorted(key.removeprefix(SiteAdapter.prefix).removesuffix(".ia3_l") for key in tuned)
        inner = entries.get("feedforward_modules")
        if isinstance(inner, str | list):
            inner = [path for path in targets if _scales_input(path, inner)]
        return super().from_peft({**entries, "target_modules": targets, "feedforward_modules": inner}, keys)


def _scales_input(path: str, wanted: str | Iterable[str]) -> bool:
    """Whether PEFT's rule matches: an expression over the whole path, or any ending, which need not begin at a dot."""
    if isinstance(wanted, str):
        return pattern(wanted, "target_modules").full(path) is not None
    return any(path.endswith(name) for name in wanted)


class IA3Scale(nn.Module):
    """The vector of one linear module: [out, 1] for its output, [1, in] for its input."""

    stored_whole = True

    def __init__(self, base: nn.Module, inner: bool, config: IA3Config, context: BuildContext) -> None:
        super().__init__()
        self.inner = inner
        inputs, outputs = linear_shape(base)
        shape = (1, inputs) if inner else (outputs, 1)
        start = context.zeros(*shape) + 1 if config.init_ia3_weights else context.normal(*shape, std=1.0)
        self.ia3_l = nn.Parameter(start)

    def scale(self, rows: Tensor) -> Tensor:
        """``l * rows`` of rows [..., out or in]; the product is rounded once, from the vector's precision."""
        return (rows * self.ia3_l.flatten()).to(rows.dtype)

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """``l * y`` of y [..., out]."""
        return self.scale(y)

    def row_form(self) -> RowForm:
        """``l * y``."""
        return RowForm(scale=self.ia3_l.flatten())

    def merge_into(self, merged: MergedModule) -> None:
        """W diag(l), or diag(l) W and l b."""
        scale = merged.cast(self.ia3_l).flatten()
        if self.inner:
            merged.scale_input(scale)
            return
        merged.put(scale[:, None] * merged.weight, None if merged.bias is None else scale * merged.bias)


@dataclass(frozen=True)
class InputScale:
    """The function of a vector that scales inputs."""

    layer: IA3Scale

    def __call__(self, x: Tensor, segment: Segment) -> Tensor:
        """``l * x`` of x [..., in]."""
        return self.layer.scale(x)

    def row_form(self) -> RowForm:
        """``W (l * x)``."""
        return RowForm(input_scale=self.layer.ia3_l.flatten())


class IA3(SiteAdapter):
    """Vectors on keys, values and the MLP's inner activations."""

    def __init__(self, config: IA3Config, name: str, context: BuildContext) -> None:
        targets, inner = config.places(context.architecture)
        modules = {path: context.model.get_submodule(path) for path in targets}
        super().__init__(config, name, {p: IA3Scale(m, p in inner, config, context) for p, m in modules.items()})

    def sites(self) -> Mapping[str, SiteFunction]:
        inputs = self.input_sites()
        return {path: function for path, function in super().sites().items() if path not in inputs}

    def input_sites(self) -> Mapping[str, InputFunction]:
        layers = zip(self.paths, self.layers, strict=True)
        return {path: InputScale(layer) for path, layer in layers if isinstance(layer, IA3Scale) and layer.inner}
