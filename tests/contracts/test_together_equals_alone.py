"""The central promise: jobs trained together end as the same jobs trained alone, weights and not only losses."""

from __future__ import annotations

import pytest
import torch
from tests import kit
from torch import Tensor

from weft.api import Adapters
from weft.models import describe
from weft.training import Job, JobConfig, Trainer

# As unlike as jobs can be. A method that is not listed takes the last line.
TRAINING: dict[str, dict] = {
    "lora": {"batch_size": 4, "learning_rate": 1e-3, "weight_decay": 0.01},
    # Without rotary positions a bias of the keys changes nothing: Adam scales up the rounding of a gradient of 0. On
    # tiny-bloom 100 steps at 1e-2 put up to 1.3e-10 there, and 4e-16 on all other biases.
    "bitfit": {"batch_size": 3, "learning_rate": 3e-3, "lr_scheduler_type": "linear", "share": 0.5},
    "prompt_tuning": {"batch_size": 2, "gradient_accumulation_steps": 3, "optimizer": "sgd", "learning_rate": 0.05},
    # Its network, five samples a step, no decay: at 2.5e-3 rounding itself grows tenfold every 20 steps on tiny-llama.
    "prefix_tuning": {"batch_size": 5, "lr_scheduler_type": "constant", "warmup_steps": 10, "share": 0.9,
                      "learning_rate": 1e-3,
                      "method_settings": {"num_virtual_tokens": 4, "prefix_projection": True}},
    "bottleneck": {"batch_size": 1, "weight_decay": 0.1, "max_grad_norm": 0.3},
}  # fmt: skip
LENGTHS = {
    "lora": (3, 20),
    "bitfit": (5, 33),
    "prompt_tuning": (2, 9),
    "prefix_tuning": (3, 15),
    "bottleneck": (10, 40),
}
STEPS = 6  # with the two shares below 1 still different stop times, and three steps for the shortest job


def job_config(method: str, steps: int) -> JobConfig:
    """The job of one method."""
    given = dict(TRAINING.get(method, {"batch_size": 2, "gradient_accumulation_steps": 2}))
    settings = {**kit.SETTINGS.get(method, {}), **kit.DROPOUT.get(method, {}), **given.pop("method_settings", {})}
    share = given.pop("share", 1.0)
    return JobConfig(
        name=method,
        method=method,
        method_settings=settings,
        steps=int(steps * share),
        seed=kit.ALL.index(method),
        **given,
    )


def train(model: torch.nn.Module, methods: list[str], steps: int, **options: bool) -> dict[str, list[Tensor]]:
    """The trained parameters and optimizer states of every job."""
    adapters = Adapters(model, describe(model), **options)
    jobs = []
    for method in methods:
        config = job_config(method, steps)
        data = kit.samples(30, *LENGTHS.get(method, (3, 25)), seed=config.seed)
        adapter = adapters.add(method, config.method_config(), seed=config.seed)
        jobs.append(Job(config, adapter, data, data[:5]))
    before = {job.name: kit.sha256(job.parameters) for job in jobs}
    result = Trainer(adapters, jobs).run()
    assert {entry["ended"] for entry in result.jobs.values()} == {"finished"}
    out = {job.name: list(job.tensors().values()) for job in jobs}
    assert all(kit.sha256(job.parameters) != before[job.name] for job in jobs if job.name not in kit.UNTRAINED), (
        "a job that does not move proves nothing"
    )
    adapters.close()
    return out


def assert_bitwise(a: dict[str, list[Tensor]], b: dict[str, list[Tensor]], method: str) -> None:
    """All tensors of one job are the same to the bit."""
    assert all(torch.equal(x, y) for x, y in zip(a[method], b[method], strict=True)), method


def compare_in_double(kind: str, steps: int) -> None:
    model = kit.make_model(kind, torch.float64)
    together = train(model, kit.ALL, steps)
    for method in kit.ALL:
        alone = train(model, [method], steps)
        kit.measured(f"{kind} {method} together - alone", kit.difference(together[method], alone[method]), 1e-10)


@pytest.mark.parametrize("kind", ["llama", "bloom", pytest.param("gpt2", marks=pytest.mark.slow)])
def test_in_double_precision(kind: str) -> None:
    compare_in_double(kind, 10 if kind == "llama" else STEPS)


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "steps"), [("llama", 30), ("bloom", 10), ("gpt2", 10)])
def test_after_some_more_steps_in_double_precision(kind: str, steps: int) -> None:
    compare_in_double(kind, steps)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2", "qwen2"])
def test_after_200_steps_in_double_precision(kind: str) -> None:
    compare_in_double(kind, 200)


@pytest.mark.parametrize(
    ("kind", "dtype"),
    kit.in_turn(
        ["llama", "gpt2", pytest.param("bloom", id="bloom", marks=pytest.mark.slow)],
        [pytest.param(torch.float32, id="fp32"), pytest.param(torch.bfloat16, id="bf16")],
    ),
)
def test_exact_mode_is_bitwise(kind: str, dtype: torch.dtype) -> None:
    """Alone, among all, among all in another order, and beside one neighbour."""
    model = kit.make_model(kind, dtype)
    together = train(model, kit.ALL, STEPS, exact=True)
    reordered = train(model, kit.ALL[::-1], STEPS, exact=True)
    for index, method in enumerate(kit.ALL):
        alone = train(model, [method], STEPS, exact=True)
        assert_bitwise(together, alone, method)
        assert_bitwise(reordered, alone, method)
        if index == 0:
            assert_bitwise(train(model, [kit.ALL[-1], method], STEPS, exact=True), alone, method)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", ["llama", "bloom", "gpt2", "qwen2"])
def test_exact_mode_is_bitwise_in_every_pair(kind: str, dtype: torch.dtype) -> None:
    model = kit.make_model(kind, dtype)
    for method in kit.ALL:
        alone = train(model, [method], 60, exact=True)
        for neighbour in kit.ALL:
            if neighbour != method:
                assert_bitwise(train(model, [neighbour, method], 60, exact=True), alone, method)


def test_exact_mode_with_checkpointing_is_bitwise() -> None:
    model, steps = kit.make_model("llama"), 3
    together = train(model, kit.ALL, steps, exact=True, checkpointing=True)
    without = train(model, kit.ALL, steps, exact=True)
    for method in kit.ALL:
        assert_bitwise(together, without, method)
        assert_bitwise(together, train(model, [method], steps, exact=True, checkpointing=True), method)


@pytest.mark.parametrize("kind", ["gpt2", pytest.param("falcon", marks=pytest.mark.slow)])
def test_on_the_padded_path(kind: str) -> None:
    """The width of the padding is the longest neighbour's, and still nothing of it may be felt."""
    model = kit.make_model(kind, torch.float64)
    together = train(model, kit.ALL, STEPS, padded=True)
    for method in kit.ALL:
        alone = train(model, [method], STEPS, padded=True)
        kit.measured(f"{kind} padded {method} together - alone", kit.difference(together[method], alone[method]), 1e-9)
