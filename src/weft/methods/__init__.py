"""The methods, one file each. A new method is its file and one line here."""

from weft.core.config import MethodConfig
from weft.core.files import METHODS
from weft.methods.bitfit import BitFitConfig
from weft.methods.bottleneck import BottleneckConfig
from weft.methods.ia3 import IA3Config
from weft.methods.ln_tuning import LNTuningConfig
from weft.methods.lora import LoraConfig
from weft.methods.prefix_tuning import PrefixTuningConfig
from weft.methods.prompt_tuning import PromptTuningConfig

_ALL: tuple[type[MethodConfig], ...] = (
    LoraConfig,
    BitFitConfig,
    PromptTuningConfig,
    PrefixTuningConfig,
    BottleneckConfig,
    IA3Config,
    LNTuningConfig,
)
METHODS.update({config.method: config for config in _ALL})

__all__ = [
    "METHODS",
    "BitFitConfig",
    "BottleneckConfig",
    "IA3Config",
    "LNTuningConfig",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
]
