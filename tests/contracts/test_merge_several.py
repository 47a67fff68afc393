"""Several adapters with weights merge in one go: the base's weights plus the weighted sum of each one's changes."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from tests import kit
from tests.contracts.test_merge import config_of, loaded_from, logits, relative

from weft.api import Adapters
from weft.errors import UserError
from weft.merge.model import merged_model
from weft.methods import METHODS
from weft.models import describe

WEIGHTS = (0.7, -0.3)
# Methods that change weights where they stand. Blocks and heads cannot be added.
SUMMED = [one for one in kit.ALL if one not in kit.NOT_MERGEABLE and one != "llama_pro"]
PAIRS = [*zip(SUMMED, [*SUMMED[1:], SUMMED[0]], strict=True), ("lora", "lora"), ("ia3", "ia3"), ("ia3", "lora")]


def opened(kind: str, methods: tuple[str, ...]) -> tuple[Adapters, list[str]]:
    adapters = Adapters(base := kit.make_model(kind, torch.float64), describe(base))
    names = [f"{place}-{method}" for place, method in enumerate(methods)]
    for place, (name, method) in enumerate(zip(names, methods, strict=True)):
        kit.randomize(adapters.add(name, config_of(kind, method), seed=place), place)
    return adapters, names


@pytest.mark.parametrize("methods", PAIRS, ids="+".join)
def test_merged_is_the_weighted_sum(methods: tuple[str, ...], tmp_path: Path) -> None:
    """Of each tensor against merges of one; of the logits against the sum's own route."""
    adapters, names = opened("llama", methods)
    adapters.weighted_sum("sum", names, WEIGHTS)
    found, alone = adapters.merge("sum").tensors, [adapters.merge(name).tensors for name in names]
    own = adapters.model.state_dict()
    for key, tensor in found.items():
        before = own.get(key, torch.zeros_like(tensor))
        changes = [w * (one.get(key, before) - before) for w, one in zip(WEIGHTS, alone, strict=True)]
        wanted = before + torch.stack(changes).sum(0)
        assert torch.allclose(tensor, wanted, rtol=0, atol=1e-12), key
    routed = logits(adapters, "sum")
    assert relative(routed, logits(adapters, names[0])) > 1e-4, "the second adapter does nothing"
    merged = loaded_from(merged_model(adapters.model, adapters.architecture, adapters.merge("sum")), tmp_path)
    other = Adapters(merged, describe(merged))
    kit.measured(f"{'+'.join(methods)}: merged - routed", relative(routed, logits(other, None)), 1e-10)


def test_on_other_layouts(tmp_path: Path) -> None:
    """Conv1D keeps its weights turned; GPT-2's head is its table of embeddings."""
    adapters, names = opened("gpt2", ("lora", "bitfit", "trainable_tokens"))
    adapters.weighted_sum("sum", names, (0.5, 2.0, -1.0))
    routed = logits(adapters, "sum")
    merged = loaded_from(merged_model(adapters.model, adapters.architecture, adapters.merge("sum")), tmp_path)
    other = Adapters(merged, describe(merged))
    kit.measured("gpt2: merged - routed", relative(routed, logits(other, None)), 1e-10)


def test_what_has_no_weight_in_a_sum() -> None:
    adapters, names = opened("llama", ("lora", "llama_pro", "prompt_tuning"))
    with pytest.raises(UserError, match=r"\(llama_pro\) has no weight in a sum: it inserts blocks"):
        adapters.weighted_sum("sum", names[:2], (1.0, 1.0))
    with pytest.raises(UserError, match="every weight must be a finite number"):
        adapters.weighted_sum("sum", names[:1], (float("nan"),))
    with pytest.raises(UserError, match="each once with a weight"):
        adapters.weighted_sum("sum", names[:2], (1.0,))
    adapters.weighted_sum("sum", [names[0], names[2]], (1.0, 1.0))
    with pytest.raises(UserError, match=r"its part prompt_tuning\) cannot be merged"):
        adapters.merge("sum")
    adapters.add("both", METHODS["ia3"]())
    with pytest.raises(UserError, match="is part of the stack 'sum'"):
        adapters.remove(names[0])
