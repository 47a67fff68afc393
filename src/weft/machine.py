"""The memory of the machine, as far as the system says it, and memory that is freed and used again."""

from __future__ import annotations

import contextlib
import ctypes
import mmap
import os
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

_MEMORY, _STATM = Path("/proc/meminfo"), Path("/proc/self/statm")
# A container's own limit and what it uses, in bytes (cgroup v2).
_LIMIT, _USED = Path("/sys/fs/cgroup/memory.max"), Path("/sys/fs/cgroup/memory.current")


def memory() -> tuple[int, int] | None:
    """The bytes that a program could take now, and all bytes; None: the system does not say.

    Files that the system keeps in memory count as free, because it gives them up.
    """
    try:
        pairs = [line.split() for line in _MEMORY.read_text().splitlines()]
        kib = {words[0].rstrip(":"): int(words[1]) for words in pairs if len(words) > 1}
        available, total = kib["MemAvailable"] * 1024, kib["MemTotal"] * 1024
    except (OSError, ValueError, KeyError):
        names = os.sysconf_names
        if "SC_PHYS_PAGES" not in names:
            return None
        total = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
        return total // 2, total
    limit = _number(_LIMIT)
    if limit is not None and limit < total:
        return min(available, max(0, limit - (_number(_USED) or 0))), limit
    return available, total


def resident(*, most: bool = False) -> int:
    """The bytes of this process in memory now, or the most it ever had; 0: the system does not say."""
    word = "VmHWM:" if most else "VmRSS:"
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) * 1024 for line in lines if line.startswith(word)), 0)


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": there is no limit
        return None


# The parameters of mallopt (malloc.h). glibc raises the thresholds by itself up to these two, but no longer once it was
# told one; so they, and not those of its beginning, are what a program has afterwards.
_TRIM_THRESHOLD, _MMAP_THRESHOLD, _ARENA_MAX = -1, -3, -8
_LARGEST_MMAP_THRESHOLD, _LARGEST_TRIM_THRESHOLD, _NEVER = 32 << 20, 64 << 20, -1
_SMALL_MMAP_THRESHOLD = 1 << 18
# It is looked at every so many seconds whether gaps have become too many. A look takes 40 microseconds.
_LOOKS = 0.02
SMALLEST_ROOM, _SPARE = 1 << 20, 32 << 20
# Bytes by which gaps may outgrow their limit until two looks have seen it; a step takes about a GB a second anew.
UNSEEN = 32 << 20
_KEEPING, _LOCK = [0], threading.Lock()  # how many blocks ask for it now


class Rooms:
    """Memory with pages of its own for large pieces, which is used again when it comes back.

    In the heap such pieces leave gaps that fit no others, since what stays, or is small, comes to lie between them.

    Attributes:
        used: Bytes that are in use now.
        most: The most bytes that ever were, since there are rooms.
    """

    def __init__(self) -> None:
        self.used = self.most = self._unused = 0
        self._free: dict[int, list[mmap.mmap]] = {}  # bytes -> rooms; those that came back last are last
        self._lock = threading.RLock()  # one room may come back while another one is taken

    @property
    def open(self) -> bool:
        """Whether there are any now: inside ``freed_memory_kept``."""
        return _KEEPING[0] > 0

    def has(self, count: int) -> bool:
        """Whether pieces of so many bytes lie in rooms now."""
        return self.open and count >= SMALLEST_ROOM

    def take(self, count: int) -> memoryview | None:
        """Memory for so many bytes; None: there is none but the heap's. It comes back when nobody refers to it."""
        if not self.has(count):
            return None
        size = room_size(count)
        with self._lock:
            self.used += size
            self.most = max(self.most, self.used)
            if free := self._free.get(size):
                pages = free.pop()
                self._unused -= size
            else:
                # Passes of many lengths have rooms of many sizes. Those that nobody takes again make place for it.
                if (over := self.used + self._unused - held_at_most(self.most)) > 0:
                    self.give_back(over)
                pages = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        view = memoryview(pages)
        weakref.finalize(view, self._take_back, pages, size).atexit = False
        return view

    def _take_back(self, pages: mmap.mmap, size: int) -> None:
        with self._lock:
            self.used -= size
            if self.open:
                self._free[size] = [*self._free.pop(size, []), pages]
                self._unused += size

    def give_back(self, count: int | None = None) -> None:
        """Give so many free bytes back to the system, of the sizes first that were not used for long; None: all."""
        with self._lock:
            for size in list(self._free):
                while self._free[size] and (count is None or count > 0):
                    self._free[size].pop()
                    self._unused -= size
                    count = None if count is None else count - size
            if count is None:
                self.most = self.used


