"""Memory that lies in a file without a name: the system may write it out, and it is gone with the process."""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from typing import IO

from weft.errors import UserError

_WRITTEN = 1 << 20  # bytes at once, where the system cannot be asked for room


def pages(size: int, folder: str | None, *, whose: str, key: str) -> mmap.mmap:
    """``size`` zero bytes in a file of ``folder`` (None: that of temporary files).

    ``whose`` they are and the ``key`` that names another folder stand in what is said when there is no room.

    Raises:
        UserError: The disk has no room for them.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            _reserve(file, size)
            return mmap.mmap(file.fileno(), size)
    except OSError as error:
        where = folder or tempfile.gettempdir()
        why = "is full" if error.errno == errno.ENOSPC else f"takes no pages ({error.strerror})"
        raise UserError(
            f"{whose}: the disk of {where} {why}; {size:,} bytes are needed. Name another folder: {key}."
        ) from None


def _reserve(file: IO[bytes], size: int) -> None:
    """Take room on the disk: a page that finds none later would kill the process."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(file.fileno(), 0, size)
        return
    for start in range(0, size, _WRITTEN):
        file.write(bytes(min(_WRITTEN, size - start)))
    file.flush()


def leave_memory(own: mmap.mmap) -> None:
    """Take pages out of the process: what they hold stays in the file, and comes back when it is read."""
    if hasattr(mmap, "MADV_DONTNEED"):
        own.madvise(mmap.MADV_DONTNEED)
