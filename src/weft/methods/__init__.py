"""The methods, one file each. A new method is its file and one line here; or a file outside (docs/extending.md)."""

from weft.core.adapter import MethodConfig
from weft.methods.adalora import AdaLoraConfig as AdaLoraConfig
from weft.methods.bitfit import BitFitConfig as BitFitConfig
from weft.methods.bottleneck import BottleneckConfig as BottleneckConfig
from weft.methods.freeze import FreezeConfig as FreezeConfig
from weft.methods.full import FullConfig as FullConfig
from weft.methods.hard_prompt import HardPromptConfig as HardPromptConfig
from weft.methods.ia3 import IA3Config as IA3Config
from weft.methods.llama_pro import LlamaProConfig as LlamaProConfig
from weft.methods.ln_tuning import LNTuningConfig as LNTuningConfig
from weft.methods.lora import LoraConfig as LoraConfig
from weft.methods.p_tuning import PTuningConfig as PTuningConfig
from weft.methods.p_tuning_v2 import PTuningV2Config as PTuningV2Config
from weft.methods.prefix_tuning import PrefixTuningConfig as PrefixTuningConfig
from weft.methods.prompt_tuning import PromptTuningConfig as PromptTuningConfig
from weft.methods.registry import METHODS as METHODS
from weft.methods.registry import register_method as register_method
from weft.methods.trainable_tokens import TrainableTokensConfig as TrainableTokensConfig
from weft.methods.vera import VeraConfig as VeraConfig

METHODS.update(
    {
        found.method: found
        for found in list(globals().values())
        if isinstance(found, type) and issubclass(found, MethodConfig) and found is not MethodConfig
    }
)
