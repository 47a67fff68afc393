"""An adapter: the parameters of one named instance of a method, and its functions at its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import torch
from torch import Tensor, nn

from weft.core.config import MethodConfig
from weft.core.route import PrefixStates, Segment
from weft.errors import UserError, nearest

# (rows of the module's input, rows of its output, the segment they belong to) -> the rows of the new output.
SiteFunction = Callable[[Tensor, Tensor, Segment], Tensor]
# (rows of the module's input, the segment they belong to) -> the rows that go in instead.
InputFunction = Callable[[Tensor, Segment], Tensor]
# A parameter of a base module -> what the module computes with instead, of the same shape.
ParameterFunction = Callable[[Tensor], Tensor]
# (place, count): so many virtual tokens stand before the sequence's own token ``place``.
Run = tuple[int, int]


class Adapter(nn.Module):
    """The base class of all methods. A method overrides the functions of those kinds of site that it uses:

    ``sites`` for *linear* and *hidden* ones, ``virtual_tokens`` for *virtual tokens*, ``prefix_states`` for a *prefix*.
    An adapter lives beside the model, not inside it: the base keeps its modules, keys and parameters.
    """

    def __init__(self, config: MethodConfig, name: str) -> None:
        super().__init__()
        self.config = config
        self.name = name
        # A classification job's own head (``weft.core.heads``); None: the base's. On the class it would hide the module
        # that is put here later.
        self.head: nn.Module | None = None
        # The way its data was read and rendered (``weft.data.provenance``), as JSON; None: it is not known.
        self.provenance: Mapping[str, object] | None = None
        # The dtype and quantization of the base in training (``weft.core.weights.how_kept``); None: those of now.
        self.trained_on: Mapping[str, object] | None = None

    # Every batch asks for these lengths, so they are plain numbers that a method fills in once.
    num_virtual_tokens: int = 0
    num_prefix_tokens: int = 0
    # The width of the base, on which the default learning rate depends.
    hidden_size: int = 2048

    @property
    def begins_as_identity(self) -> bool:
        """Whether a fresh adapter promises the base's results. With tokens or keys before the text it does not."""
        return self.config.begins_as_identity and not (self.num_virtual_tokens or self.num_prefix_tokens)

    def sites(self) -> Mapping[str, SiteFunction]:
        """Module path -> the function that changes the module's output."""
        return {}

    def input_sites(self) -> Mapping[str, InputFunction]:
        """Module path -> the function that changes the module's input."""
        return {}

    def parameter_sites(self) -> Mapping[str, Mapping[str, ParameterFunction]]:
        """Module path -> the names of its own parameters -> the function that changes each for the adapter's rows."""
        return {}

    def inserted_blocks(self) -> Mapping[str, Sequence[nn.Module]]:
        """Block path -> the blocks that run after it, with the same arguments."""
        return {}

    def merges(self) -> Mapping[str, Sequence[nn.Module]]:
        """Module path -> the layers that a merge writes into the module's weights, in the order in which they act.

        Each must be ``weft.core.merging.Mergeable``, and all sites among them, or the adapter cannot be merged.
        """
        return {}

    def places(self, length: int, answer: int | None, slots: Sequence[int]) -> Sequence[Run]:
        """The places of the virtual tokens in a sequence of ``length`` own tokens, in the order of ``virtual_tokens``.

        ``answer`` is the place of the first answer token (in generation the prompt's end; None: the text has none),
        ``slots`` are the places that the template names.
        """
        return ((0, self.num_virtual_tokens),)

    def virtual_tokens(self, seed: int | None = None) -> Tensor:
        """The learned rows [num_virtual_tokens, d] that stand in each of the adapter's sequences.

        ``seed`` fixes the random numbers in them (None: there are none).
        """
        raise NotImplementedError

    def prefix_states(self) -> PrefixStates:
        """Learned keys and values that every token of the adapter's sequences can attend to, a pair per layer."""
        raise NotImplementedError

    def tensors(self) -> Mapping[str, Tensor]:
        """The adapter's tensors, in their own shapes, under their names in ``adapter_model.safetensors``."""
        raise NotImplementedError

    def file_tensors(self) -> Mapping[str, Tensor]:
        """The tensors in their names and shapes of the folder's layout, where that is another one than PEFT's."""
        return self.tensors()

    def extra_tensors(self) -> Mapping[str, Tensor]:
        """Tensors, in their own shapes, that training needs to go on and inference does not (an encoder's).

        They get a file of their own beside the other.
        """
        return {}

    def load_tensors(self, tensors: Mapping[str, Tensor]) -> None:
        """Take over the tensors of an ``adapter_model.safetensors``, and the extra ones if they were there.

        Raises:
            UserError: A tensor is missing, has another shape, or is not one of this adapter's.
        """
        copy_into(self.tensors(), tensors)

    def stored_config(self) -> MethodConfig:
        """The configuration that is saved: the adapter's own, with what training has found."""
        return self.config

    def begin_training(self, total_steps: int) -> None:
        """Prepare for a run of ``total_steps``: before the first step, and before the first after a resume.

        Raises:
            UserError: The method's schedule does not fit into the run.
        """

    def penalty(self) -> Tensor | None:
        """A scalar that training adds to the loss of every step."""
        return None

    def after_step(self, step: int) -> None:
        """React to the optimizer's step ``step`` (from 1), while the gradients are still there.

        A value that changes here and is needed to go on must be a buffer: checkpoints hold parameters and buffers.
        """

    def learning_rate_factor(self, parameter: str) -> float:
        """The factor of the learning rate for one parameter, named as ``named_parameters`` does."""
        return 1.0

    def scaled_learning_rate(self, parameter: str, rate: float) -> float:
        """The learning rate of one parameter in a job whose rate is ``rate``."""
        return rate * self.learning_rate_factor(parameter)

    def default_learning_rate(self, parameter: str) -> float:
        """The rate of one parameter if the job names none."""
        return self.config.learning_rate(self.hidden_size)

    def num_trainable(self) -> int:
        """The number of trained numbers."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)


def master_dtype(base: torch.dtype) -> torch.dtype:
    """The dtype of adapters beside a base of dtype ``base``: float32, except beside a float64 base."""
    return torch.float64 if base == torch.float64 else torch.float32


def checked(tensors: Mapping[str, Tensor], key: str, shape: tuple[int, ...]) -> Tensor:
    """The tensor ``key``, of shape ``shape``.

    Raises:
        UserError: It is missing or has another shape.
    """
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
        UserError: A tensor is missing, has another shape, or is not one of ``own``.
    """
    for key, parameter in own.items():
        parameter.data.copy_(checked(tensors, key, tuple(parameter.shape)))
    # A tensor that is left over would silently be ignored.
    foreign = sorted(set(tensors) - set(own))
    if foreign:
        raise UserError(f"the adapter's file holds tensors that nothing here uses: {', '.join(foreign[:5])} ...")


class SiteAdapter(Adapter):
    """An adapter whose parameters hang on base modules: one small module per site, which is its site function.

    The parameter ``part`` at module ``path`` is stored as ``base_model.model.<path>.<stored_name(part)>``. ``own`` are
    base tensors that are trained whole beside them (``weft.core.weights``: ``modules_to_save``, biases).
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
        """The file's name for the parameter ``part`` of a layer."""
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
        # peft wraps the modules it tunes, and calls the module inside the base layer.
        return layers | {
            f"{self.prefix}{path}.{'base_layer.' if path in self.paths else ''}{part}": parameter
            for path, weights in zip(self.own_paths, self.own, strict=True)
            for part, parameter in weights.named_parameters()
        }


def in_order(functions: Sequence[SiteFunction]) -> SiteFunction:
    """One site function that applies several, each to the result of the one before."""

    def run(x: Tensor, y: Tensor, segment: Segment) -> Tensor:
        for function in functions:
            y = function(x, y, segment)
        return y

    return run
