"""A base whose weights stay on the disk while it trains: what it must be, and where its quantised weights are kept.

In their own dtype the weights are those of the model's files, which transformers maps. Quantised ones are made once,
linear by linear, and kept in ``~/.cache/weft/weights`` (``WEFT_CACHE_DIR``, as in ``weft.models.kept``), one folder for
each state of the model's files, kind of quantisation and dtype, in bitsandbytes' format.
"""

from __future__ import annotations

import hashlib
import math
import shutil
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import safe_open
from torch import Tensor, nn

from weft.base.mapped import can_map, give_back, joined, spans_of
from weft.base.streaming import held_tensors
from weft.core.architecture import Architecture
from weft.errors import UserError
from weft.files.whole import make_folder, new_folder, write_tensors
from weft.models.intact import check_numbers, check_whole
from weft.models.quantize import Quantization, cast_rest, one_kernel
from weft.models.quantizers import empty_linears, outputs_first, quantized_parameter
from weft.ops.four_bit import forget_rooms
from weft.paths import cache_folder

Offload = Literal["disk"]

# The share of the bytes of the blocks' matrices that must lie in files. Norms and biases may have another dtype.
_MAPPED = 0.95
_SUFFIX = ".safetensors"


def check_offload(device: torch.device | str, quantization: Quantization | None) -> None:
    """Refuse to keep weights on the disk where that does not work.

    Raises:
        UserError: The device is no CPU, the system does not say what is mapped, or the quantisation is int8.
    """
    if not str(device).startswith("cpu"):
        raise UserError(
            f"offload_param: disk reads the weights into the memory of the CPU, and the device is {str(device)!r}. Set "
            "device: cpu, or leave offload_param out."
        )
    if not can_map():
        raise UserError(
            "offload_param: disk needs Linux, which says what of a file is in memory and takes it out. Leave it out."
        )
    if quantization is not None and quantization.kind == "int8":
        raise UserError(
            "offload_param: disk goes with quantization: nf4 or fp4, or with none; int8 is not written in the form "
            "that is read block by block. Take nf4."
        )


def check_weights(folder: Path) -> None:
    """Read all files of weights once.

    Raises:
        UserError: One is cut off, or a tensor in it holds NaN or infinity; the message names file and tensor.
    """
    for path in sorted(folder.glob(f"*{_SUFFIX}")):
        check_whole(path)
        check_numbers(path)


def stored_dtype(source: Path) -> torch.dtype | None:
    """The floating dtype in which most of a model's weights are stored; None: nothing is known of its files."""
    sizes: dict[str, int] = {}
    for path in source.glob(f"*{_SUFFIX}"):
        with safe_open(path, framework="pt") as file:
            for name in list(file.keys()):
                part = file.get_slice(name)
                sizes[part.get_dtype()] = sizes.get(part.get_dtype(), 0) + math.prod(part.get_shape())
    known = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
    found = {known[name]: count for name, count in sizes.items() if name in known}
    return max(found, key=lambda dtype: found[dtype], default=None)


def check_mapped(model: nn.Module, shape: Architecture, name: str, source: Path | None) -> None:
    """Refuse a model of which too much is in memory for good, and give back what is not.

    ``source`` is the folder of its files, if that is known.

    Raises:
        UserError: Weights of the blocks are not those of a file: their dtype is another one, or they are put together
            while they are loaded.
    """
    inside = [
        (f"{block}.{key}", p) for block in shape.blocks for key, p in model.get_submodule(block).named_parameters()
    ]
    matrices = [(path, p) for path, p in inside if p.dim() > 1]
    spans = spans_of([p.data for _, p in matrices])
    kept = [one for one, span in zip(matrices, spans, strict=True) if span is None]
    total, loose = (sum(p.nbytes for _, p in some) for some in (matrices, kept))
    if loose > (1 - _MAPPED) * total:
        stored = None if source is None else stored_dtype(source)
        here, there = (str(dtype).removeprefix("torch.") for dtype in (kept[0][1].dtype, stored))
        way = f"Set dtype: {there}" if there not in ("None", here) else "Take another base"
        raise UserError(
            f"offload_param: disk reads the weights as the files have them, and {loose / total:.0%} of those in the "
            f"blocks of {name!r} are not so, {kept[0][0]} ({here}) the first: they are converted, or put together, "
            f"while they are loaded. {way}, take quantization: nf4, or leave offload_param out."
        )
    release(model)


def release(model: nn.Module) -> None:
    """Give back all that is mapped of a model."""
    give_back(joined(spans_of(held_tensors(model))))


