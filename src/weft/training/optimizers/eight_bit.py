"""AdamW with its moments in 8 bits, block by block (Dettmers et al. 2022): bitsandbytes', on GPUs and CPUs."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from weft.errors import UserError
from weft.libraries import has_kernel
from weft.training.optimizers.kind import Groups, OptimizerKind, Settings

# bitsandbytes keeps smaller tensors in 32 bits, and a scale for each block of larger ones.
SMALLEST, BLOCK = 4096, 256
KERNEL = "bitsandbytes::optimizer_update_8bit_blockwise"
_MAPS = 2 * 256 * 4  # bytes of the two tables of values, which every tensor's state names


class AdamW8Bit(OptimizerKind):
    """Two bytes for each number that is trained."""

    name = "adamw_8bit"
    about = f"moments in 8 bits (needs `weft[quant]`); tensors of less than {SMALLEST:,} numbers keep 32"

    def make(self, config: Settings, groups: Groups) -> torch.optim.Optimizer:
        """bitsandbytes' AdamW8bit.

        Raises:
            UserError: The parameters are float64, or bitsandbytes is too old for where they are.
        """
        return self.class_for(groups)(list(groups), betas=config.adam_betas, eps=config.adam_epsilon)

    def check_packages(self) -> None:
        """Raises ValueError where bitsandbytes is not installed."""
        if importlib.util.find_spec("bitsandbytes") is None:
            raise ValueError(f'optimizer: {self.name} needs bitsandbytes: pip install "weft[quant]".')

    def class_for(self, groups: Groups) -> Any:
        """bitsandbytes' class.

        Raises:
            UserError: As ``make``.
        """
        if any(p.dtype == torch.float64 for group in groups for p in group["params"]):
            raise UserError(f"optimizer: {self.name} has no form for float64; take adamw, or dtype: float32.")
        from bitsandbytes.optim import AdamW8bit

        device = next(p.device for group in groups for p in group["params"])
        if not has_kernel(KERNEL, device):
            raise UserError(
                f"optimizer: {self.name}: the installed bitsandbytes has no 8-bit optimizer for {device.type}, and a "
                "newer one has: pip install --upgrade bitsandbytes."
            )
        return AdamW8bit

    def state_bytes(self, config: Settings, parameters: Iterable[Tensor]) -> int:
        """Both moments with their scales and tables."""
        return sum(
            8 * n if n < SMALLEST else 2 * n + 8 * -(-n // BLOCK) + _MAPS for n in (p.numel() for p in parameters)
        )
