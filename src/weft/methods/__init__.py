"""The methods, one file each. A new method is its file and one line here."""

from weft.core.config import MethodConfig
from weft.core.files import METHODS
from weft.methods.adalora import AdaLoraConfig
from weft.methods.bitfit import BitFitConfig
from weft.methods.bottleneck import BottleneckConfig
from weft.methods.freeze import FreezeConfig
from weft.methods.full import FullConfig
from weft.methods.hard_prompt import HardPromptConfig
from weft.methods.ia3 import IA3Config
from weft.methods.llama_pro import LlamaProConfig
from weft.methods.ln_tuning import LNTuningConfig
from weft.methods.lora import LoraConfig
from weft.methods.p_tuning import PTuningConfig
from weft.methods.p_tuning_v2 import PTuningV2Config
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
    IA3Config,
    LNTuningConfig,
    HardPromptConfig,
    PTuningConfig,
    PTuningV2Config,
)
METHODS.update({config.method: config for config in _ALL})

__all__ = [
    "METHODS",
    "AdaLoraConfig",
    "BitFitConfig",
    "BottleneckConfig",
    "FreezeConfig",
    "FullConfig",
    "HardPromptConfig",
    "IA3Config",
    "LNTuningConfig",
    "LlamaProConfig",
    "LoraConfig",
    "PTuningConfig",
    "PTuningV2Config",
    "PrefixTuningConfig",
    "PromptTuningConfig",
]
