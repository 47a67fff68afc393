"""VeRA (Kopiczko et al. 2023): ``W x + Λ_b B Λ_d A x`` with one frozen random pair A, B, of which each module takes a
part of its own size. Only the vectors λ_d [r] and λ_b [out] are trained. With λ_b = 0 it begins as the identity."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field
from torch import Tensor, nn

from weft.base.kinds import linear_shape
from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.architecture import Architecture
from weft.core.route import Segment
from weft.methods.dropout import seeded_dropout
from weft.methods.mergeable import MergedModule
from weft.methods.site_adapter import SiteAdapter


class VeraConfig(MethodConfig):
    """Settings with PEFT's names."""

    method: ClassVar[str] = "vera"
    peft_type: ClassVar[str] = "VERA"
    default_learning_rate: ClassVar[float] = 4e-3
    small_learning_rate: ClassVar[float | None] = 4e-2
    # λ_d multiplies λ_b, so a weighted sum of two adapters is no adapter.
    combination_types: ClassVar[tuple[str, ...]] = ()
    not_in_peft: ClassVar[frozenset[str]] = frozenset({"target_modules", "layers_to_transform"})
    harmless_keys: ClassVar[frozenset[str]] = frozenset({"fan_in_fan_out", "layers_pattern", "exclude_modules"})

    r: int = Field(256, gt=0, description="rank of A and B")
    target_modules: str | list[str] = Field("all-linear", description="as for `lora`")
    projection_prng_key: int = Field(0, ge=0, lt=2**63, description="seed of A and B")
    save_projection: bool = Field(True, description="off: the file leaves A and B out, and they are drawn again")
    vera_dropout: float = Field(0.0, ge=0.0, lt=1.0, description="dropout on what goes into A")
    d_initial: float = Field(0.1, description="first value of λ_d")
    init_weights: bool = Field(True, description="begin as the base; off: λ_d at random, λ_b at 1")
    layers_to_transform: list[int] | None = Field(
        None, description="numbers of the blocks that are adapted; default: all"
    )

    def build(self, name: str, context: BuildContext) -> Adapter:
        return Vera(self, name, context)

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        # Whole paths: A and B are as large as the largest target, so PEFT must find the very same ones.
        targets = architecture.match(self.target_modules, self.layers_to_transform)
        gpt2 = architecture.model_type == "gpt2"
        fixed = {"layers_to_transform": None, "bias": "none", "fan_in_fan_out": gpt2, "modules_to_save": None}
        return {**self.model_dump(mode="json"), "target_modules": targets, **fixed}

    @classmethod
    def from_peft(cls, entries: dict[str, object], keys: list[str]) -> MethodConfig:
        # The file's keys show the tuned modules; target_modules may be a default that we would have to guess.
        tuned = {key.removeprefix(SiteAdapter.prefix).rpartition(".vera_lambda_")[0] for key in keys} - {""}
        stored = bool(entries.get("save_projection", True)) or "base_model.vera_A" in keys
        known = {"target_modules": sorted(tuned), "layers_to_transform": None, "save_projection": stored}
        return super().from_peft({**entries, **known}, keys)


class VeraLinear(nn.Module):
    """λ_d and λ_b of one linear module, and its parts of A [r, largest in] and B [largest out, r]."""

    def __init__(self, config: VeraConfig, path: str, base: nn.Module, a: Tensor, b: Tensor, context: BuildContext):
        super().__init__()
        inputs, outputs = linear_shape(base)
        self.path, self.dropout = path, config.vera_dropout
        self.a, self.b = a[:, :inputs], b[:outputs]
        if config.init_weights:
            lambda_d, lambda_b = context.zeros(config.r) + config.d_initial, context.zeros(outputs)
        else:
            lambda_d, lambda_b = context.normal(config.r, std=1.0), context.zeros(outputs) + 1
        self.vera_lambda_d, self.vera_lambda_b = nn.Parameter(lambda_d), nn.Parameter(lambda_b)

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """``y + Λ_b B Λ_d A x`` of x [..., in] and y [..., out]."""
        x = seeded_dropout(x, self.dropout, segment, self.path)
        z = (x.reshape(-1, x.shape[-1]).to(y.dtype) @ self.a.to(y.dtype).t()) * self.vera_lambda_d.to(y.dtype)
        # λ_b multiplies B, which has fewer rows than there are tokens, and addmm writes no [N, out] of its own.
        b = self.vera_lambda_b[:, None] * self.b
        return y.reshape(-1, y.shape[-1]).addmm(z, b.to(y.dtype).t()).view_as(y)

    def merge_into(self, merged: MergedModule) -> None:
        """W + Λ_b B Λ_d A."""
        a, b = merged.cast(self.vera_lambda_d)[:, None] * merged.cast(self.a), merged.cast(self.b)
        merged.add_low_rank(a, merged.cast(self.vera_lambda_b)[:, None] * b, 1.0)


class Vera(SiteAdapter):
    """Scaled random projections on every targeted linear module.

    A and B are buffers. A checkpoint holds them, and with ``save_projection`` so does the adapter's file. Loading
    copies into them, so that all layers see the file's values.
    """

    def __init__(self, config: VeraConfig, name: str, context: BuildContext) -> None:
        paths = context.architecture.match(config.target_modules, config.layers_to_transform)
        modules = {path: context.model.get_submodule(path) for path in paths}
        a, b = _projections(config, list(modules.values()), context)
        layers = {path: VeraLinear(config, path, module, a, b=b, context=context) for path, module in modules.items()}
        super().__init__(config, name, layers)
        self.save_projection = config.save_projection
        self.register_buffer("vera_A", a)
        self.register_buffer("vera_B", b)

    def tensors(self) -> Mapping[str, Tensor]:
        shared = ("vera_A", "vera_B") if self.save_projection else ()
        return {**super().tensors(), **{f"base_model.{key}": self.get_buffer(key) for key in shared}}


def _projections(config: VeraConfig, modules: list[nn.Module], context: BuildContext) -> tuple[Tensor, Tensor]:
    """A and B, Kaiming-uniform, as PEFT draws them from the key alone: a file may hold only the key."""
    shapes = [linear_shape(module) for module in modules]
    inputs, outputs = (max(sizes) for sizes in zip(*shapes, strict=True))
    generator = torch.Generator().manual_seed(config.projection_prng_key)
    drawn = []
    for shape in ((config.r, inputs), (outputs, config.r)):
        bound = math.sqrt(3.0) * (math.sqrt(2.0) / math.sqrt(shape[1]))
        drawn.append(torch.empty(shape, dtype=torch.float32).uniform_(-bound, bound, generator=generator))
    a, b = (tensor.to(context.device, context.dtype) for tensor in drawn)
    return a, b
