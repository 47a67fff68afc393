"""Numbers that are read from the file in which a tensor lies, and not through its mapping."""

from __future__ import annotations

import fcntl
import os
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor

from weft.base import in_file
from weft.base.in_file import numbers_in_file
from weft.base.mapped import can_map
from weft.ops import four_bit

pytestmark = pytest.mark.skipif(not can_map(), reason="the system does not say what is mapped")


def mapped(folder: Path, *tensors: Tensor) -> tuple[Path, list[Tensor]]:
    """A file of the tensors, and these mapped from it, as transformers loads them."""
    path = folder / "model.safetensors"
    save_file({f"{number:03d}": tensor for number, tensor in enumerate(tensors)}, path)
    with safe_open(path, "pt") as file:
        return path, [file.get_slice(name)[...] for name in sorted(file.keys())]


@pytest.fixture(params=["in memory", "around it", "cannot go around", "cannot read around"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How the file is read."""
    around = request.param != "in memory"
    monkeypatch.setattr(in_file, "_is_in_memory", lambda *_: not around)
    monkeypatch.setattr(in_file, "_are_large", lambda *_: around)
    if request.param == "cannot read around":
        read = os.preadv

        def no_read(file: int, *given: Any) -> int:
            if fcntl.fcntl(file, fcntl.F_GETFL) & os.O_DIRECT:
                raise OSError(22, "Invalid argument")
            return read(file, *given)

        monkeypatch.setattr(os, "preadv", no_read)
    if request.param == "cannot go around":
        opened = os.open

        def refusing(path: Any, flags: int, *rest: Any) -> int:
            if flags & os.O_DIRECT:
                raise OSError(22, "Invalid argument")
            return opened(path, flags, *rest)

        monkeypatch.setattr(os, "open", refusing)
    return str(request.param)


def room(numbers: int) -> Tensor:
    return torch.zeros(4 * numbers + 3 * 4096, dtype=torch.uint8)


def test_any_part_of_any_tensor(way: str, tmp_path: Path) -> None:
    generator = torch.Generator().manual_seed(0)
    given = [torch.randn(size, generator=generator) for size in (1, 5000, 3, 1024, 2047)]
    given += [torch.randn(3001, generator=generator).bfloat16()]
    _, tensors = mapped(tmp_path, *given)
    for tensor, wanted in zip(tensors, given, strict=True):
        with numbers_in_file(tensor) as read:
            assert read is not None, way
            for begin, end in {(0, len(wanted)), (len(wanted) // 3, len(wanted)), (0, 1), (len(wanted) // 2,) * 2}:
                assert torch.equal(read(begin, end, room(len(wanted))), wanted[begin:end]), way


def test_what_is_quantised_from_the_file(way: str, tmp_path: Path) -> None:
    weight = torch.randn(70, 130, generator=torch.Generator().manual_seed(1)).bfloat16()
    _, (_, tensor) = mapped(tmp_path, torch.ones(5), weight)
    tensor.fill_(float("nan"))  # what is not read
    with numbers_in_file(tensor) as read, pytest.MonkeyPatch.context() as patch:
        patch.setattr(four_bit, "_AT_ONCE", 256)
        found = four_bit.quantize_four_bits(tensor[:, :128].contiguous(), "nf4", 64, None)
        assert found is None
        found = four_bit.quantize_four_bits(tensor.view(-1)[: 9100 // 64 * 64], "nf4", 64, read)
    wanted = four_bit.quantize_four_bits_ref(weight.view(-1)[: 9100 // 64 * 64], "nf4", 64)
    assert found is not None
    assert all(map(torch.equal, found, wanted)), way


def test_what_is_not_there(tmp_path: Path) -> None:
    path, (tensor,) = mapped(tmp_path, torch.arange(4000.0))
    for other in (torch.ones(5), tensor.view(40, 100).t(), tensor[:0]):
        with numbers_in_file(other) as read:
            assert read is None
    with numbers_in_file(tensor) as read:
        assert read is not None
        os.truncate(path, 4096)
        with pytest.raises(OSError, match="became shorter"):
            read(0, 4000, room(4000))
    path.unlink()
    with numbers_in_file(tensor) as read:
        assert read is None
    path.write_bytes(b"another file")
    with numbers_in_file(tensor) as read:
        assert read is None
