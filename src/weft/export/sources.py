"""What is merged: one adapter's folder, or several with a weight each."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.data import provenance
from weft.errors import UserError
from weft.files import adapter_folder as files
from weft.files.run_folder import RUN_FILE, RunStore
from weft.files.whole import sha256_of
from weft.generation.target import Target
from weft.methods.dense import KEPT
from weft.paths import local_path
from weft.training.config import read_run_config
from weft.training.same_run import other_base

_SUM = "weighted-sum"


@dataclass(frozen=True)
class Sources:
    """The folders of adapters to merge, and a weight for each; none for a single one.

    Attributes:
        folders: the adapters' own folders, in order.
    """

    folders: tuple[Path, ...]
    weights: tuple[float, ...] = ()

    @classmethod
    def of(cls, adapter: str | Path | Sequence[str | Path], weights: Sequence[float]) -> Sources:
        """The sources that a user's words mean.

        Raises:
            UserError: A folder holds no adapter, stands there twice, or there is not one weight for each.
        """
        given = [adapter] if isinstance(adapter, (str, Path)) else adapter
        folders = [adapter_folder(local_path(one)) for one in given]
        if not folders:
            raise UserError("no adapter is named; give the folder of one.")
        if len({folder.resolve() for folder in folders}) < len(folders):
            raise UserError(f"{', '.join(map(str, folders))}: an adapter is named twice. Add its weights instead.")
        if weights and len(weights) != len(folders):
            names = ", ".join(map(str, folders))
            raise UserError(f"--weights: {len(weights)} given for {len(folders)}: {names}. Give one for each adapter.")
        if len(folders) == 1 and not weights:
            return cls(tuple(folders))
        return cls(tuple(folders), tuple(weights) or (1 / len(folders),) * len(folders))

    def name(self, opened: Target) -> str:
        """The name, among the adapters that are open, of what is merged."""
        return _SUM if self.weights else opened.names[0]

    def load_others(self, opened: Target) -> list[str]:
        """Load the other adapters beside the first one, and make their sum; gives what the user should know.

        Raises:
            UserError: One was trained on another base, or otherwise kept, or has no place in a sum.
        """
        if not self.weights:
            return []
        names = [opened.names[0]]
        for place, folder in enumerate(self.folders[1:], 2):
            self._check_alike(folder, opened)
            names.append(f"{place}-{files.name_for(folder)}")
            opened.adapters.load(names[-1], folder, tokenizer=opened.base.tokenizer)
        opened.adapters.weighted_sum(_SUM, names, self.weights)
        _, differing = self._common()
        return [f"the adapters were not trained alike: {line}" for line in differing]

    def _check_alike(self, folder: Path, opened: Target) -> None:
        first = self.folders[0]
        kept, other = files.trained_on(first) or {}, files.trained_on(folder) or {}
        for key in KEPT:
            if kept.get(key) != other.get(key):
                raise UserError(
                    f"the base of {first} was kept in {kept.get(key)} in training, that of {folder} in "
                    f"{other.get(key)} ({key}); their changes are of different weights, and have no sum."
                )
        if difference := other_base(opened.base, other):
            raise UserError(f"{folder} was trained on another base than {first}: {difference}.")
        if files.added_tokens(first) != files.added_tokens(folder):
            raise UserError(
                f"the adapters have other added tokens: {first} {files.added_tokens(first)}, {folder} "
                f"{files.added_tokens(folder)}. A token's row means nothing beside another token of the same id."
            )

    def _common(self) -> tuple[provenance.Provenance | None, list[str]]:
        read = provenance.Provenance.read
        return provenance.common(
            {str(one): read(files.provenance_of(one), str(one / files.OWN_CONFIG)) for one in self.folders}
        )

    def provenance(self) -> dict[str, object] | None:
        """How the data of one adapter, or of all as far as it is the same, was read and rendered."""
        if not self.weights:
            return files.provenance_of(self.folders[0])
        record, _ = self._common()
        return None if record is None else record.model_dump(mode="json")

    def entries(self) -> dict[str, object]:
        """What was merged, for the new folder's file: names, weights, and the SHA-256 of each file of tensors."""
        if not self.weights:
            folder = self.folders[0]
            return {"adapter": folder.resolve().name, "adapter_sha256": _hashes(folder)}
        return {
            "adapters": [
                {"adapter": folder.resolve().name, "weight": weight, "adapter_sha256": _hashes(folder)}
                for folder, weight in zip(self.folders, self.weights, strict=True)
            ]
        }


def _hashes(folder: Path) -> dict[str, str]:
    return {str(p.relative_to(folder)): sha256_of(p) for p in sorted(folder.rglob("*.safetensors"))}


def adapter_folder(folder: Path) -> Path:
    """The folder of one adapter; a run with one stands for it.

    Raises:
        UserError: It holds no adapter, or several.
    """
    if (folder / RUN_FILE).is_file():
        names = [job.name for job in read_run_config(folder).jobs]
        if len(names) != 1:
            raise UserError(
                f"{folder} is a run with the adapters {', '.join(names)}. Name the folder of one, such as "
                f"{RunStore(folder).adapters / names[0]}."
            )
        (folder,) = RunStore(folder).finished(names)
    if files.merged_from(folder) is not None:
        raise UserError(f"{folder} is a merged model already, not an adapter.")
    if not files.is_adapter(folder):
        raise UserError(f"{folder} holds no adapter ({files.CONFIG}).")
    return folder
