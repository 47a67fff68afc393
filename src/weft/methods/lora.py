"""LoRA (Hu et al. 2021): ``W x + (alpha / r) B A x`` with A [r, in] random and B [out, r] zero, so that it begins as
the identity. rsLoRA (Kalajdzievski 2023) scales by ``alpha / sqrt(r)`` instead. LoRA+ (Hayou et al. 2024) trains B at a
multiple of A's rate. PiSSA and DoRA are in ``weft.methods.dora``, the first A and B in ``weft.methods.lora_init``.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import ClassVar, cast

from pydantic import Field, PositiveInt, field_validator
from torch import Tensor, nn

from weft.base.kinds import linear_shape
from weft.combine.rules import ON_PRODUCTS, Combination, Source
from weft.core.adapter import Adapter, BuildContext, MethodConfig, ParameterFunction
from weft.core.architecture import Architecture
from weft.core.route import Segment
from weft.errors import UserError
from weft.methods.dora import LoraEmbedding, VariantLinear
from weft.methods.dropout import seeded_dropout
from weft.methods.lora_combine import combine_lora
from weft.methods.lora_init import drawn_factors, loftq_initial_factors, pissa_factors
from weft.methods.lora_parameters import (
    LoraParameter,
    check_patterns,
    find_parameters,
    modules_among,
    name_as_parameters,
    of_pattern,
    stored_paths,
)
from weft.methods.low_rank import LowRankConfig, check_rank, find_targets
from weft.methods.mergeable import MergedModule
from weft.methods.site_adapter import SiteAdapter
from weft.ops.copying import checked, copy_into
from weft.ops.grouped import RowForm
from weft.ops.lowrank import low_rank_add
from weft.patterns import named

# PEFT's other initialisations (pissa, olora, corda, loftq, lora_ga) subtract B A from the base, or quantise it.
_INITS_THAT_KEEP_THE_BASE = frozenset({"gaussian", "eva", "orthogonal"})


class LoraConfig(LowRankConfig):
    """LoRA's settings; PEFT's names and meanings."""

    method: ClassVar[str] = "lora"
    peft_type: ClassVar[str] = "LORA"
    default_learning_rate: ClassVar[float] = 2e-4
    small_learning_rate: ClassVar[float | None] = 2e-3
    own_fields: ClassVar[frozenset[str]] = frozenset({"loraplus_lr_ratio", "loraplus_lr_embedding"})
    not_in_peft: ClassVar[frozenset[str]] = LowRankConfig.not_in_peft | own_fields
    takes_embeddings: ClassVar[bool] = True
    combination_types: ClassVar[tuple[str, ...]] = ON_PRODUCTS

    r: int = Field(8, gt=0, description="rank of the change")
    use_rslora: bool = Field(False, description="scale by `lora_alpha` / √r instead of `lora_alpha` / r")
    use_dora: bool = Field(False, description="learn the direction of the weight and its length apart (DoRA)")
    init_lora_weights: bool | str = Field(
        True,
        description="`true` (A Kaiming-uniform, B zero), `gaussian`, `pissa`, `pissa_niter_<power iterations>` (a "
        "faster SVD), `loftq` (a base quantised to 4 bits), or `false` (both random)",
    )
    rank_pattern: dict[str, PositiveInt] = Field({}, description="other ranks, by module")
    alpha_pattern: dict[str, float] = Field({}, description="other `lora_alpha`, by module")
    target_parameters: list[str] | None = Field(
        None, description="parameters that no linear holds (`mlp.experts.gate_up_proj`), to be adapted as well"
    )
    loraplus_lr_ratio: float | None = Field(None, gt=0, description="B's learning rate (and that of vectors) over A's")
    loraplus_lr_embedding: float = Field(
        1e-6, gt=0, description="with `loraplus_lr_ratio`: the learning rate of LoRA on embeddings"
    )

    @field_validator("init_lora_weights")
    @classmethod
    def _known_init(cls, value: bool | str) -> bool | str:
        if isinstance(value, str) and not re.fullmatch(r"gaussian|loftq|pissa(_niter_\d+)?", value):
            raise ValueError(f"{value!r} is none of true, false, gaussian, pissa, pissa_niter_<number>, loftq")
        return value

    @property
    def begins_as_identity(self) -> bool:
        # PiSSA's and LoftQ's products replace a part of the weight: the sum is the weight but for rounding, or nearly.
        return self.init_lora_weights in (True, "gaussian")

    @property
    def pissa(self) -> bool:
        """Whether A and B begin as the principal part of the weight."""
        return str(self.init_lora_weights).startswith("pissa")

    @property
    def from_weight(self) -> bool:
        """Whether A and B begin as a part of the weight."""
        return self.pissa or self.init_lora_weights == "loftq"

    def check_quantization(self, quantization: str | None) -> None:
        if self.init_lora_weights == "loftq" and quantization not in ("nf4", "fp4"):
            raise UserError(
                f"init_lora_weights: loftq makes up for what 4-bit quantisation lost, and quantization is "
                f"{quantization or 'not set'}. Set quantization: nf4, or use init_lora_weights: true or pissa."
            )

    def check_parameters(self, key: str) -> None:
        """Refuse settings that do not go with ``target_parameters``, which names the parameter ``key``.

        Raises:
            UserError: One is set.
        """
        init = self.init_lora_weights if self.from_weight else None
        wrong = {"lora_dropout": self.lora_dropout, "use_dora": self.use_dora, "init_lora_weights": init}
        for setting, value in wrong.items():
            if value:
                raise UserError(
                    f"{setting}: {value} does not go with target_parameters ('{key}'): LoRA sees only an expert's "
                    "weights there, not its input. Leave one of them out."
                )

    def check_patterns(self, paths: Sequence[str]) -> None:
        """Refuse keys of ``rank_pattern`` and ``alpha_pattern`` that name nothing among the tuned ``paths``.

        Raises:
            UserError: There is one.
        """
        keys = [self._pattern_key(path) for path in paths]
        check_patterns("rank_pattern", self.rank_pattern, keys)
        check_patterns("alpha_pattern", self.alpha_pattern, keys)

    def build(self, name: str, context: BuildContext) -> Adapter:
        return Lora(self, name, context)

    def scaling(self, path: str) -> float:
        """The factor before ``B A x`` at this module or parameter."""
        alpha, r = of_pattern(self.alpha_pattern, self._pattern_key(path), self.lora_alpha), self.rank(path)
        return alpha / (math.sqrt(r) if self.use_rslora else r)

    def rank(self, path: str) -> int:
        """r at this module or parameter, after ``rank_pattern``."""
        return int(of_pattern(self.rank_pattern, self._pattern_key(path), self.r))

    def _pattern_key(self, path: str) -> str:
        """The name that patterns see: the weight's, for a linear that ``target_parameters`` names."""
        return weight if named(weight := f"{path}.weight", self.target_parameters or ()) else path

    def combine(self, sources: Sequence[Source], how: Combination) -> tuple[MethodConfig, dict[str, Tensor]]:
        return combine_lora(sources, how)

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        entries = self._stored(super().to_peft(architecture))
        return name_as_parameters(entries, self.target_parameters, self.targets(architecture), architecture)

    def in_peft(self) -> dict[str, object]:
        return self._stored(super().in_peft())

    @classmethod
    def renamed(cls, entries: Mapping[str, object]) -> frozenset[str]:
        # On a base with experts, see ``name_as_parameters``.
        changed = frozenset({"target_parameters", "rank_pattern", "alpha_pattern", "lora_dropout"})
        return changed if entries.get("target_parameters") else frozenset()

    def _stored(self, entries: dict[str, object]) -> dict[str, object]:
        """The entries that describe the file, where it is not as the settings say."""
        if self.pissa:
            # The file holds B A - B0 A0, of rank 2 r; alpha grows so that the scaling stays.
            factor = math.sqrt(2) if self.use_rslora else 2
            entries |= {
                "r": 2 * self.r,
                "lora_alpha": float(factor * self.lora_alpha),
                "rank_pattern": {pattern: 2 * r for pattern, r in self.rank_pattern.items()},
                "alpha_pattern": {pattern: factor * alpha for pattern, alpha in self.alpha_pattern.items()},
            }
        if self.from_weight:
            entries["init_lora_weights"] = True  # else peft would change the base when it loads the adapter
        return entries

    def targets(self, architecture: Architecture) -> list[str]:
        return [] if self.target_modules == [] and self.target_parameters else super().targets(architecture)

    @classmethod
    def tuned_modules(cls, entries: dict[str, object], keys: list[str]) -> list[str]:
        found = super().tuned_modules(entries, keys)
        return modules_among(found, entries) if entries.get("target_parameters") else found

    @classmethod
    def from_peft(cls, entries: dict[str, object], keys: list[str]) -> MethodConfig:
        entries = dict(entries)
        entries.pop("loftq_config", None)
        how = entries.pop("init_lora_weights", True)
        if isinstance(how, str) and how.lower() not in _INITS_THAT_KEEP_THE_BASE:
            raise UserError(
                f"adapter_config.json: 'init_lora_weights' is {how!r}, which also changed the base's own weights; on "
                "the plain base the adapter would answer differently. Convert it in peft when saving: "
                "path_initial_model_for_weight_conversion."
            )
        return super().from_peft(entries, keys)


