"""A merged model quantised once more, with what that does to the change that was merged.

Quantisation rounds every weight, and an adapter's change is often smaller than that rounding. So the change may be
gone, and no figure about the whole model shows it. The signal-to-noise ratio does: the power of the change over the
power of the rounding, over the weights that were changed.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from weft.base.kinds import is_linear
from weft.core.adapter import Adapter
from weft.errors import UserError
from weft.export.figures import Distances
from weft.export.proof import Reference, plain_logits
from weft.files.tensors import read_tensors
from weft.files.whole import remove
from weft.files.writing import writing
from weft.methods.dense import dense_weight, kind_of
from weft.models import gate
from weft.models.int8 import without_rounded_inputs
from weft.models.quantize import Kind, Quantization, one_kernel

_NEW = ".quantised"
# Below this the rounding is larger than the change.
LEAST_DECIBELS = 0.0


@dataclass(frozen=True)
class Requantized:
    """How much of the change is left.

    Attributes:
        decibels: of the change over the rounding, over all weights that were changed; None: no linear was changed.
        worst, worst_decibels: the module where it is least.
        drowned: the share of the changed modules whose rounding is larger than their change.
        agreement: the share of the positions with the likeliest token of base and adapter.
        difference: the largest relative difference of logits from base and adapter.
    """

    kind: str
    decibels: float | None
    _: KW_ONLY
    worst: str
    worst_decibels: float | None
    drowned: float
    agreement: float
    difference: float

    def lines(self) -> list[str]:
        """The figures as lines for people."""
        found = [
            f"in {self.kind}: same likeliest token as base and adapter at {100 * self.agreement:.4g} %, largest "
            f"relative difference of logits {self.difference:.2g}"
        ]
        if self.decibels is not None:
            found.append(
                f"in {self.kind}: the change is {self.decibels:.1f} dB over the rounding of the weights that it "
                f"changed (least: {self.worst_decibels:.1f} dB at {self.worst}; the rounding is larger in "
                f"{100 * self.drowned:.0f} % of the modules)"
            )
        return found

    def notes(self) -> list[str]:
        """What the user should know."""
        if self.decibels is None or self.decibels >= LEAST_DECIBELS:
            return []
        return [
            f"warning: in {self.kind} the rounding of the weights is larger than what the adapter changed "
            f"({self.decibels:.1f} dB), so much of the training may be lost. Serve the adapter beside its base instead."
        ]


@torch.no_grad()
def changes_of(model: nn.Module, adapter: Adapter, new: nn.Module) -> dict[str, float]:
    """The power of what a merge changed, by the path of the linear: ``new`` against the base as training saw it."""
    if adapter.inserted_blocks():  # the paths are others there
        return {}
    found = {}
    for path in adapter.merges():
        module = model.get_submodule(path)
        if is_linear(module):
            change = dense_weight(new.get_submodule(path), torch.float32) - dense_weight(module, torch.float32).cpu()
            found[path] = float(change.square().sum())
    return found


@torch.no_grad()
def requantize(
    folder: Path, kind: Kind, changes: Mapping[str, float], expected: Sequence[Reference], device: torch.device
) -> Requantized:
    """Put quantised weights in the place of those in a merged model's new folder.

    Args:
        changes: of ``changes_of``.
        expected: what base and adapter give.

    Raises:
        UserError: bitsandbytes is not installed, or the quantised model gives logits that are not finite.
        WriteError: The machine refuses to write.
    """
    import transformers

    config = gate.load_config(folder)
    assert config.architectures is not None
    auto = getattr(transformers, config.architectures[0])
    compute = config.dtype if isinstance(config.dtype, torch.dtype) else torch.float32
    options: dict[str, Any] = {"quantization_config": Quantization(kind).config(compute), "device_map": {"": device}}
    model = gate.load_weights(auto, folder, config, dtype=compute, **options)
    one_kernel(model)
    without_rounded_inputs(model)
    noise = _noise(model, folder, changes)
    apart = Distances()
    for one in expected:
        apart.add(one.precise, plain_logits(model, one.ids, device))
    if not math.isfinite(apart.largest):
        raise UserError(f"in {kind} the merged model gives logits that are not finite, and nothing is kept. Leave "
                        "--quantize out, or take another kind.")  # fmt: skip
    with writing(folder):
        model.save_pretrained(folder / _NEW)
        for path in [*folder.glob("*.safetensors"), *folder.glob("*.safetensors.index.json")]:
            remove(path)
        for path in sorted((folder / _NEW).iterdir()):
            os.replace(path, folder / path.name)
    remove(folder / _NEW)
    ratios = {path: _decibels(changes[path], power) for path, power in noise.items() if changes[path]}
    worst = min(ratios, key=lambda path: ratios[path], default="")
    return Requantized(
        kind,
        _decibels(sum(changes[path] for path in ratios), sum(noise[path] for path in ratios)) if ratios else None,
        worst=worst,
        worst_decibels=ratios.get(worst),
        drowned=sum(one < LEAST_DECIBELS for one in ratios.values()) / max(len(ratios), 1),
        agreement=apart.same / apart.positions,
        difference=apart.largest,
    )


def _noise(model: nn.Module, folder: Path, changes: Mapping[str, float]) -> dict[str, float]:
    """The power of what quantisation changed, by the path of the linear, where a merge had changed it."""
    found = {}
    for file in sorted(folder.glob("*.safetensors")):
        for key, wanted in read_tensors(file).items():
            path = key.removesuffix(".weight")
            if path == key or path not in changes:
                continue
            module = model.get_submodule(path)
            if not kind_of(module.weight):  # a head stays as it is
                continue
            found[path] = _distance(dense_weight(module, torch.float32).cpu(), wanted.float())
    return found


def _distance(weight: Tensor, wanted: Tensor) -> float:
    # A Conv1D's file holds [in, out].
    wanted = wanted if wanted.shape == weight.shape else wanted.t()
    return float((weight - wanted).square().sum())


def _decibels(signal: float, noise: float) -> float:
    return 10 * math.log10(signal / noise) if noise else math.inf
