"""LoRA on parameters that no linear module holds: PEFT's ``target_parameters``, for experts and routers.

A mixture of experts holds the matrices of all experts in one parameter [E, out, in]; each gets a B_e A_e of its own.
PEFT's file keeps them as if they were one linear module: A [E * r, in] and B [out, r * E], under the module's path. If
a module has several parameters, the last has that path, the one before it ``<path>.base_layer``, and so on.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.base.kinds import holds_experts, holds_layers, is_layer, is_linear
from weft.core.adapter import BuildContext
from weft.core.architecture import Architecture
from weft.core.site import plain_class
from weft.errors import UserError, nearest
from weft.methods.lora_init import LoraSettings
from weft.methods.mergeable import LARGE
from weft.ops.lowrank import low_rank_merged, stacked_low_rank_add
from weft.patterns import pattern


def names_parameter(names: Sequence[str] | None, key: str) -> bool:
    """Whether ``target_parameters`` names the parameter: by its whole name or the last parts of it, as in PEFT."""
    return any(key == name or key.endswith(f".{name}") for name in names or ())


def find_parameters(config: LoraSettings, context: BuildContext) -> tuple[list[str], list[tuple[str, str]]]:
    """The linears whose weight ``target_parameters`` names, and (module path, parameter) of its other parameters.

    Raises:
        UserError: A name matches no parameter, or one that cannot be adapted like that.
    """
    model, names = context.model, config.target_parameters or []
    own = {
        f"{path}.{name}": (path, module, name)
        for path, module in (model.named_modules() if names else ())
        for name in module._parameters
        if module._parameters[name] is not None
    }
    for name in names:
        if not any(names_parameter([name], key) for key in own):
            held = set(context.architecture.experts)
            some = sorted({".".join(key.split(".")[-2:]) for key, (path, _, _) in own.items() if path in held})
            known = f"Its experts' are: {', '.join(some)}." if held else "Its experts, if any, are linear modules."
            kind = context.architecture.model_type
            raise UserError(
                f"target_parameters {name!r} matches no parameter of this {kind} model.{nearest(name, some)} {known}"
            )
    linears, others = [], []
    for key, (path, module, name) in own.items():
        if not names_parameter(names, key):
            continue
        if is_linear(module) and isinstance(module, nn.Linear) and name == "weight":
            linears.append(path)
        else:
            _check(key, module, module.get_parameter(name), context)
            others.append((path, name))
    if others:
        _check_settings(config, ".".join(others[0]))
    return linears, others


def _check(key: str, module: nn.Module, parameter: Tensor, context: BuildContext) -> None:
    path = key.rpartition(".")[0]
    kind = plain_class(module).__name__
    if is_layer(module):
        raise UserError(
            f"target_parameters names '{key}' of a {kind}; a linear module or an embedding is named in target_modules, "
            "and nothing else of one can be adapted by lora."
        )
    if path in context.architecture.blocks or not path:
        raise UserError(f"target_parameters names '{key}', which belongs to a whole block ({kind}); that is not known.")
    if holds_experts(path, module) and path not in context.architecture.experts:
        raise UserError(
            f"target_parameters names '{key}' of a {kind}, which is not called with the text's tokens one by one. "
            "Which adapter its rows belong to is not known there, so it cannot be adapted."
        )
    if holds_layers(module):
        raise UserError(
            f"target_parameters names '{key}' of a {kind}, which holds other layers; only experts, routers "
            "and their like can be adapted like that."
        )
    if parameter.dim() not in (2, 3):
        raise UserError(f"target_parameters names '{key}' of {parameter.dim()} dimensions; it must have 2 or 3.")
    if not parameter.is_floating_point() or parameter.element_size() < 2:
        raise UserError(
            f"target_parameters names '{key}', which is quantised ({parameter.dtype}); load the base in bf16 or fp32."
        )


def _check_settings(config: LoraSettings, key: str) -> None:
    wrong = {
        "lora_dropout": config.lora_dropout,
        "use_dora": config.use_dora,
        "init_lora_weights": config.init_lora_weights if config.pissa or config.init_lora_weights == "loftq" else None,
    }
    for setting, value in wrong.items():
        if value:
            raise UserError(
                f"{setting}: {value} does not go with target_parameters ('{key}'): LoRA sees only an expert's weights "
                "there, not its input. Leave one of them out."
            )


class LoraParameter(nn.Module):
    """A and B of one parameter [E, out, in] (``transposed``: [E, in, out]) or [out, in]."""

    def __init__(self, config: LoraSettings, path: str, name: str, context: BuildContext) -> None:
        super().__init__()
        module = context.model.get_submodule(path)
        base, key = module.get_parameter(name), f"{path}.{name}"
        self.path, self.parameter, self.scaling = path, name, config.scaling(key)
        self.transposed = base.dim() == 3 and bool(getattr(module, "is_transposed", False))
        outputs, inputs = base.shape[-2:] if not self.transposed else base.shape[:-3:-1]
        count, r = (len(base) if base.dim() == 3 else 1), config.rank(key)
        if not 1 <= r <= min(inputs, outputs) and not context.loading:
            raise UserError(f"the rank of '{key}' is {r}, but there it can be 1 to {min(inputs, outputs)}.")
        self.lora_A = nn.Parameter(_drawn(config, r, r * count, inputs, inputs=inputs, context=context))
        if config.init_lora_weights:
            b = context.zeros(outputs, r * count)
        else:
            b = context.normal(outputs, r * count, std=1.0 / math.sqrt(3 * inputs))
        self.lora_B = nn.Parameter(b)

    def forward(self, weight: Tensor) -> Tensor:
        """The parameter with the update, in weight's shape and dtype."""
        if weight.dim() == 3:
            return stacked_low_rank_add(weight, self.lora_A, self.lora_B, self.scaling, transposed=self.transposed)
        return low_rank_merged(weight, self.lora_A.to(weight.dtype), self.lora_B.to(weight.dtype), self.scaling)

    def merged(self, weight: Tensor) -> Tensor:
        """``forward`` in double precision (in single for very large stacks), rounded once; in weight's shape."""
        wide = torch.float32 if weight.numel() > LARGE and weight.dtype != torch.float64 else torch.float64
        a, b = self.lora_A.detach().to(wide), self.lora_B.detach().to(wide)
        if weight.dim() == 3:
            added = stacked_low_rank_add(weight.to(wide), a, b, self.scaling, transposed=self.transposed)
        else:
            added = low_rank_merged(weight.to(wide), a, b, self.scaling)
        return added.to(weight.dtype)


