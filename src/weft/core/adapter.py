"""An adapter: the parameters of one named instance of a method, and what it computes at its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from weft.core.config import MethodConfig
from weft.core.head import Head, TokenHead
from weft.core.route import PrefixStates, Segment
from weft.errors import UserError, nearest

# (rows of the module's input, rows of its output, the segment they belong to) -> the rows of the new output.
SiteFunction = Callable[[Tensor, Tensor, Segment], Tensor]
# (rows of the module's input, the segment they belong to) -> the rows that go in instead.
InputFunction = Callable[[Tensor, Segment], Tensor]
# A parameter of a base module -> what the module computes with instead, of the same shape.
ParameterFunction = Callable[[Tensor], Tensor]
# (place, count): that many virtual tokens stand before the sequence's own token ``place``.
Run = tuple[int, int]


class Adapter(nn.Module):
    """Base of all methods. A method overrides what it uses of the four kinds of site:

    *linear* and *hidden* sites by ``sites``, *virtual tokens* by ``virtual_tokens``, *prefix* by ``prefix_states``.
    An adapter lives beside the model, not inside it: the base keeps its modules, keys and parameters.
    """

    def __init__(self, config: MethodConfig, name: str) -> None:
        super().__init__()
        self.config = config
        self.name = name
        # What it answers with: the base's output layer, or a head of its own (``weft.core.heads``). Not on the class,
        # where it would hide the module that is put here later.
        self.head: Head = TokenHead()
        # How its data was read and rendered (``weft.data.provenance``), as JSON; None: not known.
        self.provenance: Mapping[str, Any] | None = None
        # How the base was kept that it was trained on (``weft.core.weights.how_kept``); None: as the one it is on now.
        self.trained_on: Mapping[str, Any] | None = None

    # Lengths are asked for every batch, so they are plain numbers that a method fills in once.
    num_virtual_tokens: int = 0
    num_prefix_tokens: int = 0
    # Of the base; the default learning rate depends on it.
    hidden_size: int = 2048

    @property
    def parts(self) -> Sequence[Adapter]:
        """The methods in it, in order: itself, if it is one only."""
        return (self,)

    @property
    def begins_as_identity(self) -> bool:
        """Whether a fresh adapter promises to give what the base gives: not if it puts something before the text."""
        return self.config.begins_as_identity and not (self.num_virtual_tokens or self.num_prefix_tokens)

    def sites(self) -> Mapping[str, SiteFunction]:
        """Module path -> what happens to that module's output."""
        return {}

    def input_sites(self) -> Mapping[str, InputFunction]:
        """Module path -> what happens to that module's input."""
        return {}

    def parameter_sites(self) -> Mapping[str, Mapping[str, ParameterFunction]]:
        """Module path -> the names of its own parameters -> what each becomes for the adapter's rows."""
        return {}

    def inserted_blocks(self) -> Mapping[str, Sequence[nn.Module]]:
        """Block path -> blocks that run after it, called as it is called."""
        return {}

    def merges(self) -> Mapping[str, Sequence[nn.Module]]:
        """Module path -> the layers that a merge writes into the module's weights, in the order in which they act.

        Each must be ``weft.core.merging.Mergeable``, and all sites among them, or the adapter cannot be merged.
        """
        return {}

    def places(self, length: int, answer: int | None, slots: Sequence[int]) -> Sequence[Run]:
        """Where the virtual tokens stand in a sequence of ``length`` own tokens, in the order of ``virtual_tokens``.

        ``answer`` is the place of the first answer token (None: the text has none; generation: the prompt's end),
        ``slots`` the places that the template names.
        """
        return ((0, self.num_virtual_tokens),)

    def virtual_tokens(self, seed: int | None = None) -> Tensor:
        """Learned rows [num_virtual_tokens, d] that stand in each of the adapter's sequences; ``seed`` fixes what is
        drawn for them (None: nothing)."""
        raise NotImplementedError

    def prefix_states(self) -> PrefixStates:
        """Learned keys and values that every token of the adapter's sequences can attend to, a pair per layer."""
        raise NotImplementedError

    def tensors(self) -> Mapping[str, Tensor]:
        """The adapter's tensors under the names that ``adapter_model.safetensors`` gives them."""
        raise NotImplementedError

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The same under the names of the folder's layout, where that is another one than PEFT's."""
        return self.tensors()

    def extra_tensors(self) -> Mapping[str, Tensor]:
        """What training needs to go on but inference does not (an encoder); a file of its own beside the other."""
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of an ``adapter_model.safetensors``, and the extra ones if they were there.

        Raises:
            UserError: a tensor is missing, has another shape, or is not one of this adapter's.
        """
        copy_into(self.tensors(), tensors)

    def stored_config(self) -> MethodConfig:
        """The configuration that is saved: the adapter's own, with what training has found out."""
        return self.config

    def begin_training(self, total_steps: int) -> None:
        """Told once before the first step (or the first after a resume), with the length of the whole run.

        Raises:
            UserError: the method's schedule does not fit into the run.
        """

    def penalty(self) -> Tensor | None:
        """A scalar that training adds to the loss of every step."""
        return None

    def after_step(self, step: int) -> None:
        """Called after optimizer step ``step`` (from 1), while the gradients are still there. What changes here and is
        needed to go on must be a buffer: checkpoints hold parameters and buffers."""

    def learning_rate_factor(self, parameter: str) -> float:
        """What the learning rate is multiplied by for one parameter, named as ``named_parameters`` does."""
        return 1.0

    def scaled_learning_rate(self, parameter: str, rate: float) -> float:
        """The learning rate of one parameter in a job whose rate is ``rate``."""
        return rate * self.learning_rate_factor(parameter)

    def default_learning_rate(self, parameter: str) -> float:
        """The rate of one parameter if the job names none."""
        return self.config.learning_rate(self.hidden_size)

    def num_trainable(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def master_dtype(base: torch.dtype) -> torch.dtype:
    """Adapters are kept in float32 whatever the base computes in, except beside a float64 base."""
    return torch.float64 if base == torch.float64 else torch.float32


def checked(tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor ``key``, which must have this shape."""
    if key not in tensors:
        raise UserError(f"the adapter's file has no tensor '{key}'.{nearest(key, tensors)}")
    value = tensors[key]
    if tuple(value.shape) != shape:
        why = "Was the adapter made for another base?"
        if not value.numel():
            why = "A tensor of no elements was saved of a model in shards (ZeRO-3, FSDP) that were not gathered before."
        raise UserError(
            f"tensor '{key}' has shape {tuple(value.shape)}; this base and configuration need {shape}. {why}"
        )
    return value


def copy_into(own: Mapping[str, Tensor], tensors: Mapping[str, Tensor]) -> None:
    """Copy a file's tensors into ``own``, which must have the same names and shapes.

    Raises:
        UserError: a tensor is missing, has another shape, or is not one of ``own``.
    """
    for key, parameter in own.items():
        parameter.data.copy_(checked(tensors, key, tuple(parameter.shape)))
    # What is left over would silently be ignored.
    foreign = sorted(set(tensors) - set(own))
    if foreign:
        raise UserError(f"the adapter's file holds tensors that nothing here uses: {', '.join(foreign[:5])} ...")


class SiteAdapter(Adapter):
    """An adapter whose parameters hang on base modules: one small module per site, which is its site function.

    A parameter ``part`` at module ``path`` is stored as ``base_model.model.<path>.<part, '_' as the method says>``.
    ``own``: base tensors that are trained whole beside them (``weft.core.weights``: ``modules_to_save``, biases).
    """

    prefix = "base_model.model."

    def __init__(
        self,
        config: MethodConfig,
        name: str,
        layers: Mapping[str, nn.Module],
        own: Mapping[str, nn.Module] | None = None,
    ) -> None:
        super().__init__(config, name)
        self.paths = list(layers)
        self.layers = nn.ModuleList(layers.values())
        self.own_paths = list(own or {})
        self.own = nn.ModuleList((own or {}).values())

    def stored_name(self, part: str) -> str:
        """What the file calls the parameter ``part`` of a layer."""
        return part

    def sites(self) -> Mapping[str, SiteFunction]:
        functions: dict[str, SiteFunction] = dict(zip(self.paths, self.layers, strict=True))
        for path, weights in zip(self.own_paths, self.own, strict=True):
            # A layer may take the base's bias apart, so it comes before the own bias is put in.
            functions[path] = in_order([functions[path], weights]) if path in functions else weights
        return functions

    def merges(self) -> Mapping[str, Sequence[nn.Module]]:
        layers: dict[str, list[nn.Module]] = {path: [m] for path, m in zip(self.paths, self.layers, strict=True)}
        for path, weights in zip(self.own_paths, self.own, strict=True):
            layers.setdefault(path, []).append(weights)
        return layers

    def tensors(self) -> Mapping[str, Tensor]:
        layers = {
            f"{self.prefix}{path}.{self.stored_name(part)}": parameter
            for path, layer in zip(self.paths, self.layers, strict=True)
            for part, parameter in layer.named_parameters()
        }
        # peft wraps the modules it tunes, and calls what was there the base layer.
        return layers | {
            f"{self.prefix}{path}.{'base_layer.' if path in self.paths else ''}{part}": parameter
            for path, weights in zip(self.own_paths, self.own, strict=True)
            for part, parameter in weights.named_parameters()
        }


def in_order(functions: Sequence[SiteFunction]) -> SiteFunction:
    """One site function that applies several, each to what the one before gave."""

    def run(x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        for function in functions:
            y = function(x, y, segment)
        return y

    return run
