"""The weights of a quantised base before quantisation, from its files one at a time, for LoftQ."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file
from torch import Tensor

from weft.errors import UserError
from weft.foreign import entry, expect, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"


def weight_map(index: Path) -> dict[str, str]:
    """Tensor -> the file that holds it, by ``model.safetensors.index.json``.

    Raises:
        UserError: The index does not say so, or names a file that is not beside it.
    """
    found = entry(read_json(index), "weight_map", dict, str(index))
    for key, name in found.items():
        if Path(expect(name, str, f"{index}: weight_map: {key[:80]}")).name != name:
            raise UserError(f"{index}: weight_map: {key[:80]!r} is in {name[:200]!r}, which is no file of this folder.")
    return found


class OriginalWeights:
    """The weights [out, in] of a model folder by the paths of their modules; no more than one is in memory.

    Checkpoints of the bare body (GPT-2's, BLOOM's) name their tensors without the model's first part. The path is then
    shortened too.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.files: dict[str, Path] | None = None

    def __call__(self, path: str) -> Tensor:
        """The weight [out, in] of the module at ``path``.

        Raises:
            UserError: The folder has no safetensors, or none under that name.
        """
        key = f"{path}.weight"
        found = self.place(key)
        if found is None:
            raise UserError(
                f"{self.folder} holds no tensor '{key}', which the quantised weight of module '{path}' was made from."
            )
        with safe_open(found[0], framework="pt") as file:
            return file.get_tensor(found[1])

    def place(self, key: str) -> tuple[Path, str] | None:
        """The file that holds the tensor of this name in the model, and its name there; None: there is none.

        Raises:
            UserError: The folder has no safetensors.
        """
        files = self._where()
        return next(((files[name], name) for name in (key, key.partition(".")[2]) if name in files), None)

    def _where(self) -> dict[str, Path]:
        if self.files is None:
            one, index = self.folder / WEIGHTS, self.folder / INDEX
            if one.is_file():  # an index beside it is left over, and the loader does not look at it either
                with safe_open(one, framework="pt") as file:
                    self.files = dict.fromkeys(file.keys(), one)
            elif index.is_file():
                self.files = {key: self.folder / name for key, name in weight_map(index).items()}
            else:
                raise UserError(f"{self.folder} holds no {WEIGHTS}, which the weights from before quantisation are in.")
        return self.files


def stored_tensors(folder: Path, names: Mapping[str, Sequence[str]]) -> dict[str, Tensor] | None:
    """The tensors [...] of a model folder, each under one of its names in the model; None: one is not stored."""
    weights = OriginalWeights(folder)
    found = {}
    try:
        for key, others in names.items():
            place = next((place for name in others if (place := weights.place(name)) is not None), None)
            if place is None:
                return None
            with safe_open(place[0], framework="pt") as file:
                found[key] = file.get_tensor(place[1])
    except (UserError, OSError, SafetensorError):  # whoever loads the weights says what is wrong with them
        return None
    return found


class HeldWeights:
    """The weights of a folder that will be deleted: all of its tensors are in memory."""

    def __init__(self, folder: str | Path) -> None:
        self.tensors: dict[str, Tensor] = load_file(Path(folder) / WEIGHTS)

    def __call__(self, path: str) -> Tensor:
        """The weight [out, in] of the module at ``path``."""
        key = f"{path}.weight"
        return self.tensors[key if key in self.tensors else key.partition(".")[2]].to(torch.float32)
