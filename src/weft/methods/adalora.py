"""AdaLoRA (Zhang et al. 2023): ``W x + s P Λ Q x`` with Λ diagonal (eq. 3), whose entries compete for a budget.

PEFT's names: Q is ``lora_A`` [r, in], P ``lora_B`` [out, r], Λ ``lora_E`` [r, 1]. Λ begins at zero, so that the adapter
begins as the identity. A penalty keeps P and Q near orthogonal (eq. 4):

    γ Σ (||Pᵀ P - I||² + ||Q Qᵀ - I||²)        over all modules, Frobenius norms.

PEFT draws P and Q from a Gaussian of 0.02; here they begin orthonormal, where the penalty is zero at any width.

Every step smooths the sensitivity |w dL/dw| of every weight and its uncertainty (eqs. 9, 10; ``beta1``, ``beta2``);
their product is the weight's score, and a triplet's is that of its λ plus the means over P's and Q's entries (eq. 7).
From ``tinit`` on, every ``deltaT`` steps, only the ``budget`` best triplets of all modules keep their λ (eq. 6); the
others' are zeroed. They may grow again until ``tfinal`` steps before the end, when the ranks become final. The budget
falls cubically (eq. 12).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

import torch
from pydantic import Field, field_validator, model_validator
from torch import Tensor, nn

from weft.base.kinds import linear_shape
from weft.core.adapter import Adapter, BuildContext, MethodConfig
from weft.core.architecture import Architecture
from weft.core.route import Segment
from weft.errors import UserError
from weft.methods.dropout import seeded_dropout
from weft.methods.low_rank import LowRankConfig, check_rank, find_targets
from weft.methods.mergeable import MergedModule
from weft.methods.site_adapter import SiteAdapter
from weft.ops.copying import checked, copy_into
from weft.ops.grouped import RowForm
from weft.ops.lowrank import low_rank_add


class AdaLoraConfig(LowRankConfig):
    """AdaLoRA's settings; PEFT's names and meanings."""

    method: ClassVar[str] = "adalora"
    peft_type: ClassVar[str] = "ADALORA"
    default_learning_rate: ClassVar[float] = 1e-3
    small_learning_rate: ClassVar[float | None] = 2e-2
    # P, Λ and Q of two adapters are unrelated, so there is no rule for combining them; peft has none either.
    combination_types: ClassVar[tuple[str, ...]] = ()
    peft_defaults: ClassVar[Mapping[str, object]] = {
        **LowRankConfig.peft_defaults, "tinit": 0, "tfinal": 0, "deltaT": 1,
    }  # fmt: skip
    harmless_keys: ClassVar[frozenset[str]] = LowRankConfig.harmless_keys | {"r", "init_lora_weights", "alpha_pattern"}

    init_r: int = Field(12, gt=0, description="rank of every matrix at the start")
    target_r: int = Field(8, gt=0, description="mean rank that is left at the end")
    tinit: int | None = Field(None, ge=0, description="steps before ranks are taken away; default: a tenth of the run")
    tfinal: int | None = Field(
        None, ge=0, description="steps at the end with the ranks that are left; default: half of the run"
    )
    deltaT: int | None = Field(  # noqa: N815
        None, gt=0, description="steps from one choice of ranks to the next; default: a hundredth of the run"
    )
    total_step: int | None = Field(None, gt=0, description="steps of the schedule of ranks; default: the whole run")
    beta1: float = Field(0.85, gt=0, lt=1, description="decay of the mean of the sensitivities")
    beta2: float = Field(0.85, gt=0, lt=1, description="decay of the mean of their uncertainty")
    orth_reg_weight: float = Field(0.5, ge=0, description="weight of the loss that keeps P and Q orthogonal")
    rank_pattern: dict[str, list[bool]] | None = Field(
        None, description="which ranks a trained adapter has kept; not to be set"
    )

    @field_validator("rank_pattern")
    @classmethod
    def _none_for_empty(cls, value: dict[str, list[bool]] | None) -> dict[str, list[bool]] | None:
        return value or None

    @model_validator(mode="after")
    def _budget(self) -> AdaLoraConfig:
        if self.target_r > self.init_r:
            raise ValueError(f"target_r is {self.target_r}; it can be 1 to init_r, which is {self.init_r}")
        wrong = next((k for k, kept in (self.rank_pattern or {}).items() if len(kept) != self.init_r), None)
        if wrong is not None:
            raise ValueError(f"rank_pattern of {wrong} must have init_r ({self.init_r}) entries")
        return self

    def build(self, name: str, context: BuildContext) -> Adapter:
        return AdaLora(self, name, context)

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        return {**super().to_peft(architecture), **self._schedule()}

    def in_peft(self) -> dict[str, object]:
        return {**super().in_peft(), **self._schedule()}

    def _schedule(self) -> dict[str, int]:
        """The schedule in the file: peft wants one that fits even for a finished adapter."""
        tinit, tfinal = self.tinit or 0, self.tfinal or 0
        return {
            "tinit": tinit,
            "tfinal": tfinal,
            "deltaT": self.deltaT or 1,
            "total_step": self.total_step or tinit + tfinal + 1,
        }

    @classmethod
    def from_peft(cls, entries: dict[str, object], keys: list[str]) -> MethodConfig:
        alpha = entries.get("lora_alpha", 1)
        if isinstance(alpha, int | float) and alpha <= 0:
            entries = {**entries, "lora_alpha": entries.get("init_r", 12)}  # peft does the same
        return super().from_peft(entries, keys)


class SvdLinear(nn.Module):
    """P, Λ, Q of one linear module, the smoothed scores of their entries, and the ranks that are left of the budget."""

    def __init__(self, config: AdaLoraConfig, path: str, base: nn.Module, context: BuildContext) -> None:
        super().__init__()
        inputs, outputs = linear_shape(base)
        r = check_rank("init_r", config.init_r, path, base, context)
        self.path, self.dropout = path, config.lora_dropout
        self.scaling = config.lora_alpha / (r + 1e-5)  # peft's division
        self.lora_A = nn.Parameter(_orthonormal_columns(inputs, r, context).t().contiguous())
        self.lora_B = nn.Parameter(_orthonormal_columns(outputs, r, context))
        self.lora_E = nn.Parameter(context.zeros(r, 1))
        self.register_buffer("kept", torch.ones(r, dtype=torch.bool, device=context.device))
        for part in ("A", "B", "E"):
            for what in ("sensitivity", "uncertainty"):
                self.register_buffer(f"{what}_{part}", torch.zeros_like(getattr(self, f"lora_{part}").data))

    kept: Tensor

    def forward(self, x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        """``y + s P Λ Q x`` of x [..., in] and y [..., out]."""
        x = seeded_dropout(x, self.dropout, segment, self.path)
        return low_rank_add(y, x, self.lora_A * self.lora_E, self.lora_B, self.scaling)

    def row_form(self) -> RowForm:
        """``y + (s P) (Λ Q) x``."""
        return RowForm(a=self.lora_A * self.lora_E, b=self.scaling * self.lora_B)

    def merge_into(self, merged: MergedModule) -> None:
        """W + s P Λ Q."""
        merged.add_low_rank(merged.cast(self.lora_A) * merged.cast(self.lora_E), self.lora_B, self.scaling)

    def orthogonality(self) -> Tensor:
        """||Pᵀ P - I||² + ||Q Qᵀ - I||², a scalar."""
        eye = torch.eye(len(self.lora_A), dtype=self.lora_A.dtype, device=self.lora_A.device)
        gram_q, gram_p = self.lora_A @ self.lora_A.t(), self.lora_B.t() @ self.lora_B
        return (gram_p - eye).square().sum() + (gram_q - eye).square().sum()

    def smooth(self, beta1: float, beta2: float) -> None:
        """Add this step's gradients to the running means."""
        for part in ("A", "B", "E"):
            parameter = self.get_parameter(f"lora_{part}")
            mean, spread = self.get_buffer(f"sensitivity_{part}"), self.get_buffer(f"uncertainty_{part}")
            now = torch.zeros_like(parameter) if parameter.grad is None else (parameter * parameter.grad).abs()
            mean.copy_(beta1 * mean + (1 - beta1) * now)
            spread.copy_(beta2 * spread + (1 - beta2) * (now - mean).abs())

    def scores(self) -> Tensor:
        """The scores of the triplets, [r]."""
        a, b, e = (self.get_buffer(f"sensitivity_{p}") * self.get_buffer(f"uncertainty_{p}") for p in "ABE")
        return e.view(-1) + a.mean(1) + b.mean(0)

    def forget_scores(self) -> None:
        """Set the running means back to their start."""
        for part in ("A", "B", "E"):
            self.get_buffer(f"sensitivity_{part}").zero_()
            self.get_buffer(f"uncertainty_{part}").zero_()

    def zero_the_rest(self) -> None:
        """Set λ = 0 in the ranks that have no budget."""
        self.lora_E.masked_fill_(~self.kept[:, None], 0.0)

    def stored(self) -> Tensor:
        """The ranks that a file must hold, [r] bool: all but those that were dropped and are still zero."""
        return self.kept | (self.lora_E.detach().view(-1) != 0)


