"""The methods, one file each. A new method is its file and one line here."""

from weft.core.config import MethodConfig
from weft.core.files import METHODS
from weft.methods.adalora import AdaLoraConfig
from weft.methods.bitfit import BitFitConfig
from weft.methods.bottleneck import BottleneckConfig
from weft.methods.freeze import FreezeConfig
from weft.methods.full import FullConfig
from weft.methods.llama_pro import LlamaProConfig
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
    FullConfig,
    FreezeConfig,
    LlamaProConfig,
)
METHODS.update({config.method: config for config in _ALL})

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "FreezeConfig",
    "FullConfig",
    "LlamaProConfig",
    "LoraConfig",
    "PrefixTuningConfig",
    "PromptTuningConfig",
]
