"""Several methods in one adapter: LoRA with BitFit, a prefix with bottleneck adapters (as in MAM, He et al. 2022) …

Each keeps its own configuration and file. Where two of them act at one module, they act in the order of their names.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import ClassVar, TypeVar, cast

import torch
from pydantic import Field, SerializeAsAny
from torch import Tensor, nn

from weft.combine.rules import Combination, Source, combine
from weft.core.adapter import Adapter, BuildContext, InputFunction, MethodConfig, ParameterFunction, Run, SiteFunction
from weft.core.route import PrefixStates, Segment
from weft.errors import UserError
from weft.methods.site_adapter import in_order

T = TypeVar("T")


class CombinedConfig(MethodConfig):
    """The methods, in order."""

    method: ClassVar[str] = "combined"
    peft_type: ClassVar[str] = ""

    parts: tuple[SerializeAsAny[MethodConfig], ...] = Field(min_length=1)

    def methods(self) -> tuple[MethodConfig, ...]:
        return self.parts

    def build(self, name: str, context: BuildContext) -> Adapter:
        parts = [part.build(name, context) for part in self.parts]
        for part in parts:
            part.set_up(context.architecture.hidden_size, part.head)
        return Combined(self, name, parts)

    def combine(self, sources: Sequence[Source], how: Combination) -> tuple[MethodConfig, dict[str, Tensor]]:
        """Part by part: the first parts of all adapters, the second ones …"""
        kinds = [[part.method for part in source.config.methods()] for source in sources]
        if any(kind != kinds[0] for kind in kinds):
            raise UserError(f"the adapters are made of different methods: {', '.join('+'.join(k) for k in kinds)}.")
        configs: list[MethodConfig] = []
        tensors: dict[str, Tensor] = {}
        for index in range(len(self.parts)):
            config, found = combine(
                [Source(one.name, one.config.methods()[index], part_tensors(one.tensors, index)) for one in sources],
                how,
            )
            configs.append(config)
            tensors |= {f"{index}.{key}": tensor for key, tensor in found.items()}
        return CombinedConfig(parts=tuple(configs)), tensors


def part_tensors(tensors: Mapping[str, Tensor], index: int) -> dict[str, Tensor]:
    """The tensors of one part, of any shape, under its own names."""
    prefix = f"{index}."
    return {key.removeprefix(prefix): tensor for key, tensor in tensors.items() if key.startswith(prefix)}


class Combined(Adapter):
    """One adapter made of several parts: its own (a job with several methods) or others (``Adapters.stack``)."""

    def __init__(self, config: CombinedConfig, name: str, parts: Sequence[Adapter]) -> None:
        super().__init__(config, name)
        self.part_modules = nn.ModuleList(parts)
        self.num_virtual_tokens = sum(part.num_virtual_tokens for part in self.parts)
        self.num_prefix_tokens = sum(part.num_prefix_tokens for part in self.parts)
        self.note = " ".join(part.note for part in self.parts if part.note)
        inserting = [part.config.method for part in self.parts if part.inserted_blocks()]
        prefixed = [part.config.method for part in self.parts if part.num_prefix_tokens]
        if inserting and prefixed:
            # There are learned keys for the base's layers only; a new layer in between would attend to none.
            raise UserError(
                f"method {prefixed[0]}+{inserting[0]}: {prefixed[0]} has no keys and values for the blocks that "
                f"{inserting[0]} inserts. Make two jobs of them, or take prompt_tuning or bottleneck beside "
                f"{inserting[0]}."
            )

    @property
    def parts(self) -> Sequence[Adapter]:
        return tuple(cast(Iterable[Adapter], self.part_modules))

    @property
    def begins_as_identity(self) -> bool:
        return all(part.begins_as_identity for part in self.parts)

    def sites(self) -> Mapping[str, SiteFunction]:
        functions = _by_path(part.sites() for part in self.parts)
        return {path: found[0] if len(found) == 1 else _in_order(path, found) for path, found in functions.items()}

    def input_sites(self) -> Mapping[str, InputFunction]:
        functions = _by_path(part.input_sites() for part in self.parts)
        return {path: _inputs_in_order(found) for path, found in functions.items()}

    def parameter_sites(self) -> Mapping[str, Mapping[str, ParameterFunction]]:
        functions: dict[str, dict[str, ParameterFunction]] = {}
        for part in self.parts:
            for path, found in part.parameter_sites().items():
                own = functions.setdefault(path, {})
                for name, function in found.items():
                    own[name] = _parameters_in_order(own[name], function) if name in own else function
        return functions

    def merges(self) -> Mapping[str, Sequence[nn.Module]]:
        groups = _by_path(part.merges() for part in self.parts)
        # As in ``_in_order``, layers that put their own weights in the base's place come first.
        return {
            path: [layer for first in (True, False) for layers in found for layer in layers
                   if first == (len(layers) == 1 and getattr(layer, "replaces_output", False))]
            for path, found in groups.items()
        }  # fmt: skip

    def inserted_blocks(self) -> Mapping[str, Sequence[nn.Module]]:
        blocks = _by_path(part.inserted_blocks() for part in self.parts)
        return {path: [block for own in found for block in own] for path, found in blocks.items()}

    def places(self, length: int, answer: int | None, slots: Sequence[int]) -> Sequence[Run]:
        return [run for part in self.parts if part.num_virtual_tokens for run in part.places(length, answer, slots)]

    def virtual_tokens(self, seed: int | None = None) -> Tensor:
        return torch.cat([part.virtual_tokens(seed) for part in self.parts if part.num_virtual_tokens])

    def prefix_states(self) -> PrefixStates:
        states = [part.prefix_states() for part in self.parts if part.num_prefix_tokens]
        return [
            (torch.cat([k for k, _ in layer], dim=1), torch.cat([v for _, v in layer], dim=1))
            for layer in zip(*states, strict=True)
        ]

    def tensors(self) -> Mapping[str, Tensor]:
        return {f"{i}.{key}": tensor for i, part in enumerate(self.parts) for key, tensor in part.tensors().items()}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        for index, part in enumerate(self.parts):
            part.load_tensors(part_tensors(tensors, index))

    def begin_training(self, total_steps: int) -> None:
        for part in self.parts:
            part.begin_training(total_steps)

    def penalty(self) -> Tensor | None:
        found = [penalty for part in self.parts if (penalty := part.penalty()) is not None]
        return torch.stack(found).sum() if found else None

    def after_step(self, step: int) -> None:
        for part in self.parts:
            part.after_step(step)

    def default_learning_rate(self, parameter: str, writes: bool = True) -> float:
        part, name = self._whose(parameter)
        return (part or self.parts[0]).default_learning_rate(name, writes)

    def learning_rate_factor(self, parameter: str) -> float:
        part, name = self._whose(parameter)
        return 1.0 if part is None else part.learning_rate_factor(name)

    def scaled_learning_rate(self, parameter: str, rate: float) -> float:
        part, name = self._whose(parameter)
        return rate if part is None else part.scaled_learning_rate(name, rate)

    def _whose(self, parameter: str) -> tuple[Adapter | None, str]:
        """Of ``part_modules.<index>.<name>`` the part and the name in it; of the head's parameters no part."""
        if not parameter.startswith("part_modules."):
            return None, parameter
        _, index, name = parameter.split(".", 2)
        return self.parts[int(index)], name


def _by_path(maps: Iterable[Mapping[str, T]]) -> dict[str, list[T]]:
    """Path -> what the parts have there, in their order."""
    found: dict[str, list[T]] = {}
    for one in maps:
        for path, value in one.items():
            found.setdefault(path, []).append(value)
    return found


def _in_order(path: str, functions: Sequence[SiteFunction]) -> SiteFunction:
    """A function that puts its own weights in the base's place comes first, because it ignores the output it gets."""
    replacing = [function for function in functions if getattr(function, "replaces_output", False)]
    if len(replacing) > 1:
        raise UserError(
            f"two of the methods put weights of their own in the place of '{path}'; one would undo the other. Leave "
            "that module to one of them."
        )
    return in_order([*replacing, *(function for function in functions if function not in replacing)])


def _parameters_in_order(first: ParameterFunction, second: ParameterFunction) -> ParameterFunction:
    def run(parameter: Tensor) -> Tensor:
        return second(first(parameter))

    return run


def _inputs_in_order(functions: Sequence[InputFunction]) -> InputFunction:
    def run(x: Tensor, segment: Segment) -> Tensor:
        for function in functions:
            x = function(x, segment)
        return x

    return run
