"""A method's configuration, and an adapter: the parameters of one named instance and what it computes at its sites."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import Any, ClassVar, Protocol

import torch
from pydantic import ConfigDict
from torch import Tensor, nn

from weft.complaints import Worded
from weft.core.architecture import Architecture
from weft.core.head import Head, TokenHead
from weft.core.route import PrefixStates, Router, Segment
from weft.errors import UserError
from weft.ops.copying import copy_into
from weft.ops.rates import rate_for

# (rows of the module's input, rows of its output, the segment they belong to) -> the rows of the new output.
SiteFunction = Callable[[Tensor, Tensor, Segment], Tensor]
# (rows of the module's input, the segment they belong to) -> the rows that go in instead.
InputFunction = Callable[[Tensor, Segment], Tensor]
# A parameter of a base module -> what the module computes with instead, of the same shape.
ParameterFunction = Callable[[Tensor], Tensor]
# (place, count): that many virtual tokens stand before the sequence's own token ``place``.
Run = tuple[int, int]
HEAD_RATES = 2e-4, 2e-3  # of an adapter's own head: for large models and for small ones, as a method's


@dataclass(frozen=True)
class BuildContext:
    """Everything that a method may use while it makes an adapter.

    ``keys_values`` runs the plain base on token ids [n] and gives each layer's keys and values [kv_heads, n, head_dim].
    ``blank`` says that the values will be loaded, or that the model is on the meta device and only shapes are asked:
    the method must not compute values that cost a tokenizer, a pass of the base or a look at its weights.
    ``original_weight`` gives the weight [out, in] from which a quantised module was made, by the module's path.
    """

    model: nn.Module
    architecture: Architecture
    generator: torch.Generator
    _: KW_ONLY
    dtype: torch.dtype
    device: torch.device
    tokenizer: Any = None
    keys_values: Callable[[Tensor], list[tuple[Tensor, Tensor]]] | None = None
    blank: bool = False
    router: Router | None = None
    original_weight: Callable[[str], Tensor] | None = None

    @property
    def loading(self) -> bool:
        """Whether a file's values will come: neither a new adapter nor a check of its configuration."""
        return self.blank and self.device.type != "meta"

    def normal(self, *shape: int, std: float) -> Tensor:
        """Gaussian numbers of shape ``shape`` from the adapter's own generator, drawn on the CPU."""
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float32) * std
        return values.to(self.device, self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of shape ``shape`` in the adapter's dtype."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)


class HeadTask(Protocol):
    """What a head of an adapter's own is to answer; it makes that head."""

    def build(self, context: BuildContext) -> Head:
        """Make the head; its initial values come from ``context.generator`` only."""


class MethodConfig(Worded):
    """The settings of one method: frozen, checked on construction, with PEFT's field names.

    A subclass names itself (``method``), says what PEFT calls it (``peft_type``) and builds its adapter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: ClassVar[str]
    peft_type: ClassVar[str]
    weights_file: ClassVar[str] = "adapter_model.safetensors"  # the folder's file of tensors
    # Keys of a foreign adapter_config.json that change nothing at inference and may be dropped on reading.
    harmless_keys: ClassVar[frozenset[str]] = frozenset()
    # What a field means that PEFT's file leaves out, where that is not our own default (None: PEFT needs it).
    peft_defaults: ClassVar[Mapping[str, object]] = {}
    # Fields that PEFT's file does not have, or has in other words: paths instead of names.
    not_in_peft: ClassVar[frozenset[str]] = frozenset()
    # For models of width 2048 and more, and for those of width 128 and less; in between by the width's logarithm.
    default_learning_rate: ClassVar[float] = 1e-3
    small_learning_rate: ClassVar[float | None] = None
    # How trained adapters become a new one (``weft.combine.rules``); ``whole_values``: the tensors are values that take
    # the place of the base's and not changes, so they can be averaged but not added.
    combination_types: ClassVar[tuple[str, ...]] = ("linear",)
    whole_values: ClassVar[bool] = False
    # What to do where an adapter cannot become weights of the base (``weft.merge.weights``).
    instead_of_merging: ClassVar[str] = "Serve the adapter beside its base instead (weft chat, weft generate)."
    # What the method can be used for.
    tasks: ClassVar[frozenset[str]] = frozenset({"causal_lm", "sequence_classification", "seq2seq"})

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "num_virtual_tokens" in cls.model_fields and cls.combination_types == ("linear",):
            cls.combination_types = (*cls.combination_types, "cat")

    def methods(self) -> tuple[MethodConfig, ...]:
        """The configurations of its methods, in order: itself, if it is one only."""
        return (self,)

    @property
    def begins_as_identity(self) -> bool:
        """Whether a fresh adapter of these settings promises the base's results."""
        return True

    @property
    def draws(self) -> bool:
        """Whether a pass of training draws random numbers: a field that ends in ``dropout`` is above 0."""
        return any(getattr(self, name) for name in type(self).model_fields if name.endswith("dropout"))

    @classmethod
    def learning_rate(cls, hidden_size: int) -> float:
        """The rate of a job that names none."""
        large, small = cls.default_learning_rate, cls.small_learning_rate
        return large if small is None else rate_for(hidden_size, large, small)

    def check_quantization(self, quantization: str | None) -> None:
        """Refuse, before weights are loaded, what does not go with a base quantised like that (None: not at all).

        Raises:
            UserError: it does not.
        """

    def build(self, name: str, context: BuildContext) -> Adapter:
        """Make the adapter ``name``; draws its initial values from ``context.generator`` only.

        Raises:
            UserError: the method finds nothing to tune in this model.
        """
        raise NotImplementedError

    def combine(self, sources: Sequence[Any], how: Any) -> tuple[MethodConfig, dict[str, Tensor]] | None:
        """Combine ``sources``, of which this is the first's configuration.

        Returns:
            The configuration of the new adapter, and its tensors in their shapes. None: ``weft.combine.rules``
            (where ``Source`` and ``Combination`` are) combines them tensor by tensor, as for most methods.

        Raises:
            UserError: They do not fit together.
        """
        return None

    def to_peft(self, architecture: Architecture) -> dict[str, object]:
        """The entries of PEFT's ``adapter_config.json`` that this method adds to the common ones."""
        return self.model_dump(mode="json")

    def in_peft(self) -> dict[str, object]:
        """Those of these entries that do not depend on the base. An ``adapter_config.json`` beside ours must agree."""
        return {"peft_type": self.peft_type, **self.model_dump(mode="json", exclude=set(self.not_in_peft))}

    @classmethod
    def renamed(cls, entries: Mapping[str, object]) -> frozenset[str]:
        """Keys whose values differ in an ``adapter_config.json`` with these entries, so that peft computes the same."""
        return frozenset()

    @classmethod
    def of_layout(cls, entries: Mapping[str, object]) -> Mapping[str, object]:
        """The part of an ``adapter_config.json`` of this method's layout in which the entries of ``in_peft`` stand."""
        return entries

    def own_layout(self, name: str, architecture: Architecture) -> dict[str, object] | None:
        """The whole ``adapter_config.json`` of adapter ``name``, for methods whose layout is not PEFT's; else None."""
        return None

    @classmethod
    def from_layout(cls, entries: dict[str, object]) -> MethodConfig | None:
        """The configuration from an ``adapter_config.json`` in such a layout; None if it is in another.

        Raises:
            UserError: It is in such a layout, and cannot be used.
        """
        return None

    @classmethod
    def from_peft(cls, entries: dict[str, object], keys: list[str]) -> MethodConfig:
        """Read the method's entries of an ``adapter_config.json`` (the common ones are already taken out).

        ``keys`` are the names of the file's tensors, which show what was really tuned. Entries that Weft does not know
        are dropped if they are empty or off, else refused. A missing entry has PEFT's default, not ours.

        Raises:
            UserError: Weft does not know an entry, or one without a default is missing.
        """
        known = {k: v for k, v in entries.items() if k in cls.model_fields}
        for key in entries.keys() - known.keys() - cls.harmless_keys:
            if entries[key] not in (None, False, [], {}, "", 0, "none"):
                raise UserError(
                    f"adapter_config.json: {key!r} is {entries[key]!r}, which changes what a {cls.peft_type} adapter "
                    "computes and which Weft does not know; the adapter would answer differently, so it is not loaded."
                )
        for key, default in cls.peft_defaults.items():
            if default is None and known.get(key) is None:
                raise UserError(f"adapter_config.json: {key!r} is not there, and PEFT has no default for it.")
        return cls.model_validate({**cls.peft_defaults, **known})


class Adapter(nn.Module):
    """Base of all methods. A method overrides what it uses of the four kinds of site:

    *linear* and *hidden* sites by ``sites``, *virtual tokens* by ``virtual_tokens``, *prefix* by ``prefix_states``.
    An adapter lives beside the model, not inside it: the base keeps its modules, keys and parameters.
    """

    def __init__(self, config: MethodConfig, name: str) -> None:
        super().__init__()
        self.config = config
        self.name = name
        # What it answers with. Not on the class, where it would hide the module that ``set_up`` puts here.
        self.head: Head = TokenHead()
        self.provenance: Mapping[str, Any] | None = None
        self.trained_on: Mapping[str, Any] | None = None

    # Lengths are asked for every batch, so they are plain numbers that a method fills in once.
    num_virtual_tokens: int = 0
    num_prefix_tokens: int = 0
    note: str = ""  # what its method has decided for this base, where one may expect otherwise
    hidden_size: int = 2048  # of the base; the default learning rate depends on it

    def set_up(self, hidden_size: int, head: Head) -> None:
        """Take what only the owner knows, once and before use: the base's width, and what the adapter answers with."""
        self.hidden_size, self.head = hidden_size, head

    def record_origin(self, provenance: Mapping[str, Any] | None, trained_on: Mapping[str, Any] | None) -> None:
        """Record where its values come from, for its folder.

        Args:
            provenance: How its data was read and rendered (``weft.data.provenance``), as JSON; None: not known.
            trained_on: How the base was kept that it was trained on (``weft.methods.dense.how_kept``); None: as the
                one it is on now.
        """
        self.provenance, self.trained_on = provenance, trained_on

    @property
    def num_learned_tokens(self) -> int:
        """The positions that the adapter takes of every sequence: virtual tokens and learned keys."""
        return self.num_virtual_tokens + self.num_prefix_tokens

    @property
    def parts(self) -> Sequence[Adapter]:
        """The methods in it, in order: itself, if it is one only."""
        return (self,)

    @property
    def begins_as_identity(self) -> bool:
        """Whether a fresh adapter promises to give what the base gives: not if it puts something before the text."""
        return self.config.begins_as_identity and not (self.num_virtual_tokens or self.num_prefix_tokens)

    @property
    def draws(self) -> bool:
        """Whether a pass of training draws random numbers, which differ from sequence to sequence."""
        return any(part.draws for part in self.config.methods())

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

        Each must be ``weft.methods.mergeable.Mergeable``, and all sites among them, or the adapter cannot be merged.
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

    def default_learning_rate(self, parameter: str, writes: bool = True) -> float:
        """The rate of one parameter if the job, which ``writes`` or not, names none; a head has one for all methods."""
        own_head = parameter.startswith("head.")
        return rate_for(self.hidden_size, *HEAD_RATES) if own_head else self.config.learning_rate(self.hidden_size)

    def num_trainable(self) -> int:
        """How many numbers are trained."""
        return sum(p.numel() for p in self.parameters() if p.requires_grad)