class LoraLinear(nn.Module):
    """A and B of one linear module, in the adapter's own dtype. (``weft.models.fused`` computes it in its own way.)"""

    def __init__(self, path: str, a: Tensor, b: Tensor, scaling: float, dropout: float) -> None:
        super().__init__()
        self.path, self.scaling, self.dropout = path, scaling, dropout
        self.lora_A, self.lora_B = nn.Parameter(a.contiguous()), nn.Parameter(b.contiguous())

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """``y + s B A x`` of x [..., in] and y [..., out]."""
        x = seeded_dropout(x, self.dropout, segment, self.path)
        return low_rank_add(y, x, self.lora_A, self.lora_B, self.scaling)

    def row_form(self) -> RowForm:
        """``y + (s B) A x``."""
        return RowForm(a=self.lora_A, b=self.scaling * self.lora_B)

    def merge_into(self, merged: MergedModule) -> None:
        """W + s B A."""
        merged.add_low_rank(self.lora_A, self.lora_B, self.scaling)


def _make_layer(config: LoraConfig, path: str, base: nn.Module, context: BuildContext) -> nn.Module:
    key = f"rank_pattern ({path})" if config.rank(path) != config.r else "r"
    r, scaling = check_rank(key, config.rank(path), path, base, context), config.scaling(path)
    how = config.init_lora_weights
    if isinstance(base, nn.Embedding):
        if config.from_weight:
            raise UserError(
                f"init_lora_weights: {how} is for linear modules, and '{path}' is an embedding; leave it out of "
                "target_modules or use another init_lora_weights."
            )
        return LoraEmbedding(r, base, scaling, context, dora=config.use_dora, identity=bool(how))
    inputs, outputs = linear_shape(base)
    if config.from_weight and context.blank:
        a, b = context.zeros(r, inputs), context.zeros(outputs, r)
    elif config.pissa:
        a, b = pissa_factors(str(how), base, r, scaling, context)
    elif how == "loftq":
        a, b = loftq_initial_factors(path, base, r, scaling, context)
    else:
        a, b = drawn_factors(how, r, inputs, outputs, context)
    if not (config.pissa or config.use_dora):
        return LoraLinear(path, a, b, scaling, config.lora_dropout)
    return VariantLinear(
        path, base, a, b, scaling,
        dropout=config.lora_dropout, context=context, pissa=config.pissa, dora=config.use_dora,
    )  # fmt: skip


