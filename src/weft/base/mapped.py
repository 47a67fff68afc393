"""Memory that a file is mapped into: where it is, read ahead, and given back to the system.

A tensor that lies in a mapped file can always be read: what is not in memory, the system reads from the file. So all
that is done here only changes what is in memory, and never a number. Linux alone says which memory is a file's.
"""

from __future__ import annotations

import bisect
import contextlib
import ctypes
import functools
import mmap
import sys
import threading
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

_MAPS, _SMAPS, _STATM = (Path("/proc/self") / name for name in ("maps", "smaps", "statm"))
# Of Linux' madvise(2). POPULATE_READ came with 5.14; without it the pages come as they are touched.
_WILLNEED, _DONTNEED, _POPULATE_READ = 3, 4, 22


@dataclass(frozen=True)
class Span:
    """Whole pages in which a file is mapped: the first byte's address, and the end's."""

    begin: int
    end: int
    _: KW_ONLY
    file: str

    @property
    def size(self) -> int:
        """Its bytes."""
        return self.end - self.begin


@dataclass(frozen=True)
class Mapping(Span):
    """A span as the system tells it: where in the file it begins, and which file it was that was mapped."""

    offset: int
    inode: int


def can_map() -> bool:
    """Whether this system says which memory is a file's, and takes advice on it."""
    return sys.platform == "linux" and _MAPS.is_file()


def spans_of(tensors: Iterable[Tensor]) -> list[Span | None]:
    """Where each tensor [...] lies in a mapped file; None: it does not.

    The spans hold as long as the tensors' memory does.
    """
    files = mapped_files()
    begins = [span.begin for span in files]
    return [_span(files, begins, tensor) for tensor in tensors]


def _span(files: Sequence[Mapping], begins: Sequence[int], tensor: Tensor) -> Span | None:
    mapping = mapping_of(files, begins, tensor)
    if mapping is None:
        return None
    begin, page = tensor.data_ptr(), mmap.PAGESIZE
    end = -(-(begin + tensor.nbytes) // page) * page
    return Span(begin // page * page, min(end, mapping.end), file=mapping.file)


def mapping_of(files: Sequence[Mapping], begins: Sequence[int], tensor: Tensor) -> Mapping | None:
    """The mapping in which a whole tensor [...] lies, one number after another; None: there is none."""
    if tensor.device.type != "cpu" or not tensor.numel() or not tensor.is_contiguous():
        return None
    begin = tensor.data_ptr()
    place = bisect.bisect_right(begins, begin) - 1
    return files[place] if place >= 0 and begin + tensor.nbytes <= files[place].end else None


def mapped_files() -> list[Mapping]:
    """The mappings of files in this process, from the lowest address to the highest."""
    found = []
    for line in _MAPS.read_text().splitlines() if can_map() else ():
        # address permissions offset device inode path
        if (span := _mapping(line.split(maxsplit=5))) is not None:
            found.append(span)
    return found


def _mapping(words: Sequence[str]) -> Mapping | None:
    """The mapping of a file that a line describes; None: it is none."""
    if len(words) < 6 or words[4] == "0" or not words[5].startswith("/"):
        return None
    begin, _, end = words[0].partition("-")
    return Mapping(int(begin, 16), int(end, 16), file=words[5], offset=int(words[2], 16), inode=int(words[4]))


def joined(spans: Iterable[Span | None]) -> list[Span]:
    """The spans in order, those that touch as one."""
    found: list[Span] = []
    for span in sorted((span for span in spans if span is not None), key=lambda span: span.begin):
        if found and span.begin <= found[-1].end:
            found[-1] = Span(found[-1].begin, max(span.end, found[-1].end), file=span.file)
        else:
            found.append(span)
    return found


def read_ahead(spans: Iterable[Span]) -> None:
    """Have the system read what it does not have in memory. That does not count as this process' memory yet."""
    for span in spans:
        _advise(span, _WILLNEED)


def bring_in(spans: Iterable[Span]) -> None:
    """Make the pages this process' memory; returns when they are there."""
    for span in spans:
        _advise(span, _POPULATE_READ)


def give_back(spans: Iterable[Span]) -> None:
    """Take the pages out of this process' memory; whoever touches one reads it again."""
    for span in spans:
        _advise(span, _DONTNEED)


@contextlib.contextmanager
def pages_returned(folder: Path, every: float = 0.05, above: int = 1 << 29) -> Iterator[None]:
    """Inside, take the pages of a folder's files out of this process' memory again and again.

    Whoever loads tensors to keep them in another form reads each of them once, and the pages would count as memory
    until the file is closed: 13.5 GB for a base of 7B that becomes 4 GB. A mapping with pages that were written to is
    left alone. To look for those takes long, so it is done when there are ``above`` more bytes of files in memory;
    their number is read every so many seconds.
    """
    done = threading.Event()

    def act() -> None:
        least = _bytes_of_files()
        while not done.wait(every):
            now = _bytes_of_files()
            if now > least + above:
                give_back(_clean_mappings(folder))
                now = _bytes_of_files()
            least = min(least, now)

    thread = threading.Thread(target=act, name="pages", daemon=True)
    if can_map():
        thread.start()
    try:
        yield
    finally:
        done.set()
        if thread.ident is not None:
            thread.join()
            give_back(_clean_mappings(folder))


def _bytes_of_files() -> int:
    """The bytes of files in this process' memory."""
    # size resident shared text library data dirty, in pages; what is shared is of files.
    return int(_STATM.read_text().split()[2]) * mmap.PAGESIZE


def _clean_mappings(folder: Path) -> list[Span]:
    """The mappings of files in the folder, or of what its links lead to, without a page of this process' own."""
    names = {str(path.resolve()) for path in folder.iterdir()}
    found: list[Span] = []
    span: Span | None = None
    # Each mapping's line is followed by lines of figures; of those in the folder, what was written to counts.
    for line in _SMAPS.read_text().splitlines():
        words = line.split(maxsplit=5)
        if "-" in words[0]:
            span = _mapping(words)
        elif words[0] == "Anonymous:" and span is not None and span.file in names and words[1] == "0":
            found.append(span)
    return found


def _advise(span: Span, advice: int) -> None:
    # What the system does not take changes nothing but time: the pages come when they are touched.
    _libc().madvise(span.begin, span.size, advice)


@functools.cache
def _libc() -> Any:
    libc = ctypes.CDLL(None, use_errno=True)
    libc.madvise.argtypes = [ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int]
    return libc
