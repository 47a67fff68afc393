"""Weft fine-tunes one frozen language model into many."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from weft.version import __version__ as __version__

if TYPE_CHECKING:
    from weft.api import *  # noqa: F403

# Imported when first used, so that ``import weft`` and ``weft --help`` do not wait for torch. A test holds this list
# and that of ``weft.api`` together.
__all__ = [  # noqa: F405, RUF100
    "AdaLoraConfig",
    "Adapters",
    "BitFitConfig",
    "BottleneckConfig",
    "Constraint",
    "Engine",
    "FreezeConfig",
    "FullConfig",
    "HardPromptConfig",
    "IA3Config",
    "LNTuningConfig",
    "Limits",
    "LlamaProConfig",
    "LoraConfig",
    "Message",
    "PTuningConfig",
    "PTuningV2Config",
    "Part",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "Renderer",
    "Request",
    "RunConfig",
    "Sampling",
    "Target",
    "TrainableTokensConfig",
    "UserError",
    "VeraConfig",
    "describe",
    "generate",
    "load_base",
    "load_config",
    "load_extension",
    "make_config",
    "open_target",
    "read_metrics",
    "register_callback",
    "register_format",
    "register_method",
    "register_objective",
    "register_reward",
    "train",
]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'weft' has no attribute {name!r}")
    value = getattr(importlib.import_module("weft.api"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*(name for name in globals() if name.startswith("__")), *__all__})
