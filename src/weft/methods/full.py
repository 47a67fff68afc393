"""Full fine-tuning as a job like any other: ``y = f(x; W + ΔW)``, where ΔW of every parameter begins at zero.

The base does not change, so jobs of this and every other kind share it. Each job costs as much memory as the base's
parameters in float32, and as much again per moment of its optimizer. Weight decay pulls ΔW, not W + ΔW, towards zero:
towards the base (L2-SP, Li et al. 2018). Tied tensors have one ΔW, as they have one W.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import ClassVar

from weft.combine.rules import ON_CHANGES
from weft.core.adapter import BuildContext, MethodConfig
from weft.errors import UserError
from weft.methods.own_weights import delta_layers, parameter_names
from weft.methods.site_adapter import SiteAdapter


class FullConfig(MethodConfig):
    """Full fine-tuning has no settings; ``freeze`` trains a chosen part."""

    method: ClassVar[str] = "full"
    peft_type: ClassVar[str] = "FULL"
    default_learning_rate: ClassVar[float] = 2e-5
    small_learning_rate: ClassVar[float | None] = 3e-4
    combination_types: ClassVar[tuple[str, ...]] = ON_CHANGES
    tasks: ClassVar[frozenset[str]] = frozenset({"causal_lm", "sequence_classification"})

    def build(self, name: str, context: BuildContext) -> WeightDeltas:
        return WeightDeltas(self, name, context, parameter_names(context.model))


class WeightDeltas(SiteAdapter):
    """The change of some of the base's parameters, stored as ``base_model.model.<path>.weight_delta`` (or ``bias_``).

    Raises:
        UserError: The role of a parameter is not known, or it is quantised.
    """

    def __init__(self, config: MethodConfig, name: str, context: BuildContext, parameters: Collection[str]) -> None:
        try:
            layers = delta_layers(parameters, context)
        except UserError as error:
            raise UserError(f"{config.method}: {error} Or take another method, such as lora.") from None
        super().__init__(config, name, layers)
