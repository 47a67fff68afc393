"""The memory of the machine, as far as the system says it."""

from __future__ import annotations

import os
from pathlib import Path

_MEMORY = Path("/proc/meminfo")
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


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # "max": there is no limit
        return None
