"""Files in GGUF: what is written into one, and a reader that compares it with what it was made of."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from weft.errors import UserError
from weft.files.writing import writing

if TYPE_CHECKING:
    import gguf

# Beyond this a number of 16 bits is infinite.
_LARGEST_HALF = 65504.0
# A number in blocks of 8 bits lies within half a step, and a step is a 127th of the block's largest. The scale itself
# is kept in 16 bits, which moves the 127th step by 127 / 2048 of a step more.
_BLOCK_STEPS = (0.5 + 127 / 2048) / 127
# The finest first.
FORMATS = {"f32": "F32", "f16": "F16", "bf16": "BF16", "q8_0": "Q8_0"}
Q8_0_BLOCK = 32  # numbers of a row beside one scale
Value = str | int | float | bool | Sequence[str] | Sequence[int] | Sequence[float]


def check_library() -> None:
    """Refuse where the ``gguf`` package is missing; it is not imported.

    Raises:
        UserError: It is not installed.
    """
    if importlib.util.find_spec("gguf") is None:
        raise UserError('GGUF files need the gguf package: pip install "weft[gguf]".')


def gguf_library() -> Any:
    """The ``gguf`` package.

    Raises:
        UserError: It is not installed.
    """
    check_library()
    import gguf

    return gguf


@dataclass
class GgufContent:
    """All that goes into a file: its architecture, its settings, and tensors of any shape by llama.cpp's names.

    Attributes:
        formats: for tensors of two dimensions and more, what each is kept in (``f32`` if not named).
        notes: what the user should know.
    """

    architecture: str
    settings: dict[str, Value] = field(default_factory=dict)
    tensors: dict[str, Tensor] = field(default_factory=dict)
    _: KW_ONLY
    formats: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def keep(self, name: str, tensor: Tensor, kind: str) -> None:
        """Add a tensor of any shape in the format ``kind``, or in the nearest that can hold it.

        Raises:
            UserError: 16 bits cannot hold its numbers.
        """
        self.tensors[name] = tensor
        if tensor.dim() < 2:  # llama.cpp computes with vectors in 32 bits alone
            return
        if kind == "q8_0" and tensor.shape[-1] % Q8_0_BLOCK:
            kind = "f16"
        largest = float(tensor.abs().max()) if tensor.numel() else 0.0
        if kind in ("f16", "q8_0") and largest > (_LARGEST_HALF if kind == "f16" else 127 * _LARGEST_HALF):
            raise UserError(
                f"tensor '{name}' holds {largest:.3g}, and {kind} ends at {_LARGEST_HALF:g}; take --dtype bf16 or f32."
            )
        self.formats[name] = kind

    def read_back_line(self, kind: str) -> str:
        """What ``write_gguf`` has shown, as a line for people."""
        return f"read back by the gguf package: {len(self.tensors)} tensors, each within the rounding of {kind}"


def write_gguf(content: GgufContent, path: Path) -> None:
    """Write a file, and read it again.

    Raises:
        UserError: The file does not hold what it was made of.
        WriteError: The machine refuses to write it.
    """
    gguf = gguf_library()
    with writing(path):
        writer = gguf.GGUFWriter(path, content.architecture)
        for key, value in content.settings.items():
            _put(writer, key, value)
        for name, tensor in content.tensors.items():
            kind = gguf.GGMLQuantizationType[FORMATS[content.formats.get(name, "f32")]]
            data = gguf.quants.quantize(_numbers(tensor), kind)
            writer.add_tensor(name, data, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    check_file(path, content)


def _put(writer: gguf.GGUFWriter, key: str, value: Value) -> None:
    """One setting, in the type that llama.cpp reads it in: its whole numbers are of 32 bits without a sign."""
    if isinstance(value, bool):
        writer.add_bool(key, value)
    elif isinstance(value, str):
        writer.add_string(key, value)
    elif isinstance(value, int):
        writer.add_uint32(key, value)
    elif isinstance(value, float):
        writer.add_float32(key, value)
    else:
        writer.add_array(key, list(value))


def _numbers(tensor: Tensor) -> np.ndarray[Any, np.dtype[np.float32]]:
    return tensor.detach().to(torch.float32).cpu().contiguous().numpy()


def read_tensors(path: Path) -> dict[str, Tensor]:
    """The tensors of a GGUF file by llama.cpp's names, each of its shape, in 32 bits.

    Raises:
        UserError: The file is damaged.
    """
    gguf = gguf_library()
    try:
        found = gguf.GGUFReader(path).tensors
        return {
            one.name: torch.tensor(gguf.quants.dequantize(one.data, one.tensor_type)).reshape(
                [int(side) for side in reversed(one.shape)]
            )
            for one in found
        }
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{path} cannot be read as GGUF: {error}") from None


def matrix_formats(path: Path) -> list[str]:
    """How the matrices of a GGUF file are kept, each format of ``FORMATS`` once, the coarsest last.

    Raises:
        UserError: The file is damaged, or one is kept in another format.
    """
    gguf = gguf_library()
    try:
        found = {one.tensor_type.name for one in gguf.GGUFReader(path).tensors if len(one.shape) > 1}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{path} cannot be read as GGUF: {error}") from None
    known = {theirs: ours for ours, theirs in FORMATS.items()}
    if not found or (strange := sorted(found - known.keys())):
        what = f"keeps matrices as {', '.join(strange)}" if found else "holds no matrices"
        raise UserError(f"{path} {what}; only {', '.join(known.values())} are judged, whose rounding is known.")
    return [word for kind, word in known.items() if kind in found]


def vocabulary(path: Path) -> dict[str, int]:
    """The tokens of a GGUF file that are used, and their ids.

    Raises:
        UserError: The file is damaged, or holds none.
    """
    settings = read_settings(path)
    tokens = settings.get("tokenizer.ggml.tokens")
    if not isinstance(tokens, list):
        raise UserError(f"{path} holds no tokenizer.")
    unused = int(gguf_library().TokenType.UNUSED)
    kinds = settings.get("tokenizer.ggml.token_type") or [0] * len(tokens)
    pairs = enumerate(zip(tokens, kinds, strict=True))
    return {str(token): number for number, (token, kind) in pairs if kind != unused}


def read_settings(path: Path) -> Mapping[str, Any]:
    """The settings of a GGUF file by their keys.

    Raises:
        UserError: The file is damaged.
    """
    try:
        return {key: one.contents() for key, one in gguf_library().GGUFReader(path).fields.items()}
    except (ValueError, IndexError, KeyError, OSError) as error:
        raise UserError(f"{path} cannot be read as GGUF: {error}") from None


def check_file(path: Path, content: GgufContent) -> None:
    """Compare a file, by the gguf package's own reader, with what it was made of.

    Raises:
        UserError: A tensor is missing, new, of another shape, or further off than its format explains.
    """
    found = read_tensors(path)
    if found.keys() != content.tensors.keys():
        wrong = sorted(found.keys() ^ content.tensors.keys())
        raise UserError(f"{path} does not hold the tensors that it was made of: {', '.join(wrong[:3])}.")
    for name, wanted in content.tensors.items():
        here = found[name]
        kind = content.formats.get(name, "f32")
        if here.shape != wanted.shape or not bool(
            ((here - wanted.float()).abs() <= _allowed(wanted.float(), kind)).all()
        ):
            raise UserError(f"{path}: tensor '{name}' is not what it was made of, beyond the rounding of {kind}.")


def _allowed(tensor: Tensor, kind: str) -> Tensor:
    """How far each number of a tensor, of any shape, may be off in a format."""
    if kind == "f32":
        return torch.zeros(())
    if kind == "q8_0":
        blocks = tensor.unflatten(-1, (-1, Q8_0_BLOCK)).abs()
        largest = blocks.amax(-1, keepdim=True).expand_as(blocks).flatten(-2)
        half = torch.finfo(torch.float16)
        return largest * _BLOCK_STEPS * (1 + 1e-6) + 127 * half.smallest_normal * half.eps / 2
    dtype = torch.float16 if kind == "f16" else torch.bfloat16
    # Half a unit in the last place; below the smallest normal number units no longer shrink.
    return tensor.abs().clamp(min=torch.finfo(dtype).smallest_normal) * torch.finfo(dtype).eps / 2
