"""Whether a model's files of weights are whole and hold numbers, each tensor looked at by itself."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from weft.base.mapped import give_back, joined, spans_of
from weft.errors import UserError
from weft.foreign import check_safetensors, expect

# Numbers that are looked at in one go.
_PIECE = 1 << 22
_HEADER = 8  # bytes before the header, which say how long it is


def check_whole(path: Path) -> dict[str, object]:
    """Refuse a file of safetensors that ends before its last tensor, as a download that was cut off leaves it.

    Returns:
        The entries of its header: dtype, shape and place of each tensor.

    Raises:
        UserError: It does; the message names the first tensor that is not all there.
    """
    entries = check_safetensors(path)
    with path.open("rb") as file:
        begin = _HEADER + int.from_bytes(file.read(_HEADER), "little")
    there = path.stat().st_size - begin
    cut = []
    for name, entry in entries.items():
        place = expect(entry, dict, f"{path}: {name[:80]}").get("data_offsets")
        if isinstance(place, list) and len(place) == 2 and all(isinstance(end, int) for end in place):
            cut += [(place[0], place[1], name)] if place[1] > there else []
    if cut:
        first, last, name = min(cut)
        raise UserError(
            f"{path} is not whole: tensor {name[:200]!r} is said to lie at bytes {first:,} to {last:,} behind the "
            f"header, and there are {there:,} ({len(cut)} {'tensor is' if len(cut) == 1 else 'tensors are'} cut off). "
            "Fetch the file again."
        )
    return entries


def check_numbers(path: Path) -> None:
    """Read every tensor of a file of safetensors once, and refuse one that holds NaN or infinity.

    The file is mapped, and what was read is given back: it takes no memory.

    Raises:
        UserError: One does; the message names it.
    """
    with safe_open(path, framework="pt") as file:
        for name in list(file.keys()):
            tensor = file.get_tensor(name)
            if not _finite(tensor):
                raise UserError(
                    f"{path}: tensor {name[:200]!r} holds NaN or infinity; the file is damaged. Fetch it again."
                )
            give_back(joined(spans_of([tensor])))


def _finite(tensor: Tensor) -> bool:
    """Whether all numbers of a tensor [...] are finite."""
    if not tensor.is_floating_point() or tensor.element_size() < 2:
        return True
    # NaN is the smallest and the largest of numbers with a NaN among them.
    ends = [torch.stack(piece.aminmax()) for piece in tensor.reshape(-1).split(_PIECE) if piece.numel()]
    return not ends or bool(torch.stack(ends).isfinite().all())
