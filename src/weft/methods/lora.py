"""LoRA (Hu et al. 2021): ``W x + (alpha / r) B A x`` with A [r, in] random and B [out, r] zero, so that it begins as
the identity. rsLoRA (Kalajdzievski 2023) scales by ``alpha / sqrt(r)`` instead."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.core.adapter import Adapter, SiteAdapter
from weft.core.architecture import Architecture, linear_shape
from weft.core.compose import ON_PRODUCTS, Combination, Source
from weft.core.config import BuildContext, MethodConfig
from weft.core.route import Segment, seeded_dropout
from weft.errors import UserError
from weft.methods.lora_combine import combine_lora
from weft.ops.lowrank import low_rank_add

# PEFT's other ones (pissa, olora, corda, loftq, lora_ga) subtract B A from the base, or quantise it.
_INITS_THAT_KEEP_THE_BASE = frozenset({"gaussian", "eva", "orthogonal"})


class LoraConfig(MethodConfig):
    """LoRA's settings; PEFT's names and meanings. Unlike PEFT the default targets are all linear modules."""

    method: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    default_learning_rate: ClassVar[float] = 2e-4
    combination_types: ClassVar[tuple[str, ...]] = ON_PRODUCTS
    # How the base stores its weights, or how the adapter was first drawn: nothing that changes what it computes now.
    harmless_keys: ClassVar[frozenset[str]] = frozenset(
        {"fan_in_fan_out", "megatron_core", "qalora_group_size", "layers_pattern", "exclude_modules", "loftq_config"}
    )

    r: int = Field(default=8, gt=0)
    target_modules: str | list[str] = "all-linear"
    lora_alpha: float = Field(default=16, gt=0)
    lora_dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    use_rslora: bool = False
    init_lora_weights: bool | Literal["gaussian"] = True
    layers_to_transform: list[int] | None = None
    rank_pattern: dict[str, int] = {}
    alpha_pattern: dict[str, float] = {}

    def build(self, name: str, context: BuildContext) -> Adapter:
        return Lora(self, name, context)

    def scaling(self, path: str) -> float:
        """The factor before ``B A x`` at this module."""
        alpha, r = self._pattern(self.alpha_pattern, path, self.lora_alpha), self.rank(path)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def rank(self, path: str) -> int:
        """r at this module, after ``rank_pattern``."""
        return int(self._pattern(self.rank_pattern, path, self.r))

    @staticmethod
    def _pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
        for pattern, value in patterns.items():
            if re.match(rf"(.*\.)?({pattern})$", path):
                return value
        return default

    def combine(self, sources: Sequence[Source], how: Combination) -> tuple[MethodConfig, dict[str, Tensor]]:
        return combine_lora(sources, how)

    def to_peft(self, architecture: Architecture) -> dict[str, Any]:
        entries = self.model_dump(mode="json")
        pattern = isinstance(self.target_modules, str) and self.target_modules != "all-linear"
        if pattern or self.layers_to_transform is not None:
            # PEFT applies an expression to every module (a norm would be an error) and refuses layers beside one.
            entries["target_modules"] = architecture.match(self.target_modules, self.layers_to_transform)
            entries["layers_to_transform"] = None
        gpt2 = architecture.model_type == "gpt2"
        return {**entries, "bias": "none", "fan_in_fan_out": gpt2, "modules_to_save": None, "use_dora": False}

    @classmethod
    def from_peft(cls, entries: dict[str, Any], keys: list[str]) -> MethodConfig:
        # A file's own keys say which modules were tuned; target_modules may be a default we would have to guess.
        entries = dict(entries)
        entries["target_modules"] = sorted({_module_path(key) for key in keys})
        entries["layers_to_transform"] = None
        how = entries.pop("init_lora_weights", True)
        if isinstance(how, str) and how.lower() not in _INITS_THAT_KEEP_THE_BASE:
            raise UserError(
                f"adapter_config.json: 'init_lora_weights' is {how!r}, which also changed the base's own weights; on "
                "the plain base the adapter would answer differently. Convert it in peft when saving: "
                "path_initial_model_for_weight_conversion."
            )
        return super().from_peft(entries, keys)


def _module_path(key: str) -> str:
    return re.sub(r"\.lora_\w+(\.\w+)?$", "", key.removeprefix(SiteAdapter.prefix))


class LoraLinear(nn.Module):
    """A and B of one linear module, in the adapter's own dtype."""

    def __init__(self, config: LoraConfig, path: str, base: nn.Module, context: BuildContext) -> None:
        super().__init__()
        inputs, outputs = linear_shape(base)
        r = config.rank(path)
        self.path, self.scaling, self.dropout = path, config.scaling(path), config.lora_dropout
        # Kaiming-uniform with a = sqrt(5), the reference implementation's choice, is uniform within 1 / sqrt(in).
        std = 1.0 / r if config.init_lora_weights == "gaussian" else 1.0 / math.sqrt(3 * inputs)
        if config.init_lora_weights == "gaussian":
            a = context.normal(r, inputs, std=std)
        else:
            uniform = torch.rand(r, inputs, generator=context.generator, dtype=torch.float32) * 2 - 1
            a = (uniform / math.sqrt(inputs)).to(context.device, context.dtype)
        b = context.zeros(outputs, r) if config.init_lora_weights else context.normal(outputs, r, std=std)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        x = seeded_dropout(x, self.dropout, segment, self.path)
        return low_rank_add(y, x, self.lora_A, self.lora_B, self.scaling)


class Lora(SiteAdapter):
    """A low-rank update on every targeted linear module."""

    def __init__(self, config: LoraConfig, name: str, context: BuildContext) -> None:
        paths = context.architecture.match(config.target_modules, config.layers_to_transform)
        modules = {path: context.model.get_submodule(path) for path in paths}
        super().__init__(config, name, {p: LoraLinear(config, p, m, context) for p, m in modules.items()})

    def stored_name(self, part: str) -> str:
        return f"{part}.weight"