def _drawn(config: LoraSettings, r: int, rows: int, columns: int, inputs: int, context: BuildContext) -> Tensor:
    """A, as ``lora_init.drawn_factors`` draws it for a linear module."""
    if config.init_lora_weights == "gaussian":
        return context.normal(rows, columns, std=1.0 / r)
    uniform = torch.rand(rows, columns, generator=context.generator, dtype=torch.float32) * 2 - 1
    return (uniform / math.sqrt(inputs)).to(context.device, context.dtype)


# On bases with experts PEFT reads these as names of experts, which older transformers kept as linear modules. It then
# adapts today's experts and routers, even if a linear module was meant.
_TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def name_as_parameters(
    entries: dict[str, Any], names: Sequence[str] | None, targets: Sequence[str], architecture: Architecture
) -> dict[str, Any]:
    """PEFT's entries with which it adapts just these targets and parameters.

    The weight of a linear is a parameter too. Under that name it has the same tensors in the file and the same results.
    """
    by_weight = [
        path
        for path in targets
        if names_parameter(names, f"{path}.weight")
        or (architecture.experts and path.rsplit(".", 1)[-1] in _TAKEN_FOR_EXPERTS)
    ]
    if not by_weight and not names:
        return entries
    ranks, alphas = dict(entries["rank_pattern"]), dict(entries["alpha_pattern"])
    for path in by_weight:
        key = f"{path}.weight"
        if names_parameter(names, key):
            continue
        for patterns, default in ((ranks, entries["r"]), (alphas, entries["lora_alpha"])):
            value = of_pattern(patterns, path, default)
            if value != of_pattern(patterns, key, default):
                patterns[re.escape(key)] = value
    found = [f"{path}.weight" for path in by_weight if not names_parameter(names, f"{path}.weight")]
    rest = [path for path in targets if path not in set(by_weight)]
    return {
        **entries,
        "target_modules": architecture.naming(rest),
        "target_parameters": [*(names or ()), *found],
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,  # PEFT has none there; only training needs it, and weft.json holds it
    }


def modules_among(tuned: Sequence[str], entries: dict[str, Any]) -> list[str]:
    """Those of the paths in a file that are of modules which target_modules names, not of parameters."""
    named = entries.get("target_modules") or []
    if isinstance(named, str) and named != "all-linear":
        named_so = pattern(named, "adapter_config.json: target_modules")
        return [path for path in tuned if named_so.full(path)]
    if isinstance(named, str):
        holders = {name.rpartition(".")[0] for name in entries["target_parameters"]} - {""}
        paths = [path for path in tuned if not path.endswith(".base_layer")]
        return [path for path in paths if not names_parameter(sorted(holders), path)]
    return [path for path in tuned if names_parameter(named, path)]


def of_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that the path ends with, as in PEFT."""
    for text, value in patterns.items():
        if pattern(rf"(.*\.)?({text})$", "rank_pattern or alpha_pattern").begins(path):
            return value
    return default


def stored_paths(parameters: Sequence[tuple[str, str]]) -> list[str]:
    """PEFT's name in the file for each (module path, parameter), in the order of the module's parameters."""
    found = []
    for index, (path, _) in enumerate(parameters):
        after = sum(1 for other, _ in parameters[index + 1 :] if other == path)
        found.append(path + ".base_layer" * after)
    return found
