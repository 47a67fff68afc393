"""A configuration per method.

A new method needs one line in ``SETTINGS`` only if its defaults do not fit a model of width 32; it then inherits every
contract, for they are all parametrised over ``METHODS``.
"""

from __future__ import annotations

from typing import Any

from weft.core.adapter import MethodConfig
from weft.methods import METHODS

ALL = sorted(METHODS)

# Per method, what its tests set.
SETTINGS: dict[str, dict[str, Any]] = {
    "lora": {"r": 4},
    # As many ranks as the budget: what AdaLoRA's file holds when it drops some, its own tests see.
    "adalora": {"init_r": 4, "target_r": 4},
    "bitfit": {"add_missing": True},
    "prompt_tuning": {"num_virtual_tokens": 5},
    "prefix_tuning": {"num_virtual_tokens": 4},
    "bottleneck": {"reduction_factor": 4},
    "hard_prompt": {"prompt_ids": [5, 17, 17, 40]},
    "trainable_tokens": {"token_indices": [*range(96, 4, -1)]},
    "p_tuning": {"num_virtual_tokens": 4},
    "p_tuning_v2": {"num_virtual_tokens": 3},
}
# Every method's fields of that name.
DROPOUT: dict[str, dict[str, Any]] = {
    method: found
    for method, config in METHODS.items()
    if (found := {name: 0.2 for name in config.model_fields if name.endswith("dropout")})
}
# The dropout of an encoder lies between the layers of its LSTM.
DROPOUT["p_tuning"] |= {"encoder_reparameterization_type": "LSTM"}
# Methods that do not promise to begin as the identity: they put something new before the text.
NOT_IDENTITY = {"prompt_tuning", "prefix_tuning", "hard_prompt", "p_tuning", "p_tuning_v2"}
# Methods whose effect no weights of the base can have; all others merge (``test_merge``).
NOT_MERGEABLE = {"prompt_tuning", "prefix_tuning", "hard_prompt", "p_tuning", "p_tuning_v2", "bottleneck"}
# Methods that train nothing; those that do.
UNTRAINED = {"hard_prompt"}
TRAINED = [method for method in ALL if method not in UNTRAINED]


def method_config(method: str, *, dropout: bool = False, **more: Any) -> MethodConfig:
    """The method's configuration for tests."""
    return METHODS[method](**{**SETTINGS.get(method, {}), **(DROPOUT.get(method, {}) if dropout else {}), **more})
