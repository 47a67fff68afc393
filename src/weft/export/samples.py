"""What a plain model's folder gives for fixed prompts, by transformers alone."""

from __future__ import annotations

from pathlib import Path

from torch import Tensor

from weft.export.proof import fixed_texts
from weft.export.sides import PlainModel

# A few positions show whether a file is the model or another; each costs a pass of the whole model.
_PROMPTS, _LONGEST = 6, 64


def fixed_samples(folder: Path) -> list[tuple[list[int], Tensor]]:
    """Fixed prompts, each with its logits [positions, tokens] in 32 bits.

    Raises:
        UserError: The folder holds no whole model.
    """
    with PlainModel.load(str(folder), device="cpu") as model:
        prompts = [model.text(text)[:_LONGEST][: model.max_length] for text in fixed_texts()[4 : 4 + _PROMPTS]]
        return [(ids, model.logits(ids)) for ids in prompts]
