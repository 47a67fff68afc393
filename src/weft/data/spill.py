"""Bytes that are only appended: few of them stay in memory, many go to a temporary file without a name."""

from __future__ import annotations

import os
import tempfile
import weakref
from typing import IO

from weft.errors import UserError
from weft.files.whole import temporary_folder

_BLOCK = 1 << 20  # what is written at once


class Spill:
    """Appended bytes: up to ``memory`` of them stay in memory, more go to a temporary file.

    The file is read with ``pread``, because pages of a mapped file would count as this process's memory.
    """

    def __init__(self, memory: int) -> None:
        self._memory = memory
        self._file: IO[bytes] | None = None
        self._written, self._tail = 0, bytearray()  # bytes in the file, and those that follow them

    @property
    def size(self) -> int:
        """The number of bytes."""
        return self._written + len(self._tail)

    def append(self, data: bytes) -> None:
        """Put ``data`` at the end."""
        self._tail += data
        if len(self._tail) > (self._memory if self._file is None else _BLOCK):
            self._write()

    def read(self, start: int, stop: int) -> bytes:
        """The bytes [start, stop), which one call appended."""
        if start >= self._written:
            return bytes(self._tail[start - self._written : stop - self._written])
        assert self._file is not None
        data = os.pread(self._file.fileno(), stop - start, start)
        if len(data) != stop - start:
            raise OSError(f"a temporary file ends at {start + len(data)}, before {stop}")
        return data

    def _write(self) -> None:
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            with memoryview(self._tail) as left:
                done = 0
                while done < len(left):
                    done += os.pwrite(self._file.fileno(), left[done : done + _BLOCK], self._written + done)
        except OSError as error:
            raise UserError(
                f"the rendered samples do not fit into the folder for temporary files, {temporary_folder()}: "
                f"{error.strerror or error}, after {self._written / 1e6:,.0f} MB. Free some space there, name another "
                "folder with the environment variable TMPDIR (4 bytes per token are needed, twice that with documents: "
                "joined), or read fewer records (`limit`)."
            ) from error
        self._written += len(self._tail)
        self._tail = bytearray()
