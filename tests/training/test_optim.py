"""Schedules and the optimizers' state."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from tests import kit
from torch import nn

from weft.api import Adapters, describe
from weft.methods import METHODS
from weft.training import JobConfig
from weft.training.optim import decays, make_optimizer, optimizer_tensors, restore_optimizer, schedule_factor


@pytest.mark.parametrize("kind", ["constant", "linear", "cosine"])
@pytest.mark.parametrize(("total", "warmup"), [(100, 0), (100, 10), (1, 0), (5, 5), (3, 7)])
def test_schedules(kind: str, total: int, warmup: int) -> None:
    factors = [schedule_factor(kind, step, total, warmup) for step in range(total)]
    assert all(0 < f <= 1 for f in factors), "a step with rate 0 would be wasted"
    for step in range(min(warmup, total)):
        assert factors[step] == (step + 1) / warmup
    after = factors[warmup:]
    assert after == sorted(after, reverse=True)
    if after:
        assert after[0] == 1.0
        assert kind != "constant" or set(after) == {1.0}


def test_schedules_are_the_known_ones() -> None:
    """Against transformers', which multiplies the rate with the factor of its step too."""
    from transformers import get_scheduler

    for kind in ("linear", "cosine"):
        optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
        theirs = get_scheduler(kind, optimizer, num_warmup_steps=0, num_training_steps=37)
        for step in range(37):
            assert math.isclose(schedule_factor(kind, step, 37, 0), theirs.get_last_lr()[0], abs_tol=1e-12)
            optimizer.step()
            theirs.step()


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


@pytest.mark.parametrize("kind", ["adamw", "sgd"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_state_comes_back_to_the_bit(kind: str, dtype: torch.dtype) -> None:
    config = JobConfig(name="one", method="lora", optimizer=kind, weight_decay=0.1)
    generator = torch.Generator().manual_seed(0)

    def step(parameters: list[nn.Parameter], optimizer: torch.optim.Optimizer, seed: int) -> None:
        for p in parameters:
            p.grad = torch.randn(p.shape, generator=generator.manual_seed(seed), dtype=dtype)
        optimizer.step()

    first = [nn.Parameter(torch.ones(7, dtype=dtype)), nn.Parameter(torch.ones(3, 2, dtype=dtype))]
    optimizer = make_optimizer(config, first, [0.01, 0.02])
    assert optimizer_tensors(optimizer) == {}
    for seed in range(3):
        step(first, optimizer, seed)
    stored = {key: value.clone() for key, value in optimizer_tensors(optimizer).items()}
    assert stored
    second = [nn.Parameter(p.detach().clone()) for p in first]
    other = make_optimizer(config, second, [0.01, 0.02])
    restore_optimizer(other, stored)
    for seed in range(3, 6):
        step(first, optimizer, seed)
        step(second, other, seed)
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    found, wanted = optimizer_tensors(other), optimizer_tensors(optimizer)
    assert all(torch.equal(found[key], wanted[key]) for key in wanted)
