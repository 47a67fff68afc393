"""The error of writing: what the machine refuses becomes one sentence that names the file and what to do."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from weft.errors import UserError

_FULL = "free some space, or take a place on another disk"
_REFUSALS: dict[int, tuple[str, str]] = {
    errno.ENOSPC: ("the disk is full", _FULL),
    errno.EDQUOT: ("your quota on this disk is used up", _FULL),
    errno.EROFS: ("the disk can only be read", "take a place on another disk"),
    errno.EACCES: ("you have no permission", "get it, or take another place"),
    errno.EPERM: ("you have no permission", "get it, or take another place"),
    errno.EIO: ("the disk reports an I/O error", "look after the disk, or take a place on another one"),
    errno.EFBIG: (
        "a file may not become so large here",
        "raise the limit (ulimit -f), or take a place on another disk",
    ),
}
_OTHERWISE = "take another place"
# Libraries in Rust (safetensors, tokenizers) put the number of the error into their text.
_NUMBER = re.compile(r"\(os error (\d+)\)")
# torch's writer of archives gives no number.
_WITHOUT_NUMBER = re.compile(r"PytorchStreamWriter failed|iostream error")


class WriteError(UserError):
    """The machine refuses to write a file or a folder.

    Attributes:
        path: what cannot be written.
    """

    def __init__(self, path: Path, number: int, *, name: str = "", todo: str = "") -> None:
        why, usual = _REFUSALS.get(
            number, (f"of {os.strerror(number) if number else 'an error of the writer'!r}", _OTHERWISE)
        )
        super().__init__(f"{name}{path} cannot be written, because {why}: {todo or usual}.")
        self.path, self.number = path, number
        self._name, self._todo = name, todo

    def at(self, path: Path, name: str = "") -> WriteError:
        """The same error about another path: that by which the user knows the file."""
        return WriteError(path, self.number, name=name or self._name, todo=self._todo)

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (self.path, self.number, self._name, self._todo)


def _again(path: Path, number: int, name: str, todo: str) -> WriteError:
    return WriteError(path, number, name=name, todo=todo)


@contextmanager
def writing(path: Path, *, name: str = "", todo: str = "", inside: bool = True) -> Iterator[None]:
    """Turn what the machine refuses inside the block into an error about ``path``, or about the file in it.

    ``name`` stands before the path in the message, ``todo`` is what to do, if that is not the usual, and without
    ``inside`` no file in it is named.

    Raises:
        WriteError: The block could not write.
    """
    try:
        yield
    except UserError:
        raise
    except Exception as error:
        number = error_number(error)
        if number is None:
            raise
        raise WriteError(_named(error, path) if inside else path, number, name=name, todo=todo) from error


def error_number(error: Exception) -> int | None:
    """The system's number of an error of writing, 0 if that is not known; None if the error is another one."""
    if isinstance(error, OSError) and error.errno is not None:
        return error.errno
    text = str(error)
    if found := _NUMBER.search(text):
        return int(found[1])
    return 0 if _WITHOUT_NUMBER.search(text) else None


def _named(error: Exception, path: Path) -> Path:
    """The file in the folder ``path`` that the error names, else ``path``."""
    names = (error.filename2, error.filename) if isinstance(error, OSError) else ()
    inside = [Path(name) for name in names if isinstance(name, str) and Path(name).is_relative_to(path)]
    return inside[0] if inside else path
