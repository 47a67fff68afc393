"""The weights of a quantised base before quantisation, from its files one at a time, for LoftQ."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
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
        files = self._where()
        key = f"{path}.weight"
        found = next((name for name in (key, key.partition(".")[2]) if name in files), None)
        if found is None:
            raise UserError(
                f"{self.folder} holds no tensor '{key}', which the quantised weight of module '{path}' was made from."
            )
        with safe_open(files[found], framework="pt") as file:
            return file.get_tensor(found)

    def _where(self) -> dict[str, Path]:
        if self.files is None:
            one, index = self.folder / WEIGHTS, self.folder / INDEX
            if index.is_file():
                self.files = {key: self.folder / name for key, name in weight_map(index).items()}
            elif one.is_file():
                with safe_open(one, framework="pt") as file:
                    self.files = dict.fromkeys(file.keys(), one)
            else:
                raise UserError(f"{self.folder} holds no {WEIGHTS}, which the weights from before quantisation are in.")
        return self.files


class HeldWeights:
    """The weights of a folder that will be deleted: all of its tensors are in memory."""

    def __init__(self, folder: str | Path) -> None:
        self.tensors: dict[str, Tensor] = load_file(Path(folder) / WEIGHTS)

    def __call__(self, path: str) -> Tensor:
        """The weight [out, in] of the module at ``path``."""
        key = f"{path}.weight"
        return self.tensors[key if key in self.tensors else key.partition(".")[2]].to(torch.float32)
