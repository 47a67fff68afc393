"""NEFTune (Jain et al. 2023, algorithm 1): uniform noise of at most alpha / sqrt(L d) on a sequence's embeddings."""

from __future__ import annotations

import math

import pytest
import torch
from tests import kit
from torch import Tensor

from weft.api import Adapters
from weft.core.stream import Part
from weft.layouts.building import embed
from weft.models import describe
from weft.objectives.passes import Work, evaluate_loss, forward_losses
from weft.training import Job, JobConfig, Trainer
from weft.training.step import train_step

ALPHA, D = 5.0, 32


def opened(kind: str = "llama", dtype: torch.dtype = torch.float64, **options: bool) -> Adapters:
    model = kit.make_model(kind, dtype)
    adapters = Adapters(model, describe(model), **options)
    kit.randomize(adapters.add("lora", kit.method_config("lora"), seed=1), 1)
    kit.randomize(adapters.add("prompt", kit.method_config("prompt_tuning"), seed=2), 2)
    kit.randomize(adapters.add("prefix", kit.method_config("prefix_tuning"), seed=3), 3)
    return adapters


def noise(adapters: Adapters, parts: list[Part], which: int) -> list[Tensor]:
    """What was added to the embeddings of the sequences of one part: a tensor of own rows per sequence; checks that
    every other row is as it is without noise."""
    quiet = [Part(p.adapter, p.sequences, p.seed, answers=p.answers, slots=p.slots) for p in parts]
    noisy, plain = (adapters.stream(some) for some in (parts, quiet))
    with torch.no_grad():
        change = embed(adapters.model, noisy, adapters._adapters) - embed(adapters.model, plain, adapters._adapters)
    first = sum(len(p.sequences) for p in parts[:which])
    rows = [list(r) for r in noisy.rows[first : first + len(parts[which].sequences)]]
    own = {row for places in rows for row in places}
    others = [row for row in range(len(change)) if row not in own]
    assert not change[others].any() or any(p.neftune_alpha for i, p in enumerate(parts) if i != which)
    return [change[places] for places in rows]


def test_scale_and_distribution() -> None:
    """Uniform on (-1, 1) times alpha / sqrt(L d), L being the sequence's own tokens."""
    adapters = opened()
    texts = kit.texts(60, 2, 100)
    units = []
    for ids, added in zip(texts, noise(adapters, [Part("lora", texts, 7, neftune_alpha=ALPHA)], 0), strict=True):
        limit = ALPHA / math.sqrt(len(ids) * D)
        assert 0.9 * limit < float(added.abs().max()) <= limit
        # The paper's point of this scale: the expected length of the noise is alpha / sqrt(3) whatever L.
        expected = ALPHA / math.sqrt(3)
        assert abs(float(added.norm()) - expected) < 6 * expected / math.sqrt(5 * len(ids) * D) * 1.0
        units.append((added / limit).flatten())
    unit = torch.cat(units)
    n = len(unit)
    ordered = ((unit + 1) / 2).sort().values
    kolmogorov = float((ordered - torch.arange(1, n + 1) / n).abs().max()) * math.sqrt(n)
    kit.measured("Kolmogorov-Smirnov statistic against uniform(-1, 1)", kolmogorov, 1.95, derived=True)  # p = 0.001
    assert abs(float(unit.mean())) < 4 / math.sqrt(3 * n)
    # No two places share their numbers.
    assert len(unit.unique()) > 0.99 * n


def test_virtual_tokens_get_none_and_do_not_count() -> None:
    """A prompt's rows stand as they are; L is the text's own length; a prefix changes nothing."""
    adapters = opened()
    texts = kit.texts(5)
    alone = noise(adapters, [Part("lora", texts, 7, neftune_alpha=ALPHA)], 0)
    for name in ("prompt", "prefix"):
        parts = [Part(name, texts, 7, neftune_alpha=ALPHA)]
        assert kit.difference(noise(adapters, parts, 0), alone) < 1e-12
        stream = adapters.stream(parts)
        hidden = embed(adapters.model, stream, adapters._adapters)
        for rows in stream.virtual_rows.values():
            learned = adapters[name].virtual_tokens().repeat(len(texts), 1)
            assert torch.equal(hidden[rows], learned)


