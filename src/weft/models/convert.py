"""From pickled weights to safetensors: the only place where Weft opens a pickle, by torch's restricted reader.

That reader (``weights_only=True``) builds tensors and plain containers and refuses every other name. It still trusts
the sizes that a file names, so those are compared with the file before anything is copied.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from weft.errors import UserError, reason_of
from weft.files.adapter_folder import WEIGHTS as ADAPTER
from weft.files.adapter_folder import write_json
from weft.files.whole import copy_file, make_folder, new_folder, write_tensors
from weft.foreign import check_regular
from weft.models.gate import PICKLES
from weft.models.originals import weight_map
from weft.paths import local_path

_INDEX = "pytorch_model.bin.index.json"
_ADAPTERS = ("adapter_model.bin", "pytorch_adapter.bin")
_TEXTS = (".json", ".txt", ".model", ".jinja", ".md", ".tiktoken")
_CODE = 64 << 20  # bytes of the pickle itself, which names the tensors
_INSIDE = ("state_dict", "model_state_dict", "model")


@dataclass(frozen=True)
class Conversion:
    """The result of a conversion: the folder, the numbers of tensors and bytes, and the files they came from."""

    folder: Path
    tensors: int
    bytes: int
    files: tuple[str, ...]


def convert_folder(folder: str | Path, output: str | Path) -> Conversion:
    """Write a model's (or an adapter's) folder with its pickled weights as safetensors, beside copies of its texts.

    Raises:
        UserError: There are no such weights, ``output`` is taken, or a file holds anything but tensors. No part of
            the output remains.
    """
    source, output = local_path(folder), local_path(output)
    if not source.is_dir():
        raise UserError(f"no folder at {source}.")
    with new_folder(output) as part:
        files = _pickles(source)
        make_folder(part)
        count, size = _write(files, part)
        for path in sorted(source.iterdir()):
            if path.suffix in _TEXTS and path.name not in (_INDEX,) and path.is_file():
                copy_file(path, part / path.name)
    return Conversion(output, count, size, tuple(path.name for path in files))


def _pickles(folder: Path) -> list[Path]:
    """The files of weights: an adapter's, those of an index, or the only one."""
    for name in _ADAPTERS:
        if (folder / name).exists():
            return [folder / name]
    if (folder / _INDEX).exists():
        return [folder / name for name in sorted(set(weight_map(folder / _INDEX).values()))]
    found = sorted(path for path in folder.iterdir() if path.name.endswith(PICKLES))
    named = [path for path in found if path.name == "pytorch_model.bin"] or found
    if not named:
        raise UserError(f"{folder} holds no pickled weights ({', '.join(PICKLES)}): there is nothing to convert.")
    if len(named) > 1:
        names = ", ".join(path.name for path in named[:5])
        raise UserError(f"{folder} holds several files of weights ({names}) and no {_INDEX}; keep the one that counts.")
    return named


def _write(files: list[Path], part: Path) -> tuple[int, int]:
    """Write each file's tensors; returns the total numbers of tensors and bytes."""
    where: dict[str, str] = {}
    size = 0
    for number, path in enumerate(files, 1):
        name = "model.safetensors" if len(files) == 1 else f"model-{number:05d}-of-{len(files):05d}.safetensors"
        name = ADAPTER if path.name in _ADAPTERS else name
        tensors = read_pickled(path)
        double = next((key for key in tensors if key in where), None)
        if double is not None:
            raise UserError(f"{path}: the tensor {double[:100]!r} is in another file too.")
        where |= dict.fromkeys(tensors, name)
        # A copy each: two names may share one tensor, which safetensors refuses.
        write_tensors({key: value.contiguous().clone() for key, value in tensors.items()}, part / name)
        size += (part / name).stat().st_size
    if len(files) > 1:
        write_json(part / "model.safetensors.index.json", {"metadata": {"total_size": size}, "weight_map": where})
    return len(where), size


def read_pickled(path: Path) -> dict[str, Tensor]:
    """The tensors, of any shape, of a file that ``torch.save`` wrote, by name.

    Raises:
        UserError: It holds anything else, or tensors larger than the file.
    """
    size = check_regular(path).st_size
    _check_archive(path, size)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises many kinds for a damaged file
        if type(error).__name__ == "UnpicklingError":
            lines = (line.strip() for line in str(error).splitlines())
            said = next((line for line in lines if "GLOBAL" in line or "Unsupported" in line), "it is no such pickle")
            raise UserError(f"{path} asks for more than tensors, so it is not read: {said[:200]}") from None
        raise UserError(f"{path} cannot be read: {reason_of(error)[:200]}") from None
    for key in _INSIDE:
        if isinstance(found, Mapping) and isinstance(found.get(key), Mapping):
            found = found[key]
    return dict(_tensors(found, path, size))


def _tensors(found: object, path: Path, size: int) -> Iterator[tuple[str, Tensor]]:
    if not isinstance(found, Mapping) or not found:
        raise UserError(f"{path} holds {type(found).__name__}; expected tensors by name.")
    total = 0
    for key, value in found.items():
        if not isinstance(key, str) or not isinstance(value, Tensor) or value.layout != torch.strided:
            raise UserError(f"{path}: {str(key)[:100]!r} is {type(value).__name__}; expected tensors by name.")
        total += value.numel() * value.element_size()
        # Tied tensors share their storage, so all together may be larger than the file, but not by much.
        if value.numel() * value.element_size() > size or total > 4 * size:
            raise UserError(f"{path}: {key[:100]!r} is said to be larger than the file that it is in.")
        yield key, value.detach()


def _check_archive(path: Path, size: int) -> None:
    """Refuse an archive that unpacks to more than its own size: torch itself compresses nothing."""
    if not zipfile.is_zipfile(path):
        return
    try:
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except (zipfile.BadZipFile, OSError, ValueError, NotImplementedError) as error:
        raise UserError(f"{path} cannot be read: {error}.") from None
    code = sum(one.file_size for one in members if one.filename.endswith(".pkl"))
    if sum(one.file_size for one in members) > size or code > _CODE:
        raise UserError(f"{path} unpacks to more than its {size} bytes, which no file of torch.save does.")
