"""A disk that refuses: the n-th write of a command fails, with any number of the system's.

It stands below all libraries, in the functions of Python that change a disk. Those of Rust (safetensors, tokenizers)
are refused at their door, with an error as theirs are.
"""

from __future__ import annotations

import builtins
import errno
import io
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from unittest import mock

import safetensors.torch
from safetensors import SafetensorError

NUMBERS = (errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES)
_CHANGES = ("replace", "rename", "link", "mkdir", "fsync", "truncate", "ftruncate", "pwrite", "write")
_REMOVALS = ("unlink", "rmdir")
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT


@dataclass
class Disk:
    """Refuses the ``at``-th write (0: none), from then on all of them if it is ``lasting``.

    Attributes:
        removals: whether it refuses to remove files, too, from then on.
        calls: what was asked of it, in order.
        refused: what it has refused.
    """

    at: int = 0
    number: int = errno.ENOSPC
    lasting: bool = True
    removals: bool = False
    calls: list[str] = field(default_factory=list)
    refused: list[str] = field(default_factory=list)

    def asks(self, what: str, path: object = None) -> bool:
        """Whether this write is refused."""
        name = os.fsdecode(path) if isinstance(path, (str, bytes, os.PathLike)) else ""
        if name.startswith(("/dev", "/proc")):
            return False
        self.calls.append(f"{what} {Path(name).name}".strip())
        refuses = len(self.calls) == self.at or bool(self.lasting and self.at and len(self.calls) > self.at)
        if refuses:
            self.refused.append(self.calls[-1])
        return refuses

    def error(self, path: object = None) -> OSError:
        """The error of a refusal."""
        names = [os.fspath(path)] if isinstance(path, (str, bytes, os.PathLike)) else []
        return OSError(self.number, os.strerror(self.number), *names)

    def text(self) -> str:
        """The error of a refusal, as Rust's libraries write it."""
        return f"I/O error: {os.strerror(self.number)} (os error {self.number})"


@contextmanager
def refusing(disk: Disk) -> Iterator[Disk]:
    """Put the disk under all writing inside the block."""
    from transformers import PreTrainedTokenizerFast as Tokenizer

    changes = {name: _refused(disk, name, getattr(os, name)) for name in _CHANGES}
    removals = {name: _kept(disk, getattr(os, name)) for name in _REMOVALS}
    save, tensors = Tokenizer._save_pretrained, safetensors.torch.serialize_file

    def save_tokenizer(self: Any, *args: Any, **kwargs: Any) -> Any:
        if disk.asks("tokenizer", kwargs.get("save_directory")):
            raise Exception(disk.text())
        return save(self, *args, **kwargs)

    def save_tensors(data: Any, path: Any, *args: Any, **kwargs: Any) -> None:
        refuses = disk.asks("safetensors", path)
        tensors(data, path, *args, **kwargs)
        if refuses:
            _cut(path)
            raise SafetensorError(f"Error while serializing: {disk.text()}")

    with (
        mock.patch.multiple(os, open=_open_number(disk, os.open), sendfile=_no_sendfile, **changes, **removals),
        mock.patch.object(io, "open", _open(disk)),
        mock.patch.object(builtins, "open", _open(disk)),
        mock.patch.object(Tokenizer, "_save_pretrained", save_tokenizer),
        mock.patch.object(safetensors.torch, "serialize_file", save_tensors),
    ):
        yield disk


def _cut(path: Any) -> None:
    """Leave half of a file."""
    with io.FileIO(os.fspath(path), "r+") as file:
        file.truncate(Path(path).stat().st_size // 2)


def _refused(disk: Disk, name: str, plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if disk.asks(name, args[0] if name not in ("fsync", "pwrite", "write", "ftruncate") else None):
            raise disk.error(args[0])
        return plain(*args, **kwargs)

    return call


def _kept(disk: Disk, plain: Callable[..., Any]) -> Callable[..., Any]:
    def call(*args: Any, **kwargs: Any) -> Any:
        if disk.removals and disk.at and len(disk.calls) >= disk.at:
            raise disk.error(args[0])
        return plain(*args, **kwargs)

    return call


def _open_number(disk: Disk, plain: Callable[..., int]) -> Callable[..., int]:
    def call(path: Any, flags: int, *args: Any, **kwargs: Any) -> int:
        if flags & _WRITES and disk.asks("open", path):
            raise disk.error(path)
        return plain(path, flags, *args, **kwargs)

    return call


def _no_sendfile(*args: Any) -> int:
    raise OSError(errno.EINVAL, "the copy is to go through Python")


def _open(disk: Disk) -> Callable[..., Any]:
    class File(io.FileIO):
        def write(self, data: Any) -> int:
            if disk.asks("write", self.name if isinstance(self.name, str) else None):
                super().write(bytes(data)[: len(bytes(data)) // 2])
                raise disk.error()
            return super().write(data)

    plain = io.open

    def call(file: Any, mode: str = "r", buffering: int = -1, encoding: Any = None, errors: Any = None,
             newline: Any = None, closefd: bool = True, opener: Any = None) -> Any:  # fmt: skip
        if not set(mode) & set("wax+"):
            return plain(file, mode, buffering, encoding, errors, newline, closefd, opener)
        if not isinstance(file, int) and opener is None and disk.asks("open", file):
            raise disk.error(file)
        raw = File(file, mode.replace("b", "").replace("t", ""), closefd, opener)
        if buffering == 0:
            return raw
        buffered = io.BufferedRandom(raw) if "+" in mode else io.BufferedWriter(raw)
        return buffered if "b" in mode else io.TextIOWrapper(buffered, encoding, errors, newline)

    return call
