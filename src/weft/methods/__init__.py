"""The methods, one file each. A new method is its file and one line here."""

from weft.core.config import MethodConfig
from weft.core.files import METHODS
from weft.methods.adalora import AdaLoraConfig
from weft.methods.bitfit import BitFitConfig
from weft.methods.bottleneck import BottleneckConfig
from weft.methods.lora import LoraConfig
from weft.methods.prefix_tuning import PrefixTuningConfig
from weft.methods.prompt_tuning import PromptTuningConfig

_ALL: tuple[type[MethodConfig], ...] = (
    LoraConfig,
    AdaLoraConfig,
    BitFitConfig,
    PromptTuningConfig,
    PrefixTuningConfig,
    BottleneckConfig,
)
METHODS.update({config.method: config for config in _ALL})

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
]
