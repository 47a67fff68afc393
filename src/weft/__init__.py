"""Weft fine-tunes one frozen language model into many."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from weft.core.adapters import Adapters
    from weft.core.stream import Part
    from weft.data import Message, Renderer
    from weft.errors import UserError
    from weft.generate import Request, generate
    from weft.generate.open import Opened, open_target
    from weft.generate.sampling import Sampling
    from weft.methods import BitFitConfig, BottleneckConfig, LoraConfig, PrefixTuningConfig, PromptTuningConfig
    from weft.models import describe, load_base
    from weft.train import RunConfig, load_config, make_config
    from weft.train.run import train

__version__ = "0.1.0"

# The module of each name; None for a package that can be called. It is imported at its first use, so that `import weft`
# and `weft --help` do not wait for torch.
_HOMES: dict[str, str | None] = {
    "Adapters": "weft.core.adapters",
    "BitFitConfig": "weft.methods",
    "BottleneckConfig": "weft.methods",
    "LoraConfig": "weft.methods",
    "Message": "weft.data",
    "Opened": "weft.generate.open",
    "Part": "weft.core.stream",
    "PrefixTuningConfig": "weft.methods",
    "PromptTuningConfig": "weft.methods",
    "Renderer": "weft.data",
    "Request": "weft.generate",
    "RunConfig": "weft.train",
    "Sampling": "weft.generate.sampling",
    "UserError": "weft.errors",
    "describe": "weft.models",
    "generate": None,
    "load_base": "weft.models",
    "load_config": "weft.train",
    "make_config": "weft.train",
    "open_target": "weft.generate.open",
    "train": None,
}

__all__ = [
    "Adapters",
    "BitFitConfig",
    "BottleneckConfig",
    "LoraConfig",
    "Message",
    "Opened",
    "Part",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "Renderer",
    "Request",
    "RunConfig",
    "Sampling",
    "UserError",
    "describe",
    "generate",
    "load_base",
    "load_config",
    "make_config",
    "open_target",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    home = _HOMES[name]
    if home is None:
        return importlib.import_module(f"weft.{name}")
    value = getattr(importlib.import_module(home), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
