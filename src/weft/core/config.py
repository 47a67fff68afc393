"""What every method's configuration has in common."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from pydantic import BaseModel, ConfigDict, Field
from torch import Tensor, nn

from weft.core.architecture import Architecture
from weft.core.compose import Combination, Source, combine_like_tensors
from weft.core.route import Router
from weft.errors import UserError

if TYPE_CHECKING:
    from weft.core.adapter import Adapter


@dataclass(frozen=True)
class BuildContext:
    """What a method may look at while it makes an adapter.

    ``keys_values`` runs the plain base on token ids [n] and gives each layer's keys and values [kv_heads, n, head_dim].
    ``blank``: the values will be loaded, or the model is on the meta device and only its shapes are asked, so none
    that cost a tokenizer, a pass of the base or a look at its weights may be made. ``original_weight`` gives the
    weight [out, in] that a quantised module was made from, by the module's path.
    """

    model: nn.Module
    architecture: Architecture
    generator: torch.Generator
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
        """Gaussian numbers from the adapter's own generator; drawn on the CPU so that they do not depend on device."""
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float32) * std
        return values.to(self.device, self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros in the adapter's dtype."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)


class MethodConfig(BaseModel):
    """The settings of one method: frozen, checked on construction, with PEFT's field names.

    A subclass names itself (``method``), says what PEFT calls it (``peft_type``) and builds its adapter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: ClassVar[str]
    peft_type: ClassVar[str]
    # What the folder's file of tensors is called.
    weights_file: ClassVar[str] = "adapter_model.safetensors"
    # Keys of a foreign adapter_config.json that change nothing at inference and may be dropped on reading.
    harmless_keys: ClassVar[frozenset[str]] = frozenset()
    # What a field means that PEFT's file leaves out, where that is not our own default (None: PEFT needs it).
    peft_defaults: ClassVar[Mapping[str, Any]] = {}
    # Fields that PEFT's file does not have, or has in other words: paths instead of names.
    not_in_peft: ClassVar[frozenset[str]] = frozenset()
    # For models of width 2048 and more, and for those of width 128 and less; in between by the width's logarithm.
    default_learning_rate: ClassVar[float] = 1e-3
    small_learning_rate: ClassVar[float | None] = None
    # How trained adapters become a new one (``weft.core.compose``); ``whole_values``: the tensors are values that take
    # the place of the base's and not changes, so they can be averaged but not added.
    combination_types: ClassVar[tuple[str, ...]] = ("linear",)
    whole_values: ClassVar[bool] = False
    # What to do where an adapter cannot become weights of the base (``weft.core.merging``).
    instead_of_merging: ClassVar[str] = "Serve the adapter beside its base instead (weft chat, weft generate)."
    # What the method can be used for.
    tasks: ClassVar[frozenset[str]] = frozenset({"causal_lm", "sequence_classification", "seq2seq"})

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "num_virtual_tokens" in cls.model_fields and cls.combination_types == ("linear",):
            cls.combination_types = (*cls.combination_types, "cat")

    @property
    def begins_as_identity(self) -> bool:
        """Whether a fresh adapter of these settings promises to give what the base gives."""
        return True

    @classmethod
    def learning_rate(cls, hidden_size: int) -> float:
        """The rate that is used when the job names none: small models want larger steps."""
        large, small = cls.default_learning_rate, cls.small_learning_rate
        if small is None:
            return large
        share = min(max(math.log2(2048 / hidden_size) / 4, 0.0), 1.0)
        return float(f"{large ** (1 - share) * small**share:.2g}")

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

    def combine(self, sources: Sequence[Source], how: Combination) -> tuple[MethodConfig, dict[str, Tensor]]:
        """Configuration and tensors of a new adapter made of ``sources``, of which this is the first's configuration.

        Raises:
            UserError: they do not fit together.
        """
        return combine_like_tensors(sources, how)

    def to_peft(self, architecture: Architecture) -> dict[str, Any]:
        """The entries of PEFT's ``adapter_config.json`` that this method adds to the common ones."""
        return self.model_dump(mode="json")

    def in_peft(self) -> dict[str, Any]:
        """Those of these entries that do not depend on the base: an ``adapter_config.json`` beside ours agrees."""
        return {"peft_type": self.peft_type, **self.model_dump(mode="json", exclude=set(self.not_in_peft))}

    @classmethod
    def renamed(cls, entries: Mapping[str, Any]) -> frozenset[str]:
        """Keys that an ``adapter_config.json`` with these entries holds otherwise, so that peft reads the function."""
        return frozenset()

    @classmethod
    def of_layout(cls, entries: Mapping[str, Any]) -> Mapping[str, Any]:
        """Where in an ``adapter_config.json`` of this method's layout the entries of ``in_peft`` stand."""
        return entries

    def own_layout(self, name: str, architecture: Architecture) -> dict[str, Any] | None:
        """The whole ``adapter_config.json`` of adapter ``name``, for methods whose files are not laid out as PEFT's."""
        return None

    @classmethod
    def from_layout(cls, entries: dict[str, Any]) -> MethodConfig | None:
        """The configuration from an ``adapter_config.json`` that is laid out that way; None if it is none of these."""
        return None

    @classmethod
    def from_peft(cls, entries: dict[str, Any], keys: list[str]) -> MethodConfig:
        """Read the method's entries of an ``adapter_config.json`` (the common ones are already taken out).

        ``keys`` are the tensor names of the adapter's file: what was really tuned. Entries that Weft does not know are
        dropped when they are empty or off, else refused. What is not there has PEFT's default, not ours.
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
        return cls(**{**cls.peft_defaults, **known})


class SavesModules(MethodConfig):
    """Of a method that can train whole base modules beside its own parameters: endings of their paths, as in PEFT
    (``norm`` is every ``input_layernorm`` too; ``model.norm`` is one).

    The adapter hands ``weft.core.weights.saved_modules`` of them to ``SiteAdapter``.
    """

    modules_to_save: list[str] | None = Field(
        None, description="endings of the paths of base modules that are trained whole beside it"
    )
