"""The proof of a large base looks at its first words: on every architecture the verdict is that of all words."""

from __future__ import annotations

import dataclasses
from typing import Any

import pytest
import torch
from benchmarks.architecture_configs import NOT_TINY, make_config, names
from torch import nn
from transformers import AutoModelForCausalLM

from weft.errors import UserError
from weft.models import describe, trial
from weft.models.finding import Finding, finding_of

# Mamba's residual stream is float32 in every dtype; xmod counts positions from behind the pad token.
SOME = {"gemma2": torch.float32, "gpt_oss": torch.bfloat16, "mamba": torch.bfloat16, "mpt": torch.float32,
        "opt": torch.bfloat16, "xmod": torch.float32}  # fmt: skip


def build(name: str, dtype: torch.dtype) -> Any:
    """With weights none of which is neutral."""
    generator = torch.Generator().manual_seed(0)
    model = AutoModelForCausalLM.from_config(make_config(name), dtype=torch.float32)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.is_floating_point():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model.to(dtype).eval()


def verdict(model: nn.Module) -> Any:
    """What was found out, or why the model was refused, without its figures."""
    try:
        found = finding_of(describe(model))
        return dataclasses.replace(found, padded_because=found.padded_because[:20])
    except UserError as error:
        return str(error)[:90]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        pytest.param(name, dtype, marks=() if SOME.get(name) == dtype else pytest.mark.slow, id=f"{name}-{short}")
        for name in names() if name not in NOT_TINY
        for short, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16))
    ],
)  # fmt: skip
def test_the_verdict_is_that_of_all_words(name: str, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        torch.manual_seed(0)
        whole = build(name, dtype)
    except Exception as error:  # transformers' own
        pytest.skip(f"no such tiny model: {error}"[:100])
    monkeypatch.setattr(trial, "_small", lambda _: False)
    wanted = verdict(whole)
    monkeypatch.setattr(trial, "_WORDS", 64)
    torch.manual_seed(0)
    model = build(name, dtype)
    with trial.fewer_words(model) as cut:
        pass
    assert (found := verdict(model)) == wanted
    assert name not in SOME or isinstance(found, Finding), found
    assert cut or name not in SOME