@dataclass(frozen=True)
class QuantizedFiles:
    """The quantised linears of one base on the disk: a file of tensors for each block, and one for the rest."""

    folder: Path
    kind: Quantization
    _: KW_ONLY
    dtype: torch.dtype

    @classmethod
    def of(cls, source: Path, kind: Quantization, dtype: torch.dtype, root: Path | None = None) -> QuantizedFiles:
        """The place for the model in ``source``, whose files are known by name, size, time and inode.

        Raises:
            UserError: Nothing is kept on this machine.
        """
        root = root or cache_folder()
        if root is None:
            raise UserError(
                f"offload_param: disk with quantization: {kind} keeps the quantised weights in ~/.cache/weft or where "
                "WEFT_CACHE_DIR says, and WEFT_CACHE_DIR is empty. Let it name a folder."
            )
        state = [str(kind), str(dtype), str(source)]
        for path in sorted(source.glob(f"*{_SUFFIX}")):
            found = path.stat()
            state.append(f"{path.name}:{found.st_size}:{found.st_mtime_ns}:{found.st_ctime_ns}:{found.st_ino}")
        name = hashlib.sha256("\0".join(state).encode()).hexdigest()[:32]
        return cls(root / "weights" / f"{source.name[:40]}-{kind.kind}-{name}", kind, dtype=dtype)

    def quantize(self, model: nn.Module, blocks: Sequence[str], source: Path) -> None:
        """Give the linears of a model that was loaded from ``source`` their quantised weights, from the files.

        Files that are not there yet are written first, linear by linear: no more than a block is in memory.

        Raises:
            UserError: bitsandbytes is missing, a file of the model is damaged, or there is no room for the new ones.
        """
        plain = _swap_linears(model, self.kind.config(self.dtype))
        groups = _groups(plain, blocks)
        if not self.folder.is_dir():
            check_weights(source)
            self._write(model, plain, groups)
        for number, paths in groups.items():
            self._read(model, self.folder / f"{number}{_SUFFIX}", paths)
        cast_rest(model, self.dtype)
        one_kernel(model)

    def _write(self, model: nn.Module, plain: dict[str, Tensor], groups: dict[str, list[str]]) -> None:
        make_folder(self.folder.parent, "the cache ")
        needed = sum(weight.numel() for weight in plain.values()) * 0.52
        if (free := shutil.disk_usage(self.folder.parent).free) < needed:
            raise UserError(
                f"{self.folder}: the quantised weights need {needed / 1e9:,.1f} GB, and {free / 1e9:,.1f} are free. "
                "Free some space, or let WEFT_CACHE_DIR name another folder."
            )
        with new_folder(self.folder, "the cache ") as part:
            make_folder(part)
            for number, paths in groups.items():
                tensors: dict[str, Tensor] = {}
                for path in paths:
                    tensors |= _quantized(model.get_submodule(path), plain[path].to(self.dtype), path)
                    give_back(joined(spans_of([plain[path]])))
                write_tensors(tensors, part / f"{number}{_SUFFIX}")
        forget_rooms()

    def _read(self, model: nn.Module, path: Path, linears: Sequence[str]) -> None:
        from bitsandbytes.nn import Params4bit

        if not path.is_file():
            raise UserError(f"{path} is gone. Delete {self.folder}; it is then written again.")
        check_whole(path)
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            for linear in linears:
                begin = f"{linear}.weight."
                stats = {key.removeprefix(begin): file.get_tensor(key) for key in keys if key.startswith(begin)}
                module = model.get_submodule(linear)
                made: Any = Params4bit
                weight = made.from_prequantized(
                    data=file.get_tensor(f"{linear}.weight"), quantized_stats=stats, device="cpu", module=module
                )
                module._parameters["weight"] = weight


def _swap_linears(model: nn.Module, config: Any) -> dict[str, Tensor]:
    """Make quantised linears of those that transformers would, still without weights; returns the plain weights."""
    weights = {path: module._parameters.get("weight") for path, module in model.named_modules()}
    biases = {path: module._parameters.get("bias") for path, module in model.named_modules()}
    empty_linears(model, config)
    found = {}
    for path, module in model.named_modules():
        weight = weights.get(path)
        if type(module).__name__ == "Linear4bit" and weight is not None:
            if biases[path] is not None:
                module._parameters["bias"] = biases[path]
            found[path] = outputs_first(weight.data, module)
    return found


def _groups(linears: dict[str, Tensor], blocks: Sequence[str]) -> dict[str, list[str]]:
    """The linears by the file that they go into."""
    numbers = {block: f"{number:05d}" for number, block in enumerate(blocks)}
    found: dict[str, list[str]] = {}
    for path in linears:
        number = next((numbers[above] for above in _above(path) if above in numbers), "rest")
        found.setdefault(number, []).append(path)
    return found


def _above(path: str) -> Iterator[str]:
    """The paths of the modules that hold the one at ``path``."""
    while path:
        path = path.rpartition(".")[0]
        yield path


def _quantized(module: Any, weight: Tensor, path: str) -> dict[str, Tensor]:
    """The tensors of a quantised weight [out, in], by their names in a file."""
    made = quantized_parameter(weight, module.weight)
    parts = made.quant_state.as_dict(packed=True)
    return {f"{path}.weight": made.data} | {f"{path}.weight.{key}": value for key, value in parts.items()}
