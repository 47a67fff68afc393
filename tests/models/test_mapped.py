"""Pages of files that are taken out of memory while a base is loaded in another form."""

from __future__ import annotations

import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from weft.base.mapped import can_map, pages_returned

pytestmark = pytest.mark.skipif(not can_map(), reason="the system does not say what is mapped")
SIZE = 8 << 20


def resident(path: Path) -> int:
    """The KiB of a file that are this process' memory."""
    mine, total = False, 0
    for line in Path("/proc/self/smaps").read_text().splitlines():
        words = line.split(maxsplit=5)
        if "-" in words[0]:
            mine = len(words) == 6 and words[5] == str(path)
        elif mine and words[0] == "Rss:":
            total += int(words[1])
    return total


def until(true: Callable[[], bool]) -> bool:
    """Whether it becomes true within ten seconds."""
    return any(true() or time.sleep(0.02) for _ in range(500))


def mapped(folder: Path) -> tuple[Path, torch.Tensor]:
    """A file of zeros, and the tensor that is mapped from it, not yet in memory."""
    path = folder / "model.safetensors"
    save_file({"x": torch.zeros(SIZE // 4)}, path)
    tensor = torch.from_file(str(path), shared=False, size=SIZE // 4, dtype=torch.float32)
    return path, tensor


def test_what_was_read_goes_and_comes_again(tmp_path: Path) -> None:
    path, tensor = mapped(tmp_path)
    with pages_returned(tmp_path, every=0.01, above=SIZE // 2):
        time.sleep(0.05)
        before = tensor.clone()
        assert until(lambda: resident(path) == 0)
        assert torch.equal(tensor, before)
    assert resident(path) == 0


def test_little_of_a_file_is_not_looked_for(tmp_path: Path) -> None:
    path, tensor = mapped(tmp_path)
    with pages_returned(tmp_path, every=0.01, above=4 * SIZE):
        before = tensor.clone()
        time.sleep(0.1)
        assert resident(path) >= SIZE // 1024
    assert resident(path) == 0
    assert torch.equal(tensor, before)


def test_what_was_written_to_stays(tmp_path: Path) -> None:
    path, tensor = mapped(tmp_path)
    tensor[5] = 7.0
    with pages_returned(tmp_path, every=0.01, above=0):
        tensor.sum()
        time.sleep(0.1)
    assert tensor[5] == 7.0
    assert resident(path) >= SIZE // 1024


def test_other_folders_are_left_alone(tmp_path: Path) -> None:
    path, tensor = mapped(tmp_path)
    (tmp_path / "other").mkdir()
    with pages_returned(tmp_path / "other", every=0.01, above=0):
        tensor.sum()
        time.sleep(0.05)
    assert resident(path) >= SIZE // 1024
    assert tensor.sum() is not None
