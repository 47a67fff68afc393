"""Files of tensors: safetensors, never pickle. Checks of an adapter's tensors, and the SHA-256 of each."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from weft.errors import UserError
from weft.files.whole import write_tensors
from weft.foreign import check_safetensors

_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def read_tensors(path: Path) -> dict[str, Tensor]:
    """All tensors of a safetensors file, of any shape.

    Raises:
        UserError: The file is truncated or broken.
    """
    check_safetensors(path)
    try:
        with safe_open(path, framework="pt") as file:
            return {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (SafetensorError, OSError) as error:
        raise UserError(f"{path} cannot be read as safetensors: {error}") from None


def save_tensors(tensors: Mapping[str, Tensor], path: Path) -> dict[str, str]:
    """Write an adapter's tensors, of any shape; returns the ``digest`` of each.

    Raises:
        WriteError: The machine refuses to write the file.
    """
    # Each gets a copy, because two names may share one tensor, which safetensors refuses.
    written = {k: v.detach().cpu().contiguous().clone() for k, v in tensors.items()}
    write_tensors(written, path)
    return {key: digest(tensor) for key, tensor in written.items()}


def digest(tensor: Tensor) -> str:
    """SHA-256 of a tensor: of its dtype and shape (``float32[2, 3]``), then of its bytes."""
    data = tensor.detach().cpu().contiguous()
    found = hashlib.sha256(f"{str(data.dtype).removeprefix('torch.')}{list(data.shape)}".encode())
    found.update(data.reshape(-1).view(torch.uint8).numpy().data)
    return found.hexdigest()


def check_digests(path: Path, tensors: Mapping[str, Tensor], stated: object, beside: Path) -> None:
    """Compare a file's tensors, of any shape, with the SHA-256 of each that the file ``beside`` states.

    Raises:
        UserError: A tensor has changed, is missing, or is new.
    """
    if not isinstance(stated, dict) or not all(isinstance(value, str) for value in stated.values()):
        raise UserError(f"{beside}: sha256 of {path.name} must be a JSON object, the SHA-256 of each tensor by name.")
    lost, new = sorted(stated.keys() - tensors.keys()), sorted(tensors.keys() - stated.keys())
    changed = [key for key in tensors if key in stated and digest(tensors[key]) != stated[key]]
    found = [
        f"{len(keys)} {what} ({', '.join(map(repr, keys[:3]))}{' …' * (len(keys) > 3)})"
        for keys, what in ((changed, "changed"), (lost, "missing"), (new, "not there before"))
        if keys
    ]
    if found:
        raise UserError(
            f"{path} does not hold the tensors that were saved, by their SHA-256 in {beside.name}: {', '.join(found)}. "
            f"The file is damaged: take another copy. If it was changed on purpose (peft saved over it), delete "
            f"{beside.name}, and the folder is read as peft's."
        )


def check_values(tensors: Mapping[str, Tensor], where: object) -> None:
    """Refuse tensors, of any shape, that cannot be an adapter's: they must be of floating point and finite.

    Raises:
        UserError: A tensor is not; the message says how many of its numbers are not finite, and where the first is.
    """
    for key, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            kinds = ", ".join(str(dtype).removeprefix("torch.") for dtype in _DTYPES)
            raise UserError(
                f"{where}: tensor '{key}' is {str(tensor.dtype).removeprefix('torch.')}; an adapter's tensors are "
                f"{kinds}."
            )
        finite = torch.isfinite(tensor)
        if not bool(finite.all()):
            wrong = (~finite).nonzero()
            raise UserError(
                f"{where}: tensor '{key}' holds {len(wrong)} of {tensor.numel()} numbers that are NaN or infinite, the "
                f"first at {wrong[0].tolist()}. Its training overflowed, or the file is damaged; the adapter is of no "
                "use."
            )
