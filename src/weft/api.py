"""What a program uses of Weft; ``weft.<name>`` is the same, imported when it is first asked for."""

from __future__ import annotations

from weft.adapters import Adapters
from weft.core.stream import Part
from weft.data import Message, Renderer, register_format
from weft.errors import UserError
from weft.extensions import load_extension
from weft.generation import Request, generate
from weft.generation.open import Target, open_target
from weft.generation.sampling import Sampling
from weft.methods import (
    BitFitConfig,
    BottleneckConfig,
    LoraConfig,
    PrefixTuningConfig,
    PromptTuningConfig,
    register_method,
)
from weft.models import describe, load_base
from weft.objectives import register_objective
from weft.training import RunConfig, load_config, make_config
from weft.training.callbacks import register_callback
from weft.training.run import train

__all__ = [
    "Adapters",
    "BitFitConfig",
    "BottleneckConfig",
    "LoraConfig",
    "Message",
    "Part",
    "PrefixTuningConfig",
    "PromptTuningConfig",
    "Renderer",
    "Request",
    "RunConfig",
    "Sampling",
    "Target",
    "UserError",
    "describe",
    "generate",
    "load_base",
    "load_config",
    "load_extension",
    "make_config",
    "open_target",
    "register_callback",
    "register_format",
    "register_method",
    "register_objective",
    "train",
]
