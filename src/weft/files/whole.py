"""Files and folders that appear whole or not at all, their hashes and sizes."""

from __future__ import annotations

import hashlib
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.errors import UserError


@contextmanager
def new_folder(output: Path, name: str = "") -> Iterator[Path]:
    """Give the block a folder to write, which becomes ``output`` at the block's end; after an error nothing remains.

    ``name`` stands before the path in messages. Under the folder's own name nothing is there before the end.

    Raises:
        UserError: ``output`` is taken, or cannot be made where it is to go.
    """
    if os.path.lexists(output) and (not output.is_dir() or any(output.iterdir())):
        raise UserError(f"{name}{output} is there already; it is left alone. Take another folder.")
    above = next(path for path in output.absolute().parents if os.path.lexists(path))
    if not above.is_dir():
        raise UserError(f"{name}{output}: {above} is no folder.")
    part = _beside(output)
    shutil.rmtree(part, ignore_errors=True)
    try:
        yield part
        if output.exists():
            output.rmdir()  # it is empty, or it would have been refused
        part.replace(output)
    except BaseException:
        shutil.rmtree(part, ignore_errors=True)
        raise


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is the old one or the new one, never a part."""
    part = _beside(path)
    part.write_text(text, encoding="utf-8")
    sync(part)
    os.replace(part, path)
    sync(path.parent)


def _beside(path: Path) -> Path:
    return path.absolute().with_name(f".{path.name}.unfinished")


def sync(path: Path) -> None:
    """Wait until a file, or the entries of a folder, are on the disk."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's bytes."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def weights_bytes(folder: Path) -> int:
    """The bytes of all files of tensors in a folder."""
    return sum(path.stat().st_size for path in folder.rglob("*.safetensors"))
