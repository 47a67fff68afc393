"""``weft convert``: pickled weights become safetensors."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli import common, options
from weft.paths import local_path


def convert(
    folder: Annotated[
        Path,
        typer.Argument(metavar="FOLDER", parser=local_path, help="A model or an adapter whose weights are a pickle."),
    ],
    output: Annotated[
        Path, typer.Argument(metavar="NEW_FOLDER", parser=local_path, help="Folder to write; it must be new or empty.")
    ],
    as_json: options.Json = False,
) -> int:
    """Write a folder with its pickled weights (pytorch_model.bin, adapter_model.bin, .pt, .ckpt) as safetensors.

    weft convert old-model new-model

    Only tensors are read: a file that asks for anything else is refused. Texts are copied, code is not.
    """
    from weft.models.convert import convert_folder

    result = convert_folder(folder, output)
    if as_json:
        common.print_json({"output": str(result.folder), "tensors": result.tensors, "bytes": result.bytes,
                           "files": list(result.files)})  # fmt: skip
        return common.DONE
    size = common.human_size(result.bytes)
    print(f"{', '.join(result.files)} -> {result.folder} ({result.tensors} tensors, {size})")
    return common.DONE