def test_neighbours_change_nothing() -> None:
    texts, others = kit.texts(4), kit.texts(6, seed=9)
    for options in ({}, {"padded": True}, {"exact": True}, {"checkpointing": True}):
        adapters = opened(**options)
        own = Part("lora", texts, 7, neftune_alpha=ALPHA)
        alone = noise(adapters, [own], 0)
        for parts in ([own, Part("prompt", others, 8, neftune_alpha=1.0)], [Part("prefix", others, 8), own],
                      [Part(None, others), own]):  # fmt: skip
            found = noise(adapters, parts, parts.index(own))
            # A difference of large numbers: their last digit.
            assert kit.difference(found, alone) < 1e-12
        if not options:
            first = alone
        assert kit.difference(first, alone) < 1e-12, "packed, padded, exact and recomputed draw the same"
        adapters.close()


def test_other_seeds_and_other_strengths_are_other_noise() -> None:
    adapters = opened()
    texts = kit.texts(4)
    one, same, other, twice = (
        noise(adapters, [Part("lora", texts, seed, neftune_alpha=alpha)], 0)
        for seed, alpha in ((7, ALPHA), (7, ALPHA), (8, ALPHA), (7, 2 * ALPHA))
    )
    assert kit.difference(one, same) == 0
    assert kit.difference(one, other) > 0.1
    assert kit.difference([2 * x for x in one], twice) < 1e-12


def test_off_in_evaluation_and_generation() -> None:
    """Without a seed, as both run, there is none; nor for a part without strength beside one that has it."""
    adapters = opened()
    texts = kit.texts(3)
    loud = Part("prompt", texts, 8, neftune_alpha=ALPHA)
    unseeded = Part("lora", texts, None, neftune_alpha=ALPHA)
    for parts in ([unseeded], [unseeded, loud], [Part("lora", texts, 7), loud]):
        assert not any(added.any() for added in noise(adapters, parts, 0))
    samples = kit.samples(4)
    losses = []
    for alpha in (0.0, ALPHA):
        config = JobConfig(name="lora", method="lora", steps=2, batch_size=4, neftune_noise_alpha=alpha)
        job = Job(config, adapters["lora"], samples, samples)
        before = evaluate_loss(adapters, "lora", samples)
        kept = kit.parameters(adapters["lora"])
        losses.append((before, train_step(adapters, [job])["lora"].loss))
        with torch.no_grad():
            for name, parameter in adapters["lora"].named_parameters():
                parameter.copy_(kept[name])
    assert losses[0][0] == losses[1][0], "evaluation is without noise"
    assert abs(losses[0][1] - losses[1][1]) > 1e-3, "training is with it"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_are_those_of_the_noisy_pass(dtype: torch.dtype) -> None:
    """Recomputed blocks see the same noise: the gradients do not change to the bit."""
    found = []
    for checkpointing in (False, True):
        adapters = opened("gpt2", dtype, checkpointing=checkpointing)
        work = [
            Work(name, kit.samples(3, seed=i), 40 + i, divisor=1.0, neftune_alpha=ALPHA)
            for i, name in enumerate(adapters.names)
        ]
        losses = forward_losses(adapters, work)
        if checkpointing:
            forward_losses(adapters, [Work("lora", kit.samples(2), 99, divisor=1.0, neftune_alpha=ALPHA)])
        torch.autograd.backward(losses)
        found.append([g for name in adapters.names for g in kit.gradients(adapters[name]).values()])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_a_job_resumes_to_the_bit() -> None:
    """The noise of a step comes from the job's seed and the step's number."""

    def make() -> tuple[Adapters, Job]:
        adapters = opened("gpt2")
        config = JobConfig(name="lora", method="lora", steps=6, batch_size=2, neftune_noise_alpha=ALPHA, seed=4)
        return adapters, Job(config, adapters["lora"], kit.samples(8))

    adapters, job = make()
    Trainer(adapters, [job]).run()
    broken, first = make()
    for _ in range(3):
        train_step(broken, [first])
    again, second = make()
    second.restore(first.tensors(), first.state())
    Trainer(again, [second]).run()
    assert all(torch.equal(a, b) for a, b in zip(job.tensors().values(), second.tensors().values(), strict=True))
    plain, quiet = make()
    quiet.config = quiet.config.model_copy(update={"neftune_noise_alpha": 0.0})
    Trainer(plain, [quiet]).run()
    assert kit.difference(job.tensors().values(), quiet.tensors().values()) > 1e-5
