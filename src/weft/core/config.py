"""The base class of every method's configuration."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from weft.core.architecture import Architecture
from weft.core.compose import Combination, Source, combine_like_tensors
from weft.core.route import Router
from weft.errors import UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from weft.core.adapter import Adapter


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
    dtype: torch.dtype
    device: torch.device
    tokenizer: PreTrainedTokenizerBase | None = None
    keys_values: Callable[[Tensor], list[tuple[Tensor, Tensor]]] | None = None
    blank: bool = False
    router: Router | None = None
    original_weight: Callable[[str], Tensor] | None = None

    @property
    def loading(self) -> bool:
        """Whether a file's values will come: neither a new adapter nor a check of its configuration."""
        return self.blank and self.device.type != "meta"

    def normal(self, *shape: int, std: float) -> Tensor:
        """Gaussian numbers of shape ``shape`` from the adapter's own generator, on the CPU whatever the device is."""
        values = torch.randn(*shape, generator=self.generator, dtype=torch.float32) * std
        return values.to(self.device, self.dtype)

    def zeros(self, *shape: int) -> Tensor:
        """Zeros of shape ``shape`` in the adapter's dtype."""
        return torch.zeros(*shape, dtype=self.dtype, device=self.device)


class MethodConfig(BaseModel):
    """The settings of one method: frozen, checked on construction, with PEFT's field names.

    A subclass gives its name (``method``) and PEFT's (``peft_type``), and builds its adapter.
    """

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)

    method: ClassVar[str]
    peft_type: ClassVar[str]
    # The name of the folder's file of tensors.
    weights_file: ClassVar[str] = "adapter_model.safetensors"
    # Keys of a foreign adapter_config.json that change nothing at inference and may be dropped on reading.
    harmless_keys: ClassVar[frozenset[str]] = frozenset()
    # PEFT's default for a field that its file leaves out, where it is not ours (None: PEFT has none).
    peft_defaults: ClassVar[Mapping[str, object]] = {}
    # Fields that PEFT's file does not have, or has in another form: paths instead of names.
    not_in_peft: ClassVar[frozenset[str]] = frozenset()
    # The rates for models of width 2048 and more, and of 128 and less; in between the width's logarithm decides.
    default_learning_rate: ClassVar[float] = 1e-3
    small_learning_rate: ClassVar[float | None] = None
    # The rules by which trained adapters become a new one (``weft.core.compose``). ``whole_values``: the tensors take
    # the place of the base's and are no changes, so they can be averaged but not added.
    combination_types: ClassVar[tuple[str, ...]] = ("linear",)
    whole_values: ClassVar[bool] = False
    # The advice where an adapter cannot become weights of the base (``weft.core.merging``).
    instead_of_merging: ClassVar[str] = "Serve the adapter beside its base instead (weft chat, weft generate)."
    # The tasks that the method can be used for.
    tasks: ClassVar[frozenset[str]] = frozenset({"causal_lm", "sequence_classification", "seq2seq"})

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: object) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        if "num_virtual_tokens" in cls.model_fields and cls.combination_types == ("linear",):
            cls.combination_types = (*cls.combination_types, "cat")

    @property
    def begins_as_identity(self) -> bool:
        """Whether a fresh adapter of these settings promises the base's results."""
        return True

    @classmethod
    def learning_rate(cls, hidden_size: int) -> float:
        """The rate of a job that names none: small models want larger steps."""
        large, small = cls.default_learning_rate, cls.small_learning_rate
        if small is None:
            return large
        share = min(max(math.log2(2048 / hidden_size) / 4, 0.0), 1.0)
        return float(f"{large ** (1 - share) * small**share:.2g}")

    def check_quantization(self, quantization: str | None) -> None:
        """Refuse, before weights are loaded, a quantisation of the base that these settings cannot use (None: none).

        Raises:
            UserError: They cannot use it.
        """

    def build(self, name: str, context: BuildContext) -> Adapter:
        """Make the adapter ``name``; draws its initial values from ``context.generator`` only.

        Raises:
            UserError: The method finds nothing to tune in this model.
        """
        raise NotImplementedError

    def combine(self, sources: Sequence[Source], how: Combination) -> tuple[MethodConfig, dict[str, Tensor]]:
        """Combine ``sources``, of which this is the first's configuration.

        Returns:
            The configuration of the new adapter, and its tensors in the shapes of its file.

        Raises:
            UserError: They do not fit together.
        """
        return combine_like_tensors(sources, how)

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
        """The configuration from an ``adapter_config.json`` in such a layout; None if it is in another."""
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
        return cls(**{**cls.peft_defaults, **known})


class SavesModules(MethodConfig):
    """Settings of a method that can train whole base modules beside its own parameters.

    ``modules_to_save`` holds endings of their paths, as in PEFT: ``norm`` names every ``input_layernorm`` too,
    ``model.norm`` names one. The adapter hands ``weft.core.weights.saved_modules`` of them to ``SiteAdapter``.
    """

    modules_to_save: list[str] | None = None
