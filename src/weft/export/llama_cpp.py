"""A GGUF file in llama.cpp itself, where llama-cpp-python is installed: the last word on whether a file is right.

Reading a file back shows that it holds what it should; only llama.cpp shows that it makes of it what it should.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from weft.errors import UserError
from weft.export.figures import Distances

if TYPE_CHECKING:
    import llama_cpp

# Below this share of positions with the same likeliest token a file is another model, whatever its format rounds.
LEAST_AGREEMENT = 0.9
_FLOAT_32 = 0  # ggml's number of it: keys and values are kept in 16 bits by default
_ROOM = 8


def installed() -> bool:
    """Whether llama-cpp-python is there."""
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError):  # its library may not load here
        return False
    return True


@dataclass(frozen=True)
class LlamaCppProof:
    """How far a file in llama.cpp is from the model that it was made of.

    Attributes:
        positions: how many logits were compared.
        difference: the largest difference of two logits over the largest logit.
        agreement: the share of positions with the same likeliest token.
        version: of llama-cpp-python.
    """

    positions: int
    difference: float
    agreement: float
    version: str

    @property
    def holds(self) -> bool:
        """Whether it is the same model."""
        return self.agreement >= LEAST_AGREEMENT and math.isfinite(self.difference)

    def line(self) -> str:
        """The figures as a line for people."""
        return (
            f"in llama.cpp (llama-cpp-python {self.version}), {self.positions} positions: same likeliest token at "
            f"{100 * self.agreement:.4g} %, largest relative difference of logits {self.difference:.2g}"
        )


@contextmanager
def opened(path: Path, positions: int, adapter: Path | None = None) -> Iterator[llama_cpp.Llama]:
    """The model of a GGUF file in llama.cpp, on the CPU with one thread, with room for so many positions.

    Args:
        adapter: a LoRA in GGUF to put on it.

    Raises:
        UserError: llama.cpp does not load it.
    """
    import llama_cpp

    try:
        model: Any = llama_cpp.Llama(
            str(path),
            n_ctx=positions + _ROOM,
            n_threads=1,
            n_gpu_layers=0,
            logits_all=True,
            verbose=False,
            type_k=_FLOAT_32,
            type_v=_FLOAT_32,
            lora_path=None if adapter is None else str(adapter),
        )
    except (ValueError, RuntimeError, OSError) as error:
        raise UserError(f"llama.cpp does not load {adapter or path}: {error}") from None
    try:
        yield model
    finally:
        model.close()


def logits(model: llama_cpp.Llama, ids: Sequence[int]) -> Tensor:
    """The logits [positions, tokens] after each of the ids."""
    model.reset()
    model.eval(list(ids))
    return torch.tensor(model.scores[: len(ids)]).double()


def compare(path: Path, expected: Sequence[tuple[list[int], Tensor]], adapter: Path | None = None) -> LlamaCppProof:
    """Compare a file in llama.cpp with logits [positions, tokens] of ids by the model that it was made of.

    Raises:
        UserError: llama.cpp does not load it.
    """
    import llama_cpp

    apart = Distances()
    with opened(path, max(len(ids) for ids, _ in expected), adapter) as model:
        for ids, wanted in expected:
            apart.add(wanted, logits(model, ids))
    return LlamaCppProof(apart.positions, apart.largest, apart.same / apart.positions, llama_cpp.__version__)


def prove(path: Path, expected: Sequence[tuple[list[int], Tensor]], adapter: Path | None = None) -> LlamaCppProof:
    """``compare`` with logits [positions, tokens], for a file that was just written.

    Raises:
        UserError: It is another model.
    """
    proof = compare(path, expected, adapter)
    if not proof.holds:
        raise UserError(f"{path.name} is not the model that it was made of, and nothing is kept: {proof.line()}.")
    return proof
