"""LoRA on parameters that no linear module holds: PEFT's ``target_parameters``, for experts and routers.

A mixture of experts holds the matrices of all experts in one parameter [E, out, in]; each gets a B_e A_e of its own.
PEFT's file keeps them as if they were one linear module: A [E * r, in] and B [out, r * E], under the module's path. If
a module has several parameters, the last has that path, the one before it ``<path>.base_layer``, and so on.
"""

from __future__ import annotations

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
from weft.methods.lora_init import drawn_factors
from weft.methods.mergeable import LARGE
from weft.ops.lowrank import low_rank_merged, stacked_low_rank_add
from weft.patterns import last_parts, named, pattern


def find_parameters(names: Sequence[str], context: BuildContext) -> tuple[list[str], list[tuple[str, str]]]:
    """The linears whose weight ``target_parameters`` names, and (module path, parameter) of its other parameters.

    Raises:
        UserError: A name matches no parameter, or one that cannot be adapted like that.
    """
    model = context.model
    own = {
        f"{path}.{name}": (path, module, name)
        for path, module in (model.named_modules() if names else ())
        for name in module._parameters
        if module._parameters[name] is not None
    }
    for name in names:
        if not any(named(key, [name]) for key in own):
            held = set(context.architecture.experts)
            some = sorted({".".join(key.split(".")[-2:]) for key, (path, _, _) in own.items() if path in held})
            known = f"Its experts' are: {', '.join(some)}." if held else "Its experts, if any, are linear modules."
            kind = context.architecture.model_type
            raise UserError(
                f"target_parameters {name!r} matches no parameter of this {kind} model.{nearest(name, some)} {known}"
            )
    linears, others = [], []
    for key, (path, module, name) in own.items():
        if not named(key, names):
            continue
        if is_linear(module) and isinstance(module, nn.Linear) and name == "weight":
            linears.append(path)
        else:
            _check(key, module, module.get_parameter(name), context)
            others.append((path, name))
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


class LoraParameter(nn.Module):
    """A and B of one parameter [E, out, in] (``transposed``: [E, in, out]) or [out, in]."""

    def __init__(
        self, path: str, name: str, context: BuildContext, *, rank: int, scaling: float, init: bool | str
    ) -> None:
        super().__init__()
        module = context.model.get_submodule(path)
        base, key = module.get_parameter(name), f"{path}.{name}"
        self.path, self.parameter, self.scaling = path, name, scaling
        self.transposed = base.dim() == 3 and bool(getattr(module, "is_transposed", False))
        outputs, inputs = base.shape[-2:] if not self.transposed else base.shape[:-3:-1]
        if not 1 <= rank <= min(inputs, outputs) and not context.loading:
            raise UserError(f"the rank of '{key}' is {rank}, but there it can be 1 to {min(inputs, outputs)}.")
        count = len(base) if base.dim() == 3 else 1
        a, b = drawn_factors(init, rank, inputs, outputs, context, count=count)
        self.lora_A, self.lora_B = nn.Parameter(a), nn.Parameter(b)

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


# On bases with experts PEFT reads these as names of experts, which older transformers kept as linear modules. It then
# adapts today's experts and routers, even if a linear module was meant.
_TAKEN_FOR_EXPERTS = frozenset({"gate", "gate_proj", "up_proj", "down_proj", "w1", "w2", "w3"})


def name_as_parameters(
    entries: dict[str, Any], names: Sequence[str] | None, targets: Sequence[str], architecture: Architecture
) -> dict[str, Any]:
    """PEFT's entries with which it adapts just these targets and parameters.

    The weight of a linear is a parameter too. Under that name it has the same tensors in the file and the same results.
    """
    rest = [path for path in targets if not named(f"{path}.weight", names or ())]
    taken = [path for path in rest if architecture.experts and path.rsplit(".", 1)[-1] in _TAKEN_FOR_EXPERTS]
    if not taken and not names:
        return entries
    ranks, alphas = dict(entries["rank_pattern"]), dict(entries["alpha_pattern"])
    for path in taken:
        key = f"{path}.weight"
        for patterns, default in ((ranks, entries["r"]), (alphas, entries["lora_alpha"])):
            value = of_pattern(patterns, path, default)
            if value != of_pattern(patterns, key, default):
                patterns[re.escape(key)] = value
    return {
        **entries,
        "target_modules": architecture.naming([path for path in rest if path not in set(taken)]),
        "target_parameters": [*(names or ()), *(f"{path}.weight" for path in taken)],
        "layers_to_transform": None,
        "layers_pattern": None,
        "rank_pattern": ranks,
        "alpha_pattern": alphas,
        "lora_dropout": 0.0,  # PEFT has none there; only training needs it, and weft.json holds it
    }


def modules_among(tuned: Sequence[str], entries: dict[str, Any]) -> list[str]:
    """Those of the paths in a file that are of modules which target_modules names, not of parameters."""
    wanted = entries.get("target_modules") or []
    if isinstance(wanted, str) and wanted != "all-linear":
        expression = pattern(wanted, "adapter_config.json: target_modules")
        return [path for path in tuned if expression.full(path)]
    if isinstance(wanted, str):
        holders = {name.rpartition(".")[0] for name in entries["target_parameters"]} - {""}
        paths = [path for path in tuned if not path.endswith(".base_layer")]
        return [path for path in paths if not named(path, holders)]
    return [path for path in tuned if named(path, wanted)]


def of_pattern(patterns: Mapping[str, float], path: str, default: float) -> float:
    """The value of the first pattern that the path ends with, as in PEFT."""
    for text, value in patterns.items():
        if pattern(rf"(.*\.)?({text})$", "rank_pattern or alpha_pattern").begins(path):
            return value
    return default


def check_patterns(key: str, patterns: Mapping[str, float], paths: Sequence[str]) -> None:
    """Refuse a key of ``rank_pattern`` or ``alpha_pattern`` that names none of the tuned modules.

    Raises:
        UserError: A key matches no path.
    """
    for text in patterns:
        if all(of_pattern({text: 1.0}, path, 0.0) == 0.0 for path in paths):
            names = sorted(last_parts(paths))
            raise UserError(
                f"{key}: {text!r} matches no tuned module.{nearest(text, names)} Tuned: {', '.join(names)}."
            )


def stored_paths(parameters: Sequence[tuple[str, str]]) -> list[str]:
    """PEFT's name in the file for each (module path, parameter), in the order of the module's parameters."""
    found = []
    for index, (path, _) in enumerate(parameters):
        after = sum(1 for other, _ in parameters[index + 1 :] if other == path)
        found.append(path + ".base_layer" * after)
    return found
