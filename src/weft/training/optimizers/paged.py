"""Optimizers whose state may leave memory: on a CPU it lies in files that the system writes out when it needs the room.

On a GPU bitsandbytes' paged optimizers do this with CUDA's unified memory. The numbers are those of the optimizer
without pages, to the bit.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from pydantic import Field
from torch import Tensor

from weft.base.pages import pages
from weft.errors import UserError
from weft.training.optimizers.adamw import AdamW
from weft.training.optimizers.eight_bit import AdamW8Bit
from weft.training.optimizers.kind import Groups, Settings

# What is smaller stays in memory: a page is what the system moves.
_SMALLEST = 1 << 16


def mapped_zeros(like: Tensor, dtype: torch.dtype, folder: str | None) -> Tensor:
    """Zeros of the shape of ``like`` in a file without a name, which is gone with the process.

    Raises:
        UserError: The disk has no room for it.
    """
    size = like.numel() * dtype.itemsize
    if size < _SMALLEST:
        return torch.zeros(like.shape, dtype=dtype, device=like.device)
    numbers = pages(size, folder, whose="optimizer", key="optim_args: {folder: PATH}")
    return torch.frombuffer(numbers, dtype=dtype).view(like.shape)


class _PagedAdamW(torch.optim.AdamW):
    """torch's AdamW, whose moments are there before it asks."""

    def __init__(self, groups: Groups, folder: str | None, **options: Any) -> None:
        super().__init__(list(groups), fused=True, **options)
        self.folder = folder

    def step(self, closure: Any = None) -> Any:
        """Make the moments of parameters that have a gradient for the first time, and step."""
        for p in (p for group in self.param_groups for p in group["params"] if p.grad is not None):
            if not self.state[p]:
                moments = {key: mapped_zeros(p, p.dtype, self.folder) for key in ("exp_avg", "exp_avg_sq")}
                self.state[p] = {"step": torch.zeros((), dtype=torch.float32, device=p.device), **moments}
        return super().step(closure)

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Put a state back, into pages."""
        super().load_state_dict(state_dict)
        _into_pages(self.state, self.folder)


def _into_pages(state: Mapping[Any, dict[str, Any]], folder: str | None) -> None:
    for entry in state.values():
        for key, value in entry.items():
            if isinstance(value, Tensor) and value.numel() * value.element_size() >= _SMALLEST:
                entry[key] = mapped_zeros(value, value.dtype, folder).copy_(value)


class PagedAdamW(AdamW):
    """AdamW in pages."""

    name = "paged_adamw"
    about = (
        "its moments lie in files that the system may write out, in `folder` (that of temporary files; one that is "
        "itself in memory saves nothing)"
    )
    folder: str | None = Field(None)

    def make(self, config: Settings, groups: Groups) -> torch.optim.Optimizer:
        """In files on a CPU; on a GPU bitsandbytes' own.

        Raises:
            UserError: The folder is none, or bitsandbytes is not installed.
        """
        _check(self.folder)
        options: dict[str, Any] = {"betas": config.adam_betas, "eps": config.adam_epsilon}
        if _on_cpu(groups):
            return _PagedAdamW(groups, self.folder, **options)
        AdamW8Bit().class_for(groups)
        from bitsandbytes.optim import PagedAdamW as Theirs

        found: torch.optim.Optimizer = Theirs(list(groups), **options)
        return found


class PagedAdamW8Bit(AdamW8Bit):
    """AdamW in 8 bits and in pages."""

    name = "paged_adamw_8bit"
    about = "both"
    folder: str | None = Field(None)

    def class_for(self, groups: Groups) -> Any:
        """bitsandbytes' class, which asks us for memory on a CPU.

        Raises:
            UserError: It is not installed, the parameters are float64, or the folder is none.
        """
        plain: Any = super().class_for(groups)
        _check(self.folder)
        if not _on_cpu(groups):
            from bitsandbytes.optim import PagedAdamW8bit

            return PagedAdamW8bit
        folder = self.folder

        def get_state_buffer(optimizer: Any, p: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
            return mapped_zeros(p, dtype, folder)

        def load_state_dict(optimizer: Any, state_dict: dict[str, Any], move_to_device: bool = True) -> None:
            plain.load_state_dict(optimizer, state_dict, move_to_device)
            _into_pages(optimizer.state, folder)

        return type("_PagedAdamW8bit", (plain,), {f.__name__: f for f in (get_state_buffer, load_state_dict)})


def _on_cpu(groups: Iterable[dict[str, Any]]) -> bool:
    return all(p.device.type == "cpu" for group in groups for p in group["params"])


def _check(folder: str | None) -> None:
    if folder is not None and not Path(folder).is_dir():
        raise UserError(f"optim_args: folder: {folder} is no folder.")
