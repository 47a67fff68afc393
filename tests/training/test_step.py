"""Micro-batches and accumulation are bookkeeping: they do not change the mathematics."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import kit
from torch import Tensor

from weft.api import Adapters
from weft.core.stream import Part
from weft.data import Sample
from weft.models import describe
from weft.objectives.passes import Work, evaluate_loss, forward_losses
from weft.training import Job, JobConfig
from weft.training.step import train_step

MODEL = kit.make_model("gpt2", torch.float64)


def one_step(method: str, data: list[Sample], **given: Any) -> tuple[dict[str, Tensor], Any]:
    """Parameters after one step of plain gradient descent, which shows the gradient itself."""
    adapters = Adapters(MODEL, describe(MODEL))
    try:
        config = JobConfig(name="one", method=method, method_settings=kit.SETTINGS.get(method, {}), steps=3, seed=4,
                           optimizer="sgd", momentum=0.0, learning_rate=1.0, max_grad_norm=0, **given)  # fmt: skip
        adapter = kit.randomize(adapters.add("one", config.method_config()))
        job = Job(config, adapter, data)
        result = train_step(adapters, [job])["one"]
        return kit.parameters(adapter), result
    finally:
        adapters.close()


@pytest.mark.parametrize("method", kit.TRAINED)
def test_8x1_is_4x2_is_2x4(method: str) -> None:
    number = kit.ALL.index(method)
    check_cuts(method, seed=number, count=5 + number % 4, weights=(0.25, 1.0, 2.0))


@pytest.mark.slow
@pytest.mark.parametrize("method", kit.TRAINED)
@settings(max_examples=20)
@given(seed=st.integers(0, 10_000), count=st.integers(5, 8), weights=st.sampled_from([(1.0,), (0.25, 1.0, 2.0)]))
def test_8x1_is_4x2_is_2x4_for_any_samples(method: str, seed: int, count: int, weights: tuple[float, ...]) -> None:
    check_cuts(method, seed, count, weights)


def check_cuts(method: str, seed: int, count: int, weights: tuple[float, ...]) -> None:
    """Unequal token counts: a mean of the micro-batches' means would not pass."""
    data = [
        Sample(s.input_ids, [w * weights[i % len(weights)] for i, w in enumerate(s.weights)], s.source)
        for s in kit.samples(count, 2, 30, seed=seed)
    ]
    data = [s for s in data if sum(s.weights)]
    wanted, told = one_step(method, data, batch_size=8)
    for size, steps in ((4, 2), (2, 4), (1, 8), (3, 3)):
        found, result = one_step(method, data, batch_size=size, gradient_accumulation_steps=steps)
        assert kit.difference(wanted.values(), found.values()) < 1e-12
        assert abs(result.loss - told.loss) < 1e-12
        assert abs(result.grad_norm - told.grad_norm) < 1e-10
        assert result.tokens == told.tokens == sum(len(s.input_ids) for s in data)
    for size, steps, tokens in ((8, 1, 40), (4, 2, 45), (2, 4, 1000)):  # the same step in many passes, some, and one
        packed = {"batch_size": size, "gradient_accumulation_steps": steps, "pack_tokens": tokens}
        found, result = one_step(method, data, **packed)
        assert kit.difference(wanted.values(), found.values()) < 1e-12
        assert abs(result.loss - told.loss) < 1e-12
        assert result.tokens == told.tokens


def test_the_gradient_is_that_of_the_mean_over_learned_tokens() -> None:
    """Against autograd over an ordinary cross-entropy of the model itself."""
    data = kit.samples(5, seed=1)
    adapters = Adapters(MODEL, describe(MODEL), padded=True)
    adapter = kit.randomize(adapters.add("one", kit.method_config("lora")))
    total, count = 0.0, 0.0
    for sample in data:
        stream_logits = adapters.logits(kit.hidden_of(adapters, [Part("one", [sample.input_ids])])[0])
        weights = torch.tensor(sample.weights[1:], dtype=torch.float64)
        losses = torch.nn.functional.cross_entropy(
            stream_logits[:-1], torch.tensor(sample.input_ids[1:]), reduction="none"
        )
        total, count = total + (losses * weights).sum(), count + float(weights.sum())
    (total / count).backward()
    wanted = {name: p.detach() - p.grad for name, p in adapter.named_parameters()}
    adapters.close()
    found, result = one_step("lora", data, batch_size=5)
    kit.measured("one step of descent", kit.difference(wanted.values(), found.values()), 1e-12)
    kit.measured("loss", abs(result.loss - float(total / count)), 1e-12)


@pytest.mark.parametrize(
    ("count", "size", "accumulation", "epochs"), [(10, 3, 2, 2), (7, 2, 1, 1.5), (3, 8, 4, 2), (9, 1, 4, 1)]
)
def test_every_epoch_sees_every_sample_once(count: int, size: int, accumulation: int, epochs: float) -> None:
    adapters = Adapters(MODEL, describe(MODEL))
    config = JobConfig(
        name="one", method="lora", batch_size=size, gradient_accumulation_steps=accumulation, epochs=epochs
    )
    job = Job(config, adapters.add("one", config.method_config()), kit.samples(count))
    adapters.close()
    seen: list[list[str]] = []
    for step in range(job.total_steps):
        job.progress.step = step
        micros = job.micro_batches()
        assert micros
        assert all(len(micro) > 0 for micro in micros)
        assert sum(map(len, micros)) <= size * accumulation
        seen.append([s.source for micro in micros for s in micro])
    per = job.batches.steps_in(0)
    assert job.total_steps == max(1, round(epochs * per))
    orders = []
    for begin in range(0, job.total_steps - per + 1, per):
        epoch = [name for step in seen[begin : begin + per] for name in step]
        assert sorted(epoch) == sorted(s.source for s in job.samples)
        orders.append(epoch)
    assert len(orders) < 2 or count < 4 or orders[0] != orders[1]


def test_clipping_is_each_jobs_own() -> None:
    """The update's length is the rate times the limit, whatever the gradient's was."""
    for limit in (0.5, 1e-3):
        adapters = Adapters(MODEL, describe(MODEL))
        jobs, before = [], {}
        for name, rate in (("small", 1.0), ("big", 1.0)):
            config = JobConfig(name=name, method="lora", steps=3, optimizer="sgd", momentum=0.0, learning_rate=rate,
                               max_grad_norm=limit if name == "small" else 0)  # fmt: skip
            adapter = kit.randomize(adapters.add(name, config.method_config()))
            before[name] = kit.parameters(adapter)
            jobs.append(Job(config, adapter, kit.samples(4, seed=2)))
        results = train_step(adapters, jobs)
        for job in jobs:
            moved = torch.stack([(p - before[job.name][n]).norm() for n, p in job.adapter.named_parameters()]).norm()
            norm = results[job.name].grad_norm
            wanted = min(norm, limit) if job.name == "small" else norm
            assert abs(float(moved) - wanted) < 1e-5 * wanted
        adapters.close()


def test_evaluation_does_not_depend_on_how_it_is_cut_and_draws_nothing() -> None:
    adapters = kit.open_with_all(MODEL, dropout=True)
    data = kit.samples(9, 2, 25, seed=3)
    for name in [None, *kit.ALL]:
        values = [evaluate_loss(adapters, name, data, max_tokens=n) for n in (1, 40, 10_000)]
        assert max(values) - min(values) < 1e-12
        learned = sum(sum(s.weights) for s in data)
        with torch.no_grad():
            assert abs(float(forward_losses(adapters, [Work(name, data)])[0]) / learned - values[0]) < 1e-12
    adapters.close()
