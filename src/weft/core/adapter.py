"""An adapter: the parameters of one named instance of a method, and what it computes at its sites."""

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
        # A classification job's own head (``weft.core.heads``); None: the base's. Not on the class, where it would hide
        # the module that is put here later.
        self.head: nn.Module | None = None

    # Lengths are asked for every batch, so they are plain numbers that a method fills in once.
    num_virtual_tokens: int = 0
    num_prefix_tokens: int = 0
    # Of the base; the default learning rate depends on it.
    hidden_size: int = 2048

    def sites(self) -> Mapping[str, SiteFunction]:
        """Module path -> what happens to that module's output."""
        return {}

    def input_sites(self) -> Mapping[str, InputFunction]:
        """Module path -> what happens to that module's input."""
        return {}

    def inserted_blocks(self) -> Mapping[str, Sequence[nn.Module]]:
        """Block path -> blocks that run after it, called as it is called."""
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
        own = self.tensors()
        for key, parameter in own.items():
            parameter.data.copy_(checked(tensors, key, tuple(parameter.shape)))
        # What is left over would silently be ignored.
        foreign = sorted(set(tensors) - set(own))
        if foreign:
            raise UserError(f"the adapter's file holds tensors that nothing here uses: {', '.join(foreign[:5])} ...")

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
        raise UserError(
            f"tensor '{key}' has shape {tuple(value.shape)}; this base and configuration need {shape}. "
            "Was the adapter made for another base?"
        )
    return value


class SiteAdapter(Adapter):
    """An adapter whose parameters hang on base modules: one small module per site, which is its site function.

    A parameter ``part`` at module ``path`` is stored as ``base_model.model.<path>.<part, '_' as the method says>``.
    """

    prefix = "base_model.model."

    def __init__(self, config: MethodConfig, name: str, layers: Mapping[str, nn.Module]) -> None:
        super().__init__(config, name)
        self.paths = list(layers)
        self.layers = nn.ModuleList(layers.values())

    def stored_name(self, part: str) -> str:
        """What the file calls the parameter ``part`` of a layer."""
        return part

    def sites(self) -> Mapping[str, SiteFunction]:
        return dict(zip(self.paths, self.layers, strict=True))

    def tensors(self) -> Mapping[str, Tensor]:
        return {
            f"{self.prefix}{path}.{self.stored_name(part)}": parameter
            for path, layer in zip(self.paths, self.layers, strict=True)
            for part, parameter in layer.named_parameters()
        }