def _orthonormal_columns(rows: int, columns: int, context: BuildContext) -> Tensor:
    drawn = torch.randn(rows, columns, generator=context.generator, dtype=torch.float32)
    # QR's result has columns in sequence; torch's fused AdamW wants a restored state in the parameter's memory order.
    return torch.linalg.qr(drawn).Q.contiguous().to(context.device, context.dtype)


class AdaLora(SiteAdapter):
    """A low-rank update on every targeted linear module; training decides on the ranks."""

    def __init__(self, config: AdaLoraConfig, name: str, context: BuildContext) -> None:
        modules, own = find_targets(config, context)
        super().__init__(config, name, {p: SvdLinear(config, p, m, context) for p, m in modules.items()}, own)
        self.adalora = config
        self.register_buffer("settled", torch.zeros((), dtype=torch.bool, device=context.device))
        self.schedule: tuple[int, int, int] | None = None
        if context.device.type != "meta":
            for path, layer in self._svd_layers():
                pattern = (config.rank_pattern or {}).get(f"{path}.lora_E")
                if pattern is not None:
                    layer.kept.copy_(torch.tensor(pattern))

    settled: Tensor

    def _svd_layers(self) -> list[tuple[str, SvdLinear]]:
        return [(p, m) for p, m in zip(self.paths, self.layers, strict=True) if isinstance(m, SvdLinear)]

    def begin_training(self, total_steps: int) -> None:
        config = self.adalora
        total = config.total_step or total_steps
        if total > total_steps:
            raise UserError(
                f"adalora: total_step is {total}, but the run has {total_steps} steps, so its ranks would never be "
                f"settled; total_step can be 1 to {total_steps} (left out: the whole run)."
            )
        # Defaults must leave room for the settings that are given.
        tinit, tfinal = config.tinit, config.tfinal
        if tinit is None:
            tinit = min(total // 10, max(0, total - (tfinal or 0) - 1))
        if tfinal is None:
            tfinal = min(total // 2, max(0, total - tinit - 1))
        if tinit + tfinal >= total:
            raise UserError(
                f"adalora: tinit ({tinit}) and tfinal ({tfinal}) leave no steps between them in which ranks are "
                f"allotted, for there are {total} in all; tinit + tfinal can be 0 to {total - 1}."
            )
        self.schedule = (tinit, total - tfinal, config.deltaT or max(1, total // 100))
        # A checkpoint, if there is one, is loaded after this.
        self.settled.zero_()

    def budget(self, step: int) -> int:
        """The number of ranks of all modules together after step ``step`` (from 1)."""
        assert self.schedule is not None
        begin, end, _ = self.schedule
        modules, config = len(self.layers), self.adalora
        full, target = config.init_r * modules, config.target_r * modules
        if step <= begin:
            return full
        left = max(0.0, 1 - (step - begin) / (end - begin))
        return int((full - target) * left**3 + target)

    def penalty(self) -> Tensor | None:
        if not self.adalora.orth_reg_weight:
            return None
        return self.adalora.orth_reg_weight * torch.stack([m.orthogonality() for _, m in self._svd_layers()]).sum()

    @torch.no_grad()
    def after_step(self, step: int) -> None:
        assert self.schedule is not None
        begin, end, every = self.schedule
        layers = [layer for _, layer in self._svd_layers()]
        if step < end:
            for layer in layers:
                layer.smooth(self.adalora.beta1, self.adalora.beta2)
            if step > begin and step % every == 0:
                self._allot(self.budget(step))
        elif not self.settled:
            # Not "step == end", because a step whose gradients are not finite is left out.
            self._allot(self.budget(step))
            for layer in layers:
                layer.forget_scores()
            self.settled.fill_(True)
        else:
            for layer in layers:
                layer.zero_the_rest()

    def _allot(self, budget: int) -> None:
        """Keep λ of the ``budget`` triplets with the best scores of all modules."""
        layers = [layer for _, layer in self._svd_layers()]
        scores = torch.cat([layer.scores() for layer in layers])
        # Not by a threshold, because equal scores would all fall with it.
        best = torch.sort(scores, descending=True, stable=True).indices[:budget]
        kept = torch.zeros_like(scores, dtype=torch.bool).index_fill_(0, best, True)
        for layer, own in zip(layers, kept.split([len(layer.kept) for layer in layers]), strict=True):
            layer.kept.copy_(own)
            layer.zero_the_rest()

    def ranks(self) -> dict[str, int]:
        """Module path -> the number of ranks in its file."""
        return {path: int(layer.stored().sum()) for path, layer in self._svd_layers()}

    def stored_config(self) -> MethodConfig:
        stored = {f"{path}.lora_E": layer.stored() for path, layer in self._svd_layers()}
        dropped = any(not bool(own.all()) for own in stored.values())
        pattern = {key: own.tolist() for key, own in stored.items()} if dropped else None
        return self.adalora.model_copy(update={"rank_pattern": pattern})

    def tensors(self) -> Mapping[str, Tensor]:
        tensors = dict(super().tensors())
        for path, layer in self._svd_layers():
            stored = layer.stored()
            if not bool(stored.all()):
                for part in ("lora_A", "lora_E"):
                    tensors[f"{self.prefix}{path}.{part}"] = layer.get_parameter(part)[stored]
                tensors[f"{self.prefix}{path}.lora_B"] = layer.lora_B[:, stored]
        return tensors

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Load a file. Dropped ranks come back as zeros, so that shapes, and sums to the bit, are the same."""
        rest = dict(tensors)
        for path, layer in self._svd_layers():
            kept = layer.kept
            if bool(kept.all()):
                continue
            count = int(kept.sum())
            for part in ("lora_A", "lora_B", "lora_E"):
                full, key = torch.zeros_like(layer.get_parameter(part)), f"{self.prefix}{path}.{part}"
                dim = 1 if part == "lora_B" else 0
                shape = [count if d == dim else size for d, size in enumerate(full.shape)]
                value = checked(rest, key, tuple(shape)).to(full)
                rest[key] = full.index_copy_(dim, kept.nonzero().view(-1), value)
        copy_into(super().tensors(), rest)
