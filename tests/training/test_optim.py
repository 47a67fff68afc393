"""What decays, and the numbers of parameters in a checkpoint."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import kit
from torch import nn

from weft.api import Adapters, describe
from weft.methods import METHODS
from weft.training import JobConfig
from weft.training.optim import decays, make_optimizer, optimizer_tensors, restore_optimizer

METHODS_STORED_WHOLE = [("ln_tuning", {}), ("ia3", {}), ("lora", {"use_dora": True, "modules_to_save": ["norm"]})]


@pytest.mark.parametrize(("method", "settings"), METHODS_STORED_WHOLE)
def test_what_is_stored_whole_does_not_decay(method: str, settings: dict[str, Any]) -> None:
    """A norm's gain begins at the base's and a scale at 1: pulled to 0 they would take the model away."""
    model = kit.make_model("llama")
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", METHODS[method](**settings))
    named = {name: p for name, p in adapter.named_parameters() if p.requires_grad}
    began = {name: p.detach().clone() for name, p in named.items()}
    config = JobConfig(name="it", method=method, weight_decay=0.5)
    pulled = [decays(adapter, name) for name in named]
    optimizer = make_optimizer(config, list(named.values()), [0.1] * len(named), pulled)
    for parameter in named.values():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    still = {name for name, p in named.items() if torch.equal(p, began[name])}
    decayed = {name for name in named if name.endswith("lora_A")}  # B is 0 and stays so in any case
    assert decayed.isdisjoint(still)
    assert still | decayed == set(named)
    assert all(torch.allclose(named[name], began[name] * (1 - 0.1 * 0.5)) for name in decayed)


def test_a_state_from_before_some_did_not_decay_comes_back() -> None:
    """The numbers in a checkpoint are those of the rates alone."""
    config = JobConfig(name="one", method="lora", weight_decay=0.1)
    parameters = [nn.Parameter(torch.full((2,), float(i))) for i in range(4)]
    rates, pulled = [0.1, 0.2, 0.1, 0.1], [False, True, True, False]
    old, new = make_optimizer(config, parameters, rates), make_optimizer(config, parameters, rates, pulled)
    for i, parameter in enumerate(parameters):
        parameter.grad = torch.full((2,), 1.0 + i)
    old.step()
    restore_optimizer(new, optimizer_tensors(old))
    assert all(torch.equal(new.state[p]["exp_avg"], old.state[p]["exp_avg"]) for p in parameters)
    assert {group["weight_decay"] for group in new.param_groups} == {0.1, 0.0}