def _make_parameter(config: LoraConfig, path: str, name: str, context: BuildContext) -> LoraParameter:
    key, init = f"{path}.{name}", config.init_lora_weights
    return LoraParameter(path, name, context, rank=config.rank(key), scaling=config.scaling(key), init=init)


class Lora(SiteAdapter):
    """A low-rank update on every targeted module."""

    def __init__(self, config: LoraConfig, name: str, context: BuildContext) -> None:
        linears, parameters = find_parameters(config.target_parameters or [], context)
        if parameters:
            config.check_parameters(".".join(parameters[0]))
        modules, own = find_targets(config, context, linears, optional=bool(parameters))
        if not context.loading:  # peft's own files may hold keys that match nothing, and mean nothing by them
            config.check_patterns([*modules, *map(".".join, parameters)])
        super().__init__(config, name, {p: _make_layer(config, p, m, context) for p, m in modules.items()}, own)
        self.lora = config
        self.stacks = nn.ModuleList(_make_parameter(config, *parameter, context) for parameter in parameters)
        self.stack_paths = stored_paths(parameters)

    def parameter_sites(self) -> Mapping[str, Mapping[str, ParameterFunction]]:
        sites: dict[str, dict[str, ParameterFunction]] = {}
        for layer in self._stacks():
            sites.setdefault(layer.path, {})[layer.parameter] = layer
        return sites

    def merges(self) -> Mapping[str, Sequence[nn.Module]]:
        layers: dict[str, list[nn.Module]] = {path: list(found) for path, found in super().merges().items()}
        for layer in self._stacks():
            layers.setdefault(layer.path, []).append(layer)
        return layers

    def _stacks(self) -> list[LoraParameter]:
        return cast(list[LoraParameter], list(self.stacks))

    def _file_tensors(self) -> dict[str, Tensor]:
        """All parameters by their names in the file."""
        stacks = zip(self.stack_paths, self.stacks, strict=True)
        return dict(super().tensors()) | {
            f"{self.prefix}{path}.{part}.weight": p for path, layer in stacks for part, p in layer.named_parameters()
        }

    def stored_name(self, part: str) -> str:
        return f"{part}.weight" if part in ("lora_A", "lora_B") else part

    def tensors(self) -> Mapping[str, Tensor]:
        tensors = self._file_tensors()
        for a_key, b_key, layer in self._pissa_layers():
            tensors[a_key], tensors[b_key] = layer.factors()
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        rest = self.once(tensors)
        for a_key, b_key, layer in self._pissa_layers():
            (r, inputs), outputs = layer.lora_A.shape, len(layer.lora_B)
            a, b = checked(rest, a_key, (2 * r, inputs)), checked(rest, b_key, (outputs, 2 * r))
            assert layer.initial_a is not None
            assert layer.initial_b is not None
            layer.initial_a.copy_(a[r:])
            layer.initial_b.copy_(-b[:, r:])
            rest[a_key], rest[b_key] = a[:r], b[:, :r]
        copy_into(self._file_tensors(), rest)

    def _pissa_layers(self) -> list[tuple[str, str, VariantLinear]]:
        """(A's name in the file, B's name, the layer)."""
        return [
            (f"{self.prefix}{path}.lora_A.weight", f"{self.prefix}{path}.lora_B.weight", m)
            for path, m in zip(self.paths, self.layers, strict=True)
            if isinstance(m, VariantLinear) and m.initial_a is not None
        ]

    def learning_rate_factor(self, parameter: str) -> float:
        ratio = self.lora.loraplus_lr_ratio
        if ratio is None:
            return 1.0
        # Vectors (biases, magnitudes) have B's rate, as in peft's create_loraplus_optimizer.
        return ratio if "lora_B" in parameter or self.get_parameter(parameter).ndim == 1 else 1.0

    def scaled_learning_rate(self, parameter: str, rate: float) -> float:
        owner = self.get_submodule(parameter.rpartition(".")[0])
        if self.lora.loraplus_lr_ratio is not None and isinstance(owner, LoraEmbedding):
            return self.lora.loraplus_lr_embedding
        return super().scaled_learning_rate(parameter, rate)
