"""The trainer: how jobs end, what happens to one that cannot go on, and in what precision it all happens."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit

from weft.api import Adapters
from weft.files.run_folder import RunStore
from weft.models import describe
from weft.objectives.passes import evaluate_loss
from weft.training import Job, JobConfig, Trainer


def make(model: Any, *given: dict[str, Any], count: int = 8, evaluate: int = 3) -> tuple[Adapters, list[Job]]:
    adapters = Adapters(model, describe(model))
    jobs = []
    for seed, settings in enumerate(given):
        config = JobConfig(**{"method": "lora", "steps": 10, "batch_size": 2, "seed": seed, **settings})
        adapter = adapters.add(config.name, config.method_config(), seed=seed)
        jobs.append(Job(config, adapter, kit.samples(count, seed=seed), kit.samples(evaluate, seed=60 + seed)))
    return adapters, jobs


def test_early_stopping_ends_with_the_best_weights() -> None:
    """A rate too high: the loss falls, then rises, and what evaluated best comes back."""
    events: list[Any] = []
    adapters, jobs = make(
        kit.make_model("llama"),
        {"name": "wild", "steps": 60, "learning_rate": 0.02, "eval_steps": 2, "early_stopping_patience": 3},
        {"name": "calm", "steps": 25, "learning_rate": 1e-3, "eval_steps": 5},
    )
    result = Trainer(adapters, jobs, on_event=events.append).run()
    assert result.completed
    assert result.jobs["wild"]["ended"] == "early_stop"
    assert result.jobs["calm"]["ended"] == "finished"
    told = [(e["step"], e["eval_loss"]) for e in events if e["event"] == "eval" and e["job"] == "wild"]
    best = min(loss for _, loss in told)
    place = [loss for _, loss in told].index(best)
    assert len(told) - 1 - place == 3, "three evaluations without a gain, then the end"
    assert told[-1][1] > best
    assert evaluate_loss(adapters, "wild", jobs[0].eval_samples) == best
    assert result.jobs["wild"]["best_eval_loss"] == best
    # Before the first step, every eval_steps, and at the end.
    assert [e["step"] for e in events if e["event"] == "eval" and e["job"] == "calm"] == [0, 5, 10, 15, 20, 25]


def test_patience_does_not_discard_the_last_gain() -> None:
    """A job that keeps gaining is not ended, and keeps its last weights."""
    adapters, jobs = make(
        kit.make_model("llama"),
        {"name": "one", "steps": 12, "learning_rate": 1e-3, "eval_steps": 4, "early_stopping_patience": 1},
    )
    jobs[0].eval_samples = jobs[0].samples
    result = Trainer(adapters, jobs).run()
    assert result.jobs["one"]["ended"] == "finished"
    assert evaluate_loss(adapters, "one", jobs[0].eval_samples) == result.jobs["one"]["best_eval_loss"]


@pytest.mark.parametrize("neighbours", [2, pytest.param(len(kit.ALL) - 1, marks=pytest.mark.slow)])
@pytest.mark.parametrize("sick", kit.TRAINED)
def test_a_job_that_is_not_finite_ends_alone(sick: str, neighbours: int, tmp_path: Path) -> None:
    """It ends at once and says so; the others end as if it had never been there."""
    model = kit.make_model("llama", torch.float64)
    given = {m: {"name": m, "method": m, "method_settings": kit.SETTINGS.get(m, {}), "steps": 4} for m in kit.ALL}
    place = kit.ALL.index(sick)
    healthy = [kit.ALL[(place + further) % len(kit.ALL)] for further in range(1, neighbours + 1)]
    ends, events = [], []
    for names in (healthy, [sick, *healthy]):
        adapters = Adapters(model, describe(model))
        jobs = []
        for name in names:
            config = JobConfig(**given[name], batch_size=2)
            adapter = adapters.add(name, config.method_config(), seed=kit.ALL.index(name))
            jobs.append(Job(config, adapter, kit.samples(8, seed=kit.ALL.index(name))))
        if sick in names:
            torch.nn.init.constant_(jobs[0].parameters[0], float("inf"))
        store = RunStore(tmp_path / f"run-{len(names)}")
        store.prepare(overwrite=False, resume=False)
        events.clear()
        result = Trainer(adapters, jobs, on_event=events.append, store=store).run()
        ends.append({job.name: list(kit.parameters(job.adapter).values()) for job in jobs})
        adapters.close()
    assert result.completed
    assert (result.jobs[sick]["ended"], result.jobs[sick]["step"]) == ("failed", 1)
    assert [e["job"] for e in events if e["event"] == "warning"] == [sick]
    for name in healthy:
        assert result.jobs[name]["ended"] == "finished"
        kit.measured(f"{name} beside a failed {sick}", kit.difference(ends[0][name], ends[1][name]), 1e-10)
    for line in (tmp_path / f"run-{neighbours + 1}" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=lambda word: pytest.fail(f"{word} is not JSON"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=str)
def test_masters_stay_in_float32(dtype: torch.dtype) -> None:
    """Whatever the base computes in; and a step too small for bfloat16 still moves them."""
    model = kit.make_model("llama", dtype)
    given = [
        {"name": m, "method": m, "method_settings": kit.SETTINGS.get(m, {}), "learning_rate": 1e-6, "steps": 5}
        for m in kit.TRAINED
    ]
    adapters, jobs = make(model, *given)
    before = {job.name: kit.parameters(job.adapter) for job in jobs}
    result = Trainer(adapters, jobs).run()
    assert all(p.dtype == dtype for p in model.parameters())
    for job in jobs:
        assert result.jobs[job.name]["ended"] == "finished"
        assert all(p.dtype == torch.float32 for p in job.parameters)
        kept = job.tensors()
        assert all(t.dtype == torch.float32 for t in kept.values() if t.is_floating_point())
        factor = job.adapter.learning_rate_factor
        named = job.adapter.named_parameters()
        moved = max(float((p - before[job.name][n]).abs().max()) / factor(n) for n, p in named)
        assert 1e-7 < moved < 1e-4, job.name
    adapters.close()


def test_float16_scales_the_loss_and_backs_off() -> None:
    """The gradients that come out are those without a scale; an overflow halves it and skips the step, nothing more."""
    model = kit.make_model("llama", torch.float16)
    adapters, jobs = make(model, {"name": "one", "steps": 4})
    trainer = Trainer(adapters, jobs)
    assert jobs[0].progress.loss_scale == 2.0**12
    before = kit.parameters(jobs[0].adapter)
    jobs[0].progress.loss_scale = 2.0**40
    trainer._step(jobs)
    assert jobs[0].progress.loss_scale == 2.0**39
    assert jobs[0].active
    assert kit.difference(before.values(), kit.parameters(jobs[0].adapter).values()) == 0
    jobs[0].progress.loss_scale = 2.0**12
    trainer._step(jobs)
    assert kit.difference(before.values(), kit.parameters(jobs[0].adapter).values()) > 0
    norms = []
    for scale in (1.0, 2.0**12):
        adapters.close()
        adapters, jobs = make(model, {"name": "one", "steps": 4})
        trainer = Trainer(adapters, jobs)
        jobs[0].progress.loss_scale = scale
        from weft.training.step import train_step

        norms.append(train_step(adapters, jobs)["one"].grad_norm)
    assert abs(norms[0] / norms[1] - 1) < 0.02
    adapters.close()


def test_what_is_logged() -> None:
    events: list[Any] = []
    adapters, jobs = make(kit.make_model("llama"), {"name": "a", "steps": 7}, {"name": "b", "steps": 4}, evaluate=0)
    losses: dict[str, list[float]] = {"a": [], "b": []}
    import weft.training.loop as loop

    plain = loop.train_step

    def spy(adapters: Adapters, active: list[Job], splitting: Any) -> Any:
        results = plain(adapters, active, splitting)
        for name, result in results.items():
            losses[name].append(result.loss)
        return results

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "train_step", spy)
        Trainer(adapters, jobs, logging_steps=3, on_event=events.append).run()
    steps = {name: [e for e in events if e["event"] == "step" and e["job"] == name] for name in "ab"}
    assert [e["step"] for e in steps["a"]] == [1, 3, 6, 7]
    assert [e["step"] for e in steps["b"]] == [1, 3, 4]
    wanted = [losses["a"][0], sum(losses["a"][1:3]) / 2, sum(losses["a"][3:6]) / 3, losses["a"][6]]
    assert [e["loss"] for e in steps["a"]] == pytest.approx(wanted, rel=1e-12)
    assert events[-1]["event"] == "end"
    assert events[-1]["completed"] is True
