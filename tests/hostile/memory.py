"""The most memory that this process has held since a moment, as the kernel counts it."""

from __future__ import annotations

import ctypes
from pathlib import Path

_SELF = Path("/proc/self")


class Memory:
    """Begins to measure when it is made."""

    def __init__(self) -> None:
        try:
            # What earlier work has left to the allocator would hide what is taken now.
            ctypes.CDLL(None).malloc_trim(0)
            (_SELF / "clear_refs").write_text("5")  # the peak begins anew
            self._before = self._field("VmRSS")
        except (OSError, AttributeError):  # no Linux: nothing is measured
            self._before = None

    def grown(self) -> int:
        """Bytes above what was held at the beginning; 0 where that cannot be told."""
        if self._before is None:
            return 0
        return max(0, (self._field("VmHWM") or 0) - (self._before or 0))

    @staticmethod
    def _field(name: str) -> int | None:
        for line in (_SELF / "status").read_text().splitlines():
            if line.startswith(f"{name}:"):
                return int(line.split()[1]) * 1024
        return None
