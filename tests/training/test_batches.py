"""Batches filled by tokens: each record once per epoch, a function of seed and step, counted with virtual tokens."""

from __future__ import annotations

import math
import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from tests import kit

from weft.api import Adapters
from weft.data import Sample
from weft.errors import UserError
from weft.models import describe
from weft.objectives.passes import Work, forward_losses
from weft.training import Job, JobConfig, Trainer
from weft.training.batches import Batches
from weft.training.step import train_step

MODEL = kit.make_model("llama")


def config_of(**settings: object) -> JobConfig:
    return JobConfig(**{"name": "one", "method": "lora", **settings})


@given(
    st.integers(1, 40),
    st.integers(14, 60),
    st.integers(1, 3),
    st.sampled_from([1, 2, 2.5, 0.4]),
    st.integers(0, 3),
)
@settings(max_examples=120, deadline=None)
def test_every_record_once_per_epoch(count: int, tokens: int, accumulation: int, epochs: float, seed: int) -> None:
    config = config_of(batch_tokens=tokens, gradient_accumulation_steps=accumulation, epochs=epochs, seed=seed)
    samples = kit.samples(count, seed=seed)
    batches = Batches(config, samples)
    sizes = [batches.steps_in(epoch) for epoch in range(int(epochs) + 1)]
    assert batches.total_steps == max(1, sum(sizes[: int(epochs)]) + math.ceil(epochs % 1 * sizes[-1]))
    step = 0
    for epoch, steps in enumerate(sizes):
        seen = []
        for within in range(steps):
            assert batches.locate(step) == (epoch, within)
            micros = batches[step]
            assert 0 < len(micros) <= accumulation
            assert all(0 < sum(samples[i].size for i in micro) <= tokens for micro in micros)
            seen += [i for micro in micros for i in micro]
            step += 1
        assert sorted(seen) == list(range(count))


@pytest.mark.parametrize(("epochs", "steps"), [(0.5, 2), (1.5, 5), (2.5, 8), (3, 9), (0.1, 1), (1 / 3, 1)])
def test_a_part_of_an_epoch_is_rounded_up(epochs: float, steps: int) -> None:
    """As transformers' Trainer does it, and never to the even neighbour: 12 records in batches of 4."""
    assert config_of(batch_size=4, epochs=epochs).planned_steps(12) == (3, steps)


def test_the_step_alone_says_what_it_holds() -> None:
    """Asked in any order, by an object that has seen nothing before: as after a kill."""
    samples = kit.samples(50, seed=1)
    batches = Batches(config_of(batch_tokens=40, epochs=4), samples)
    told = {step: batches[step] for step in range(batches.total_steps)}
    for step in random.Random(0).sample(sorted(told), 12):
        assert Batches(config_of(batch_tokens=40, epochs=4), samples)[step] == told[step]
    assert Batches(config_of(batch_tokens=40, epochs=4, seed=1), samples)[0] != told[0]
    first, second = told[0], told[batches.steps_in(0)]
    assert first != second, "every epoch has an order of its own"


def test_an_epoch_may_have_another_number_of_packs() -> None:
    """Otherwise the plan of steps would prove nothing."""
    batches = Batches(config_of(batch_tokens=16), kit.samples(60, seed=2))
    counts = [batches.steps_in(epoch) for epoch in range(30)]
    assert len(set(counts)) > 1
    assert batches.total_steps == sum(counts[:3])
    assert batches.locate(counts[0] + counts[1]) == (2, 0)


def test_virtual_tokens_count() -> None:
    samples = [Sample([5] * 10, [0.0] + [1.0] * 9, f"sample {i}") for i in range(12)]
    for method, learned, expected in (("lora", 0, 4), ("prompt_tuning", 5, 2), ("prefix_tuning", 0, 4)):
        adapters = Adapters(MODEL, describe(MODEL))
        config = config_of(method=method, method_settings=kit.SETTINGS[method], batch_tokens=44)
        job = Job(config, adapters.add("one", config.method_config()), samples)
        assert job.adapter.num_virtual_tokens == learned
        assert [len(micro) for micro in job.micro_batches()] == [expected]
        adapters.close()


def test_a_record_that_does_not_fit_is_named() -> None:
    samples = [*kit.samples(3), Sample([5] * 30, [0.0] + [1.0] * 29, "train.jsonl:7")]
    with pytest.raises(
        UserError, match=r"train.jsonl:7: job 'one': 30 tokens do not fit into batch_tokens: 29;.*30 or"
    ):
        Batches(config_of(batch_tokens=29), samples)
    with pytest.raises(
        UserError, match=r"30 tokens and the 5 learned ones .* max_length \(and truncation\) of 25 or less"
    ):
        Batches(config_of(batch_tokens=30), samples, virtual=5)
    assert Batches(config_of(batch_tokens=35), samples, virtual=5).total_steps


