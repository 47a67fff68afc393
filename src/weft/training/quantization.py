"""The part of a run's settings that says how the base's linears are kept."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, Field, model_validator

from weft.models.quantize import BlockSize, Kind, Quantization


class QuantizationSettings(BaseModel):
    """How the base is kept."""

    quantization: Kind | None = Field(
        None, description="how the linears are kept: NF4 or FP4, LLM.int8; needs `weft[quant]`"
    )
    double_quantization: bool = Field(
        True, description="4 bits: the scales of blocks are quantised too (0.127 bits per parameter instead of 0.5)"
    )
    quantization_block_size: BlockSize = Field(64, description="4 bits: how many numbers share a scale")
    quantization_dtype: Literal["float32", "bfloat16", "float16"] | None = Field(
        None, description="4 bits: what the linears multiply in; default: `dtype`"
    )

    @model_validator(mode="after")
    def _only_of_four_bits(self) -> QuantizationSettings:
        for key in ("quantization_block_size", "quantization_dtype"):
            usual = type(self).model_fields[key].default
            if self.quantization not in ("nf4", "fp4") and getattr(self, key) != usual:
                raise ValueError(f"{key} is for 4 bits; add quantization: nf4 (or fp4), or leave it out")
        return self

    @property
    def kept(self) -> Quantization | None:
        """How the linears of the base are kept; None: as their checkpoint has them."""
        if self.quantization is None:
            return None
        return Quantization(
            self.quantization,
            double=self.double_quantization,
            block_size=self.quantization_block_size,
            compute_dtype=self.quantization_dtype,
        )
