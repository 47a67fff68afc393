"""The optimizers, each in a file of its own; names are transformers' (``optim``)."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from weft.training.optimizers.adafactor import Adafactor
from weft.training.optimizers.adamw import AdamW
from weft.training.optimizers.apollo import Apollo
from weft.training.optimizers.eight_bit import AdamW8Bit
from weft.training.optimizers.kind import OptimizerKind, tensor_bytes
from weft.training.optimizers.lion import Lion
from weft.training.optimizers.paged import PagedAdamW, PagedAdamW8Bit
from weft.training.optimizers.sgd import Sgd

__all__ = ["OPTIMIZERS", "OptimizerKind", "OptimizerName", "tensor_bytes"]

OptimizerName = Literal[
    "adamw", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "adafactor", "lion", "sgd", "apollo"
]  # fmt: skip
_ALL = (AdamW, AdamW8Bit, PagedAdamW, PagedAdamW8Bit, Adafactor, Lion, Sgd, Apollo)
OPTIMIZERS: Mapping[str, type[OptimizerKind]] = {one.name: one for one in _ALL}