@given(
    st.integers(1, 40),
    st.integers(1, 6),
    st.integers(1, 5),
    st.one_of(st.none(), st.integers(14, 60)),
    st.integers(0, 3),
)
@settings(max_examples=150, deadline=None)
def test_a_step_is_packed_into_few_passes(
    count: int, size_: int, accumulation: int, tokens: int | None, seed: int
) -> None:
    """The same records in the same steps as without packs, each once, in no pass more tokens than were asked for."""
    config = config_of(
        batch_size=size_, gradient_accumulation_steps=accumulation, pack_tokens=tokens, epochs=2, seed=seed
    )
    samples = kit.samples(count, seed=seed)
    batches = Batches(config, samples)
    order = batches.mixture.order(seed, 0)
    unpacked = [order[i : i + size_] for i in range(0, count, size_)]
    fullest = max(sum(samples[i].size for i in batch) for batch in unpacked)
    assert batches.capacity == (tokens or max(fullest, *(s.size for s in samples)))
    for step in range(batches.steps_in(0)):
        before = unpacked[step * accumulation : (step + 1) * accumulation]
        packs = batches[step]
        assert sorted(i for pack in packs for i in pack) == sorted(i for batch in before for i in batch)
        assert all(0 < sum(samples[i].size for i in pack) <= batches.capacity for pack in packs)
        came = [i for batch in before for i in batch]
        assert all(pack == sorted(pack, key=came.index) for pack in packs), "in the order drawn"
        if all(sum(samples[i].size for i in batch) <= batches.capacity for batch in before):
            assert len(packs) < len(before) or packs == before
        if sum(samples[i].size for batch in before for i in batch) <= batches.capacity:
            assert packs == [came]
    for step in range(batches.total_steps):  # later epochs keep to what the first one took
        assert all(sum(samples[i].size for i in pack) <= batches.capacity for pack in batches[step])


def test_accumulation_is_packed_by_default() -> None:
    """Six records of unequal length that take three passes of two take two: one long with a short, one of the rest."""
    lengths = [30, 4, 8, 9, 10, 7]
    samples = [Sample([5] * n, [0.0] + [1.0] * (n - 1), f"sample {n}") for n in lengths]
    batches = Batches(config_of(batch_size=2, gradient_accumulation_steps=3), samples)
    assert len(batches[0]) == 2 < 3
    assert len(Batches(config_of(batch_size=6), samples)[0]) == 1
    assert len(Batches(config_of(batch_size=6, pack_tokens=30), samples)[0]) == 3


def test_packs_are_limited_once() -> None:
    with pytest.raises(ValueError, match="batch_tokens and pack_tokens exclude each other"):
        config_of(batch_tokens=100, pack_tokens=100)
    with pytest.raises(UserError, match=r"train.jsonl:7: job 'one': 30 tokens do not fit into pack_tokens: 29"):
        Batches(config_of(pack_tokens=29), [Sample([5] * 30, [0.0] + [1.0] * 29, "train.jsonl:7")])


def test_the_loss_of_a_step_is_the_mean_over_its_own_tokens() -> None:
    """The gradient is the same however the step's records are packed."""
    model = kit.make_model("llama", torch.float64)
    adapters = Adapters(model, describe(model))
    config = config_of(batch_tokens=40, gradient_accumulation_steps=3, steps=5)
    job = Job(config, kit.randomize(adapters.add("one", config.method_config())), kit.samples(30))
    samples = [s for micro in job.micro_batches() for s in micro]
    weight = sum(map(job.adapter.head.loss_weight, samples))
    wanted = sum(float(forward_losses(adapters, [Work("one", [s], divisor=weight)])[0].detach()) for s in samples)
    found = train_step(adapters, [job])["one"]
    assert found.tokens == sum(s.size for s in samples)
    kit.measured("loss of a packed step", abs(found.loss - wanted), 1e-12)
    adapters.close()


def test_jobs_with_and_without_train_side_by_side() -> None:
    adapters = Adapters(MODEL, describe(MODEL))
    jobs = []
    for name, filled in (("full", {"batch_tokens": 64}), ("few", {"batch_size": 2})):
        config = config_of(name=name, epochs=2, **filled)
        jobs.append(Job(config, adapters.add(name, config.method_config()), kit.samples(20)))
    result = Trainer(adapters, jobs).run()
    assert result.completed
    tokens = sum(s.size for s in kit.samples(20))
    assert [result.jobs[name]["tokens"] for name in ("full", "few")] == [2 * tokens, 2 * tokens]
    assert jobs[0].epoch == jobs[1].epoch == 2
    adapters.close()
