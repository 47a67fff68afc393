"""Quantised bases: LLM.int8 (Dettmers et al. 2022) and NF4 with double quantisation (Dettmers et al. 2023), by
bitsandbytes. Adapters do not know of it: a site runs the forward of the module's own class."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Literal, get_args

import torch
from torch import nn

from weft.base.packed import PackedLinear
from weft.errors import UserError
from weft.models.products import swap_four_bits

if TYPE_CHECKING:
    from transformers import BitsAndBytesConfig

Kind = Literal["nf4", "fp4", "int8"]
# What a checkpoint may be, but no base is made.
StoredKind = Literal["gptq", "awq"]
KINDS: tuple[str, ...] = (*get_args(Kind), *get_args(StoredKind))
BlockSize = Literal[32, 64, 128, 256, 512, 1024, 2048, 4096]
# By this attribute of a 4-bit linear, bitsandbytes decides whether to pack its weight anew for a CPU.
PACKS = "support_avx512bf16_for_cpu"


@dataclass(frozen=True)
class Quantization:
    """How the linears of a base are kept.

    Attributes:
        kind: The format.
        double: Whether the scales of blocks of 4 bits are quantised themselves.
        block_size: The numbers of 4 bits that share a scale.
        compute_dtype: What 4-bit linears multiply in; None: the dtype of the base.
    """

    kind: Kind | StoredKind
    _: KW_ONLY
    double: bool = True
    block_size: int = 64
    compute_dtype: str | None = None

    @classmethod
    def of(cls, given: Quantization | Kind | None) -> Quantization | None:
        """The choices behind a kind alone, or those that are given."""
        return given if given is None or isinstance(given, Quantization) else cls(given)

    @classmethod
    def recorded(cls, entries: Mapping[str, object], where: object) -> Quantization | None:
        """The choices in a record, as ``record`` writes it; None: the base was not quantised.

        Raises:
            UserError: An entry has no such value; ``where`` names the place of the record.
        """
        kind, double = entries.get("quantization"), entries.get("double_quantization", True)
        block, dtype = entries.get("quantization_block_size", 64), entries.get("quantization_dtype")
        choices: dict[str, tuple[object, tuple[object, ...]]] = {
            "quantization": (kind, (None, *KINDS)),
            "double_quantization": (double, (True, False)),
            "quantization_block_size": (block, get_args(BlockSize)),
            "quantization_dtype": (dtype, (None, "float32", "bfloat16", "float16")),
        }
        for key, (value, known) in choices.items():
            if type(value) not in map(type, known) or value not in known:
                told = ", ".join("null" if one is None else str(one).lower() for one in known)
                raise UserError(f"{where}: {key} is {value!r}; expected one of {told}.")
        if kind is None:
            return None
        return cls(kind, double=double, block_size=block, compute_dtype=dtype)  # type: ignore[arg-type]

    def record(self) -> dict[str, object]:
        """The choices by the names that a run's configuration has for them; what is usual is left out."""
        found: dict[str, object] = {"quantization": self.kind}
        if self.kind in ("nf4", "fp4"):
            found |= {} if self.double else {"double_quantization": False}
            found |= {} if self.block_size == 64 else {"quantization_block_size": self.block_size}
            found |= {} if self.compute_dtype is None else {"quantization_dtype": self.compute_dtype}
        return found

    def __str__(self) -> str:
        """The choices in words: ``nf4, blocks of 128``."""
        rest = self.record()
        words: list[str] = [self.kind]
        words += ["without double quantization"] if "double_quantization" in rest else []
        words += [f"blocks of {self.block_size}"] if "quantization_block_size" in rest else []
        return ", ".join([*words, *([f"computed in {self.compute_dtype}"] if "quantization_dtype" in rest else [])])

    def config(self, dtype: torch.dtype) -> BitsAndBytesConfig:
        """transformers' configuration for loading a base of ``dtype`` in this quantisation.

        Raises:
            UserError: bitsandbytes is not installed.
        """
        try:
            import bitsandbytes  # noqa: F401
        except ImportError:
            raise UserError(f'quantization: {self.kind} needs bitsandbytes: pip install "weft[quant]".') from None
        from weft.models.quantizers import blocks_config

        if self.kind == "int8":
            from transformers import BitsAndBytesConfig

            return BitsAndBytesConfig(load_in_8bit=True)
        return blocks_config(
            self.block_size,
            load_in_4bit=True,
            bnb_4bit_quant_type=self.kind,
            bnb_4bit_use_double_quant=self.double,
            bnb_4bit_compute_dtype=dtype if self.compute_dtype is None else getattr(torch, self.compute_dtype),
        )


def num_parameters(model: nn.Module) -> int:
    """The number of a base's parameters; of those that are packed in few bits as many as they stand for."""
    packed = sum(m.in_features * m.out_features for m in model.modules() if isinstance(m, PackedLinear))
    return packed + sum(getattr(getattr(p, "quant_state", None), "shape", p.shape).numel() for p in model.parameters())


def cast_rest(model: nn.Module, dtype: torch.dtype) -> None:
    """Give the parameters that are not quantised the dtype that is computed in; what has it stays where it is."""
    for parameter in model.parameters():
        whole = parameter.is_floating_point() and getattr(parameter, "quant_state", None) is None
        if whole and parameter.dtype != dtype:
            parameter.data = parameter.data.to(dtype)


def one_kernel(model: nn.Module) -> Callable[[], None]:
    """Let 4-bit linears on a CPU compute the same whoever asks, and as their numbers say; returns what undoes it.

    At the first pass without gradients, bitsandbytes packs their weights anew for a faster kernel that rounds
    differently (by 6e-3 in logits of a tiny Llama). Whether a layer has gradients depends on the methods in the batch.
    And what it computes with AVX-512 may be wrong (``weft.ops.four_bit``).
    """
    packs = [module for module in model.modules() if getattr(module, PACKS, False)]
    for module in packs:
        setattr(module, PACKS, False)
    swap_back = swap_four_bits(model)

    def undo() -> None:
        swap_back()
        for module in packs:
            setattr(module, PACKS, True)

    return undo
