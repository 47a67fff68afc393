"""P-tuning v2 (Liu et al. 2021, "P-Tuning v2: Prompt tuning can be comparable to fine-tuning universally"): learned
keys and values ``[P_l^K; K]``, ``[P_l^V; V]`` in every layer l, as in prefix tuning. They are parameters themselves and
not an encoder's output. It serves generation, and classification with a head of its own."""

from __future__ import annotations

from typing import ClassVar

from weft.methods.prefix_tuning import DeepPromptConfig


class PTuningV2Config(DeepPromptConfig):
    """PEFT knows it as prefix tuning without a projection."""

    method: ClassVar[str] = "p_tuning_v2"