def room_size(count: int) -> int:
    """So many bytes, or some more: what differs by little shall fit into the same rooms."""
    step = max(mmap.PAGESIZE, 1 << max(0, count.bit_length() - 5))
    return -(-count // step) * step


ROOMS = Rooms()


@contextlib.contextmanager
def freed_memory_kept(device: str) -> Iterator[None]:
    """Keep freed memory in the process inside the block, on a CPU under glibc, and give it back after the last of them.

    Every step allocates the same activations. glibc would map them anew and let the kernel clear every page each time:
    6 % of a training's tokens per second at the 1.26 B shape, and four tenths of those of sixteen rows that are
    written at 160M. Elsewhere, and with ``device`` cuda, this does nothing.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" and device == "cpu" else None
    if libc is None or getattr(libc, "mallopt", None) is None or getattr(libc, "malloc_trim", None) is None:
        yield
        return
    with _LOCK:
        _KEEPING[0] += 1
        outermost = _KEEPING[0] == 1
        libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
        libc.mallopt(_TRIM_THRESHOLD, _NEVER)
        if outermost:
            libc.malloc_trim(0)  # the gaps of loading
    try:
        with _gaps_given_back(libc) if outermost else contextlib.nullcontext():
            yield
    finally:
        with _LOCK:
            _KEEPING[0] -= 1
            if not _KEEPING[0]:
                libc.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD)
                libc.malloc_trim(0)
                ROOMS.give_back()


def held_at_most(used: int) -> int:
    """The bytes that a process may hold, inside ``freed_memory_kept``, where so many were in use at most.

    What is held beyond is gaps, and is given back. At 160M this was no slower than gaps of 15 % and 128 MiB.
    """
    return used + used // 50 + _SPARE


class _Figures(ctypes.Structure):
    """What glibc's mallinfo2 tells, in its order."""

    _fields_ = [
        (name, ctypes.c_size_t)
        for name in (
            "arena", "ordblks", "smblks", "hblks", "hblkhd", "usmblks", "fsmblks", "uordblks", "fordblks", "keepcost",
        )
    ]  # fmt: skip


@contextlib.contextmanager
def _gaps_given_back(libc: Any) -> Iterator[None]:
    """Give gaps in the heap back where they are much more than what was ever in use inside the block.

    Short-lived tensors leave gaps between those that stay, which glibc does not find again for others of another size:
    a process that trained the 1.26 B shape in 4 bits held 3.0 GB at most, and 2.3 with this, in the same time.
    """
    if getattr(libc, "mallinfo2", None) is None or not _STATM.is_file():
        yield
        return
    libc.mallinfo2.restype = _Figures
    done = threading.Event()
    thread = threading.Thread(target=_watch, args=(libc, done), name="heap", daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


def _watch(libc: Any, done: threading.Event) -> None:
    def used() -> int:
        figures = libc.mallinfo2()
        return int(figures.uordblks + figures.hblkhd) + ROOMS.used

    def excess() -> int:
        return _anonymous() - begun - left - held_at_most(most)

    before, begun, most, seen, left = used(), _anonymous(), 0, 0, 0
    while not done.wait(_LOOKS):
        most = max(most, used() - before)
        # Twice in a row: what came and went between two looks was not seen, and is no gap.
        seen = seen + 1 if excess() > 0 else 0
        if seen > 1:
            # The heap's gaps are taken again at once, rooms perhaps much later.
            ROOMS.give_back(excess() + _SPARE)
            if excess() > 0:
                libc.malloc_trim(0)
                # What is left is not the heap's. It must not have the heap looked through again and again.
                left = max(0, left + excess() + _SPARE)
            seen = 0


def _anonymous() -> int:
    """The bytes of this process' memory that are no file's."""
    _, resident, shared, *_ = _STATM.read_text().split()
    return (int(resident) - int(shared)) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def freed_memory_returned() -> Iterator[None]:
    """Give large freed memory back at once inside the block, under glibc; elsewhere this does nothing.

    While a base is loaded, every tensor leaves copies behind in other dtypes. glibc would keep them between the tensors
    that stay: a base in int8 took three times its size.
    """
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is None or getattr(libc, "mallopt", None) is None:
        yield
        return
    with _LOCK:
        if not _KEEPING[0]:
            libc.mallopt(_MMAP_THRESHOLD, _SMALL_MMAP_THRESHOLD)
    try:
        yield
    finally:
        with _LOCK:
            libc.mallopt(_MMAP_THRESHOLD, _LARGEST_MMAP_THRESHOLD)
            if not _KEEPING[0]:
                libc.mallopt(_TRIM_THRESHOLD, _LARGEST_TRIM_THRESHOLD)


def share_one_heap() -> None:
    """Let threads that come from now on share one heap, under glibc: what one frees, others use."""
    libc = ctypes.CDLL(None) if sys.platform == "linux" else None
    if libc is not None and getattr(libc, "mallopt", None) is not None:
        libc.mallopt(_ARENA_MAX, 1)
