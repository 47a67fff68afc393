"""Memory that runs out in a pass: the step is made again in smaller passes, and is the same step."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit

from weft.api import Adapters
from weft.errors import UserError
from weft.files.run_folder import RunStore
from weft.models import describe
from weft.training import Job, JobConfig, Trainer, step
from weft.training.fullest import make_fullest_pass
from weft.training.splitting import Splitting, is_out_of_memory

MODEL = kit.make_model("llama", torch.float64)
METHODS = {"lora": {}, "prompt_tuning": {"num_virtual_tokens": 5}, "adalora": {"init_r": 4, "target_r": 4}}


OPENED: list[Adapters] = []


@pytest.fixture(autouse=True)
def _closed() -> Iterator[None]:
    yield
    while OPENED:
        OPENED.pop().close()


def trainer(methods: dict[str, dict[str, Any]] | None = None, **options: Any) -> Trainer:
    while OPENED:
        OPENED.pop().close()
    OPENED.append(adapters := Adapters(MODEL, describe(MODEL)))
    jobs = []
    for seed, (method, settings) in enumerate((METHODS if methods is None else methods).items()):
        config = JobConfig(name=method, method=method, method_settings=settings, steps=3, batch_size=4,
                           gradient_accumulation_steps=1 + seed, learning_rate=0.01)  # fmt: skip
        adapter = kit.randomize(adapters.add(method, config.method_config(), seed=seed))
        jobs.append(Job(config, adapter, kit.samples(12, 2, 30, seed=seed)))
    return Trainer(adapters, jobs, verify_packing=False, **options)


def weights(found: Trainer) -> list[torch.Tensor]:
    result = found.run()
    assert all(one["ended"] == "finished" for one in result.jobs.values()), result.jobs
    return [p for job in found.jobs for p in kit.parameters(job.adapter).values()]


Planted = Callable[[int, Callable[[], Exception], bool], list[int]]


@pytest.fixture
def plant(monkeypatch: pytest.MonkeyPatch) -> Planted:
    """Makes every pass of more than so many tokens fail, forward or in the midst of backward; returns what ran."""
    sizes: list[int] = []
    forward_losses = step.forward_losses

    def raises(error: Callable[[], Exception]) -> None:
        raise error()

    def planted(most: int, error: Callable[[], Exception], backward: bool) -> list[int]:
        def run(adapters: Adapters, work: Any) -> Any:
            size = sum(s.size + adapters[w.adapter].num_virtual_tokens for w in work for s in w.samples)
            sizes.append(size)
            if size > most and not backward:
                raises(error)
            if size > most:
                middle = MODEL.get_submodule("model.layers.1")
                hook = middle.register_forward_hook(
                    lambda m, a, out: out.register_hook(lambda g: raises(error)) and None
                )
                try:
                    return forward_losses(adapters, work)
                finally:
                    hook.remove()
            return forward_losses(adapters, work)

        monkeypatch.setattr(step, "forward_losses", run)
        return sizes

    return planted


@pytest.mark.parametrize("backward", [False, True])
@pytest.mark.parametrize("most", [100, 36])
def test_the_steps_are_the_same(most: int, backward: bool, plant: Planted) -> None:
    """Jobs of one pass apart (100), and then also the samples of a job (36)."""
    wanted = weights(trainer())
    events: list[Any] = []
    sizes = plant(most, MemoryError, backward)
    split = trainer(on_event=events.append)
    found = weights(split)
    kit.measured("split", kit.difference(found, wanted), 1e-12)
    told = [event["message"] for event in events if event["event"] == "warning"]
    failed = [size for size in sizes if size > most]
    assert len(told) == len(failed) <= 4, "what was too large is remembered"
    assert all(f"in a pass of {size:,} tokens" in text for size, text in zip(failed, told, strict=True))
    assert split.splitting.limit is not None
    assert max(sizes[sizes.index(failed[-1]) + 1 :]) <= most


def test_gradients_of_the_pass_that_failed_are_gone(plant: Planted) -> None:
    """Backward reaches the upper layers before it fails: their gradients would count twice."""
    before = weights(trainer({"lora": {}}))
    split = trainer({"lora": {}})
    plant(36, lambda: torch.OutOfMemoryError("CUDA out of memory."), True)
    kit.measured("split", kit.difference(weights(split), before), 1e-12)


def test_a_sequence_that_does_not_fit_by_itself(plant: Planted) -> None:
    plant(0, MemoryError, False)
    split = trainer({"lora": {}})
    with pytest.raises(UserError, match=r"out of memory in a pass of one sequence of \d+ tokens \(job 'lora'\)"):
        split.run()


def test_another_error_ends_the_run(plant: Planted) -> None:
    plant(0, lambda: RuntimeError("shapes"), True)
    split = trainer({"lora": {}})
    with pytest.raises(RuntimeError, match="shapes"):
        split.run()


def test_the_words_of_torch_on_a_cpu() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))


def test_what_the_command_says_of_memory_elsewhere() -> None:
    from weft.cli.main import _users_fault

    assert (_users_fault(MemoryError()) or "").startswith("out of memory. Take a smaller pack_tokens")
    assert (_users_fault(torch.OutOfMemoryError("CUDA: 3 GiB\nmore")) or "").endswith("(CUDA: 3 GiB)")


def test_a_resumed_run_keeps_the_size(tmp_path: Path, plant: Planted) -> None:
    """Bit for bit: how sums are rounded depends on what shares a pass."""
    plant(40, MemoryError, False)
    wanted = weights(trainer())
    stops = iter([False] * 2 + [True] * 9)
    store = RunStore(tmp_path / "run")
    store.prepare(overwrite=False, resume=False)
    stopped = trainer(store=store, should_stop=lambda: next(stops))
    assert not stopped.run().completed
    resumed = trainer(store=store)
    assert resumed.resume()
    assert resumed.splitting.limit == stopped.splitting.limit
    found = weights(resumed)
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))
    store.release()


def test_parts_of_a_job_draw_numbers_of_their_own(plant: Planted, monkeypatch: pytest.MonkeyPatch) -> None:
    plant(36, MemoryError, False)
    seeds: list[list[int]] = []
    forward_losses = step.forward_losses
    monkeypatch.setattr(
        step, "forward_losses", lambda a, work: (seeds.append([w.seed for w in work]), forward_losses(a, work))[1]
    )
    weights(trainer({"lora": {"lora_dropout": 0.5}}))
    done = [one for (one,) in seeds[-3:]]
    assert len(set(done)) == len(done)


METHODS_WITH_NOISE: dict[str, dict[str, Any]] = {
    "lora": {"lora_dropout": 0.3}, "prompt_tuning": {"num_virtual_tokens": 5}, "adalora": {"init_r": 4, "target_r": 4},
}  # fmt: skip


def test_the_fullest_pass_first_changes_nothing() -> None:
    wanted = weights(trainer(METHODS_WITH_NOISE))
    before = torch.get_rng_state()
    found = weights(trainer(METHODS_WITH_NOISE, fullest_pass_first=True))
    assert kit.difference(found, wanted) == 0.0
    assert torch.equal(torch.get_rng_state(), before)


def test_the_fullest_pass_is_the_largest_of_all_steps(plant: Planted) -> None:
    """And memory that runs out in it runs out before the first step."""
    split = trainer(fullest_pass_first=True)
    sizes = plant(10**9, MemoryError, False)
    weights(split)
    assert sizes[0] == max(sizes)
    events: list[Any] = []
    split = trainer(fullest_pass_first=True, on_event=events.append, logging_steps=1)
    sizes = plant(100, MemoryError, True)
    weights(split)
    assert next(event["event"] for event in events) == "warning"
    assert split.splitting.limit is not None
    first = next(number for number, event in enumerate(events) if event["event"] == "step")
    assert all(event["event"] != "warning" for event in events[first:])


def test_no_tensor_is_updated_by_the_fullest_pass() -> None:
    while OPENED:
        OPENED.pop().close()
    OPENED.append(adapters := Adapters(MODEL, describe(MODEL)))
    config = JobConfig(name="lora", method="lora", steps=2, batch_size=4, layerwise_updates=True, max_grad_norm=0.0)
    adapter = kit.randomize(adapters.add("lora", config.method_config(), seed=0))
    job = Job(config, adapter, kit.samples(12, 2, 30, seed=0))
    before = {name: p.detach().clone() for name, p in kit.parameters(adapter).items()}
    make_fullest_pass(adapters, [job], Splitting())
    assert all(torch.equal(p, before[name]) for name, p in kit.parameters(adapter).items())
    assert all(p.grad is None for p in job.parameters)
    assert job.progress.step == 0
