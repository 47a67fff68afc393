"""Together equals alone on the two embedded bases, with their own instructions."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from tests import kit
from tests.contracts.test_together_equals_alone import assert_bitwise, job_config
from torch import Tensor

from weft.api import Adapters
from weft.assets import EMBEDDED_MODELS, instructions_path
from weft.data import Renderer, load_samples
from weft.models import Base, load_base
from weft.training import Job, Trainer


def train(
    base: Base, methods: list[str], steps: int, *, exact: bool = False, rates: dict[str, float] | None = None
) -> dict[str, list[Tensor]]:
    """Parameters and optimizer states; every job learns from instructions of its own."""
    samples = load_samples(instructions_path("train"), Renderer(base.tokenizer))
    adapters = Adapters(base.model, base.architecture, exact=exact)
    jobs = []
    for method in methods:
        config, index = job_config(method, steps), kit.ALL.index(method)
        if rates and method in rates:
            config = config.model_copy(update={"learning_rate": rates[method]})
        adapter = adapters.add(method, config.method_config(), seed=config.seed)
        jobs.append(Job(config, adapter, samples[100 * index : 100 * index + 100]))
    Trainer(adapters, jobs).run()
    out = {job.name: list(job.tensors().values()) for job in jobs}
    adapters.close()
    return out


def compare(name: str, steps: int, alone: Sequence[str] = kit.ALL) -> None:
    """All methods together; those of ``alone`` also alone."""
    base = load_base(name, dtype="float64")
    together = train(base, kit.ALL, steps)
    for method in alone:
        found = kit.difference(together[method], train(base, [method], steps)[method])
        kit.measured(f"{name} {method}, {steps} steps in fp64: together - alone", found, 1e-10)


def compare_exactly(name: str, steps: int, alone: Sequence[str] = kit.ALL) -> None:
    base = load_base(name, dtype="float32")
    together = train(base, kit.ALL, steps, exact=True)
    for method in alone:
        assert_bitwise(together, train(base, [method], steps, exact=True), method)


def test_together_equals_alone() -> None:
    """All methods together, every third one alone; test_together_equals_alone.py has all of them, on small bases."""
    compare("tiny-llama", 3, kit.ALL[::3])


def test_together_equals_alone_to_the_bit() -> None:
    """Other methods alone."""
    compare_exactly("tiny-bloom", 3, kit.ALL[1::3])


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_every_method_together_and_alone(name: str) -> None:
    compare(name, 4)
    compare_exactly(name, 3)


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_together_equals_alone_after_200_steps(name: str) -> None:
    compare(name, 200)


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_exact_mode_is_bitwise_after_200_steps(name: str) -> None:
    compare_exactly(name, 200)


@pytest.mark.slow
@pytest.mark.parametrize("name", EMBEDDED_MODELS)
def test_rates_at_which_rounding_grows_are_bitwise_in_exact_mode(name: str) -> None:
    """At these rates 200 steps make 0.35 and 1e-10 of a last bit (docs/design.md); nothing leaks all the same."""
    rates = {"bitfit": 1e-2, "prefix_tuning": 1e-2}
    base = load_base(name, dtype="float64")
    together = train(base, ["lora", "bottleneck", *rates], 200, exact=True, rates=rates)
    for method in rates:
        assert_bitwise(together, train(base, [method], 200, exact=True, rates=rates), method)
