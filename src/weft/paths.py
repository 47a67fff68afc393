"""The one way by which a user's paths become places: ``~`` is the home, wherever it is written."""

from __future__ import annotations

import os
import re
from pathlib import Path

from weft.errors import UserError, shown

# Endings of files, which no model's id has.
_FILES = (".json", ".jsonl", ".yaml", ".yml", ".safetensors", ".bin", ".pt", ".pth", ".gguf", ".zip", ".gz", ".tar")


def with_home(path: str) -> str:
    """The path with the home in the place of ``~`` or ``~name``; any other as it is written."""
    return os.path.expanduser(path)


def cache_folder() -> Path | None:
    """Where Weft keeps what it may lose: ``~/.cache/weft``, or where ``WEFT_CACHE_DIR`` says; None: nowhere."""
    place = with_home(os.environ.get("WEFT_CACHE_DIR", "~/.cache/weft"))
    return Path(place) if place else None


def local_path(path: str | os.PathLike[str]) -> Path:
    """The place that a user means by a path.

    Raises:
        UserError: It is something else.
    """
    if not isinstance(path, (str, os.PathLike)):
        raise UserError(f"expected a path, not {shown(path)}.")
    return Path(with_home(os.fspath(path)))


def names_in(folder: Path) -> list[str]:
    """The names of what is in a folder; none if it is no folder, or closed."""
    try:
        return sorted(os.listdir(folder))
    except OSError:
        return []


def from_root(path: str) -> str:
    """The path from the root, if something is there or it is a pattern of files; else (a hub's id) as it is written."""
    try:
        there = Path(path).exists() or any(mark in path for mark in "*?[")
    except OSError:  # longer than a name may be
        return path
    return os.path.abspath(path) if there else path


def is_hub_id(name: str) -> bool:
    """Whether the name of a model reads as ``owner/name`` of a hub rather than as a path."""
    if not re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name) or name.lower().endswith(_FILES):
        return False
    # Where its first part is a folder here, it is a path with a mistake in it.
    return not Path(name).exists() and not Path(name).parent.is_dir()
