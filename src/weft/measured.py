"""What was measured on this machine, kept for later processes in ``~/.cache/weft/machine`` (or ``WEFT_CACHE_DIR``)."""

from __future__ import annotations

import hashlib
import importlib.metadata
import json
import os
import platform
import tempfile
from pathlib import Path

import torch

from weft.errors import UserError
from weft.foreign import expect, read_json
from weft.paths import cache_folder
from weft.version import __version__

_LIMIT = 64 << 20


def machine_state() -> list[str]:
    """What the figures of this machine depend on."""
    processor = next(iter(_processors()), platform.processor())
    capability = torch.backends.cpu.get_cpu_capability()
    threads = str(torch.get_num_threads())
    return [__version__, torch.__version__, importlib.metadata.version("transformers"), processor, capability, threads]


def _processors() -> list[str]:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    return [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]


def recall(kind: str) -> dict[str, float]:
    """The figures of one kind by their names; none are kept, or the machine is another now: an empty one."""
    place = _place(kind)
    if place is None:
        return {}
    try:
        found = read_json(place, limit=_LIMIT)
        return {key: float(expect(value, float, str(place))) for key, value in found.items()}
    except (UserError, AttributeError, TypeError, ValueError):
        return {}  # it is not there, or another program wrote it


def keep(kind: str, figures: dict[str, float]) -> None:
    """Keep the figures of one kind. Where they cannot be written they are measured again next time."""
    place = _place(kind)
    if place is not None:
        keep_text(place, json.dumps(figures))


def keep_text(place: Path, text: str) -> None:
    """Write a file of what can be found out again: whole or, if the place cannot be written to, not at all."""
    try:
        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=place.parent) as folder:
            part = Path(folder) / place.name
            part.write_text(text, encoding="utf-8")
            os.replace(part, place)
    except OSError:
        return


def _place(kind: str) -> Path | None:
    root = cache_folder()
    name = hashlib.sha256("\0".join(machine_state()).encode()).hexdigest()[:16]
    return None if root is None else root / "machine" / f"{kind}-{name}.json"
