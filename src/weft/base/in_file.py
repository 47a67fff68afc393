"""A tensor's numbers, read from the file that it lies in and not through the mapping.

A mapping brings every page into the process by a fault, and into the system's own memory before. A base of 7B took 38 s
to load and quantise, and more than half of the processor's time went to the system. Whoever reads a weight once, to
keep it in another form, reads it into memory that is used again, several threads at a time: while some wait for the
disk, others work. What made it faster is to go around the system's memory; copied out of that, 7B took 40 s too.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Iterator, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from weft.base.mapped import Mapping, mapped_files, mapping_of
from weft.machine import memory

# Bytes of the file that the system reads on, where it keeps them.
_AHEAD = 1 << 29


class NumbersInFile:
    """The numbers of a tensor, as its file has them."""

    def __init__(self, dtype: torch.dtype, begin: int, file: int) -> None:
        """They are of ``dtype``, and the first one is the byte ``begin`` of the open ``file``."""
        self._dtype, self._begin, self._file = dtype, begin, file

    def __call__(self, begin: int, end: int, room: Tensor) -> Tensor:
        """Numbers ``begin`` to ``end``, [end - begin], in ``room``: [bytes] in uint8, three pages more than they take.

        Raises:
            OSError: They cannot be read, or the file has become shorter.
        """
        first, last = (self._begin + place * self._dtype.itemsize for place in (begin, end))
        # What goes around the system's memory begins and ends where pages do, in the file and in memory.
        page = mmap.PAGESIZE
        above, skipped = -room.data_ptr() % page, first % page
        place, stop = first - skipped, -(-last // page) * page
        view = memoryview(cast(Any, room[above : above + stop - place].numpy()))
        read = 0
        while read < last - place:
            count = os.preadv(self._file, [view[read:]], place + read)
            if not count:
                raise OSError("a file of weights became shorter while it was read")
            read += count
        return room[above + skipped : above + skipped + last - first].view(self._dtype)


@contextlib.contextmanager
def numbers_in_file(tensor: Tensor) -> Iterator[NumbersInFile | None]:
    """Inside, what reads a tensor [...] from its file, not what somebody wrote to the mapping since.

    None: it lies in no file, or its file is not there any more.
    """
    files = mapped_files()
    mapping = mapping_of(files, [one.begin for one in files], tensor)
    begin = 0 if mapping is None else tensor.data_ptr() - mapping.begin + mapping.offset
    if mapping is None or begin % tensor.dtype.itemsize:
        yield None
        return
    file = _opened(mapping, begin, tensor.nbytes, _are_large(mapping, files))
    if file is None:
        yield None
        return
    try:
        yield NumbersInFile(tensor.dtype, begin, file)
    finally:
        os.close(file)


def _opened(mapping: Mapping, begin: int, size: int, large: bool) -> int | None:
    """The open file of a mapping, if it is still the same, to read ``size`` bytes from ``begin``.

    A ``large`` one is read around the system's memory, but for what is there already.
    """
    try:
        file = os.open(mapping.file, os.O_RDONLY)
    except OSError:
        return None
    if os.fstat(file).st_ino != mapping.inode:
        os.close(file)
        return None
    # Its first page may be there because somebody read what stands before it.
    if _is_in_memory(file, begin + size // 2) or not large:
        os.posix_fadvise(file, begin, size + _AHEAD, os.POSIX_FADV_WILLNEED)
        return file
    around = _around(mapping.file)
    if around is not None:
        os.close(file)
    return file if around is None else around


def _around(path: str) -> int | None:
    """The file, opened to be read around the system's memory; None: its file system does not read so."""
    file = None
    try:
        file = os.open(path, os.O_RDONLY | os.O_DIRECT)
        with mmap.mmap(-1, mmap.PAGESIZE) as page:  # some take the flag, and then refuse to read
            os.preadv(file, [page], 0)
    except OSError:
        if file is not None:
            os.close(file)
        return None
    return file


def _is_in_memory(file: int, place: int) -> bool:
    """Whether the system has the byte at ``place`` of an open file in memory."""
    try:
        return bool(os.preadv(file, [bytearray(1)], place, os.RWF_NOWAIT))
    except (OSError, AttributeError):
        return False  # it would have to wait, or it does not know


def _are_large(mapping: Mapping, files: Sequence[Mapping]) -> bool:
    """Whether all mapped files of the folder take more than half of the memory that is free.

    Smaller ones stay in the system's memory, for whoever loads them next.
    """
    free, folder = memory(), os.path.dirname(mapping.file)
    return free is not None and 2 * sum(one.size for one in files if os.path.dirname(one.file) == folder) > free[0]
