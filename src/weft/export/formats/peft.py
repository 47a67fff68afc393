"""PEFT's own layout: the adapter's files as they are, with the tokenizer, and what loads them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from weft.errors import UserError
from weft.export.format import Format, Material, Written
from weft.export.loaders import adapter_files, loaders
from weft.files import adapter_folder as files
from weft.files.run_folder import RunStore, run_of
from weft.files.whole import copy_file, make_folder

# Other tools read the tokenizer and its template beside an adapter under these names.
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "chat_template", "vocab", "merges", "spiece")


class Peft(Format):
    """The adapter's folder, byte for byte."""

    name = "peft"
    sentence = "the adapter in PEFT's layout"

    def check(self, material: Material, entries: Mapping[str, Any]) -> None:
        if material.adapter is None:
            raise UserError(f"{material.folder} is a model, not an adapter; --to peft is for adapters.")

    def write(self, material: Material, part: Path, kind: str) -> Written:
        assert material.adapter is not None
        # This compares the tensors with their hashes, so no damaged file travels.
        files.read(material.adapter)
        _copy(material.adapter, part)
        run = run_of(material.adapter)
        tokenizer = None if run is None else RunStore(run).tokenizer
        if tokenizer is not None and tokenizer.is_dir() and not (part / "tokenizer_config.json").is_file():
            for path in sorted(tokenizer.iterdir()):
                if path.is_file() and path.name.startswith(_TOKENIZER):
                    copy_file(path, part / path.name)
        found = loaders(adapter_files(part))
        return Written(
            [one.line() for one in found],
            figures={"loads": {one.name: one.why or True for one in found}},
            loaders=found,
        )


def _copy(source: Path, target: Path) -> None:
    """Copy the files of a folder and of the folders in it."""
    make_folder(target)
    for path in sorted(source.iterdir()):
        if path.is_dir() and not path.name.startswith("."):
            _copy(path, target / path.name)
        elif path.is_file() and path.name != "README.md":
            copy_file(path, target / path.name)
