"""Every schedule beside transformers' own."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import nn

from weft.errors import UserError
from weft.training import JobConfig
from weft.training.schedules import SCHEDULES

# name -> options: ours, and those that transformers needs beside them.
CASES: list[tuple[str, dict[str, Any], dict[str, Any]]] = [
    ("constant", {}, {}),
    ("linear", {}, {}),
    ("cosine", {}, {}),
    ("cosine", {"num_cycles": 1.25}, {}),
    ("cosine_with_restarts", {}, {}),
    ("cosine_with_restarts", {"num_cycles": 3}, {}),
    ("cosine_with_min_lr", {"min_lr": 0.05}, {}),
    ("cosine_with_min_lr", {"min_lr_rate": 0.2, "num_cycles": 1.0}, {}),
    ("polynomial", {}, {}),
    ("polynomial", {"lr_end": 0.01, "power": 2.5}, {}),
    ("inverse_sqrt", {}, {}),
    ("inverse_sqrt", {"timescale": 7}, {}),
    ("warmup_stable_decay", {}, {"num_decay_steps": 4}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "decay_type": "linear", "min_lr_ratio": 0.1}, {}),
    ("warmup_stable_decay", {"num_decay_steps": 5, "num_stable_steps": 20, "decay_type": "1-sqrt"}, {}),
    ("warmup_stable_decay", {"num_decay_steps": 9, "num_cycles": 1.5}, {}),
]
RATE, TOTAL = 0.5, 37


def config(name: str, options: object, **more: Any) -> JobConfig:
    return JobConfig(name="one", method="lora", lr_scheduler_type=name, lr_scheduler_kwargs=options, **more)


@pytest.mark.parametrize("warmup", [0, 5])
@pytest.mark.parametrize(("name", "ours", "theirs"), CASES, ids=str)
def test_equals_transformers(name: str, ours: dict[str, Any], theirs: dict[str, Any], warmup: int) -> None:
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=RATE)
    named = "constant_with_warmup" if name == "constant" else name
    given = {} if name == "constant" else {"num_training_steps": TOTAL}
    scheduler = get_scheduler(
        named, optimizer, num_warmup_steps=warmup, scheduler_specific_kwargs={**theirs, **ours}, **given
    )
    schedule = config(name, ours).schedule
    for step in range(TOTAL):
        found = schedule.factor(step, TOTAL, warmup, RATE)
        if step >= warmup:
            assert math.isclose(found * RATE, scheduler.get_last_lr()[0], abs_tol=1e-12), step
        else:
            assert found == (step + 1) / warmup
        optimizer.step()
        scheduler.step()


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize(("total", "warmup"), [(100, 0), (100, 10), (1, 0), (5, 5), (3, 7)])
def test_no_step_is_wasted(name: str, total: int, warmup: int) -> None:
    options = {"min_lr_rate": 0.1} if name == "cosine_with_min_lr" else {}
    schedule = config(name, options).schedule
    factors = [schedule.factor(step, total, warmup, RATE) for step in range(total)]
    assert all(0 < f <= 1 for f in factors)
    after = factors[warmup:]
    assert after == sorted(after, reverse=True)
    assert not after or after[0] == 1.0


def test_every_schedule_is_compared() -> None:
    assert {name for name, _, _ in CASES} == set(SCHEDULES)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("linear", {"power": 2}, "linear has no option 'power'; it has none"),
        ("cosine", {"num_cycle": 2}, "cosine has no option 'num_cycle'; it has num_cycles.*num_cycles"),
        ("cosine_with_min_lr", {}, "needs one of min_lr and min_lr_rate"),
        ("cosine_with_min_lr", {"min_lr": 1e-5, "min_lr_rate": 0.1}, "needs one of"),
        ("polynomial", {"power": "much"}, "power is 'much'; expected: a valid number"),
        ("warmup_stable_decay", {"decay_type": "exp"}, "decay_type is 'exp'; expected: 'linear'"),
        ("cosine", "num_cycles", "name=value"),
    ],
)
def test_wrong_options(name: str, options: object, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        config(name, options)


def test_an_end_above_the_rate() -> None:
    schedule = config("cosine_with_min_lr", "min_lr=1e-3").schedule
    schedule.check(2e-3)
    with pytest.raises(UserError, match=r"min_lr 0\.001 is no less than the learning_rate, 0\.0005"):
        schedule.check(5e-4)
