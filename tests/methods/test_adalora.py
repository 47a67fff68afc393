"""AdaLoRA: penalty and budget on hand-worked cases, its arithmetic beside peft's, and what a training leaves."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from tests import kit
from tests.contracts.test_peft_lora import check_ours, our_logits
from torch import Tensor

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.methods import AdaLoraConfig
from weft.models import describe
from weft.training import Job, JobConfig, Trainer
from weft.training.batches import Batches

TARGETS = ["q_proj", "v_proj", "down_proj"]


def open_llama(dtype: torch.dtype = torch.float32, **options: bool) -> Adapters:
    model = kit.make_model("llama", dtype)
    return Adapters(model, describe(model), **options)


def add(adapters: Adapters, name: str = "it", seed: int = 0, **settings: Any) -> Any:
    return adapters.add(name, AdaLoraConfig(**settings), seed=seed)


def make_job(adapters: Adapters, name: str = "it", seed: int = 0, **more: Any) -> Job:
    """30 steps: ranks are settled after 20."""
    settings = {"init_r": 6, "target_r": 3, "tinit": 4, "tfinal": 10, "deltaT": 3, **more.pop("settings", {})}
    config = JobConfig(
        name=name, method="adalora", method_settings=settings,
        **{"steps": 30, "batch_size": 3, "learning_rate": 2e-2, "seed": seed, **more},
    )  # fmt: skip
    return Job(config, adapters.add(name, config.method_config(), seed=seed), kit.samples(9, seed=seed))


def test_the_penalty_is_the_papers() -> None:
    """γ Σ (||Pᵀ P - I||² + ||Q Qᵀ - I||²), worked by hand for two modules."""
    adapters = open_llama(torch.float64)
    adapter = add(adapters, init_r=2, target_r=1, target_modules=["o_proj"], orth_reg_weight=0.25)
    kit.measured("penalty of orthonormal P and Q", float(adapter.penalty().detach()), 1e-10)  # QR in float32
    with torch.no_grad():
        for layer in adapter.layers:
            layer.lora_A.zero_(), layer.lora_B.zero_()
            layer.lora_A[0, 0], layer.lora_A[1, 1] = 1, 1  # Q Qᵀ = I
            layer.lora_B[0, 0], layer.lora_B[1, 1] = 1, 1  # Pᵀ P = I
        first, second = adapter.layers[0], adapter.layers[2]
        first.lora_A[1, 0] = 2  # rows (1, 0), (2, 1): Q Qᵀ = [[1, 2], [2, 5]], minus I: 4 + 4 + 16 = 24
        second.lora_B[0, 0] = 3  # Pᵀ P = diag(9, 1): 64
        second.lora_A[1, 1] = 0  # Q Qᵀ = diag(1, 0): 1
    kit.measured("penalty - 0.25 * (24 + 64 + 1)", abs(float(adapter.penalty().detach()) - 0.25 * 89), 1e-12)
    kit.measured("gradient: 4 γ (Pᵀ P - I) along P", abs(_slope(adapter) - 0.25 * 4 * 3 * 8), 1e-10)
    assert add(adapters, "off", orth_reg_weight=0).penalty() is None


def _slope(adapter: Any) -> float:
    adapter.penalty().backward()
    return float(adapter.layers[2].lora_B.grad[0, 0])


def test_the_loss_holds_the_penalty_once_however_the_batch_is_cut() -> None:
    losses = []
    for size, accumulation, weight in ((8, 1, 0.7), (2, 4, 0.7), (8, 1, 0.0)):
        adapters = open_llama(torch.float64)
        job = make_job(adapters, batch_size=size, gradient_accumulation_steps=accumulation,
                       settings={"orth_reg_weight": weight})  # fmt: skip
        kit.randomize(job.adapter)
        job.samples = job.samples[:8]
        job.batches = Batches(job.config, job.samples)
        from weft.training.step import train_step

        penalty = 0.0 if job.adapter.penalty() is None else float(job.adapter.penalty())
        losses.append((train_step(adapters, [job])["it"].loss, penalty))
        adapters.close()
    kit.measured("cut - whole", abs(losses[0][0] - losses[1][0]), 1e-12)
    assert losses[0][1] > 1e-3
    kit.measured("with - without", abs(losses[0][0] - losses[2][0] - losses[0][1]), 1e-10)


def test_the_budget_falls_cubically() -> None:
    """Eq. 12 with b0 = 9 * 6, b = 9 * 3, 100 steps, 10 before and 40 after."""
    adapter = add(open_llama(), init_r=6, target_r=3, target_modules=TARGETS, tinit=10, tfinal=40)
    adapter.begin_training(100)
    assert [adapter.budget(step) for step in (1, 10)] == [54, 54]
    assert adapter.budget(35) == int(27 + 27 * 0.5**3)  # half of the way
    assert [adapter.budget(step) for step in (60, 61, 100)] == [27, 27, 27]
    budgets = [adapter.budget(step) for step in range(1, 101)]
    assert budgets == sorted(budgets, reverse=True)


@pytest.mark.parametrize(
    ("settings", "total", "schedule"),
    [
        ({}, 1000, (100, 500, 10)),
        ({}, 3, (0, 2, 1)),
        ({}, 1, (0, 1, 1)),
        ({"tinit": 90}, 100, (90, 91, 1)),
        ({"tfinal": 95}, 100, (4, 5, 1)),
        ({"total_step": 50, "deltaT": 7}, 100, (5, 25, 7)),
    ],
)
def test_what_is_not_given_fits_the_run(settings: dict[str, int], total: int, schedule: tuple[int, int, int]) -> None:
    adapter = add(open_llama(), **settings)
    adapter.begin_training(total)
    assert adapter.schedule == schedule


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"tinit": 100}, r"tinit \(100\) and tfinal \(0\) .*tinit \+ tfinal can be 0 to 99"),
        ({"tinit": 60, "tfinal": 40}, r"tinit \(60\) and tfinal \(40\).*0 to 99"),
        ({"total_step": 101}, "total_step is 101, but the run has 100 steps.*1 to 100"),
    ],
)
@pytest.mark.parametrize("meta", [False, True], ids=["loaded", "meta"])
def test_a_schedule_longer_than_the_run_is_refused(settings: dict[str, int], message: str, meta: bool) -> None:
    """Also on the meta device, where configurations are checked before weights are loaded."""
    model = kit.make_model("llama").to("meta" if meta else "cpu")
    adapters = Adapters(model, describe(model))
    adapter = adapters.add("it", AdaLoraConfig(**settings), blank=meta)
    with pytest.raises(UserError, match=message):
        adapter.begin_training(100)
    adapter = adapters.add("fits", AdaLoraConfig(tinit=59, tfinal=40), blank=meta)
    adapter.begin_training(100)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"target_r": 13}, "target_r is 13; it can be 1 to init_r, which is 12"),
        ({"beta1": 1.0}, "beta1"),
        ({"orth_reg_weight": -0.1}, "orth_reg_weight"),
        ({"rank_pattern": {"x.lora_E": [True]}}, "must have init_r"),
    ],
)
def test_settings_that_no_model_allows(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        AdaLoraConfig(**settings)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"init_r": 17}, r"init_r is 17, but at module '.*k_proj' it can be 1 to 16"),
        ({"target_modules": ["embed_tokens"]}, "embed_tokens.* on which adalora cannot be"),
    ],
)
def test_what_cannot_be_is_refused_at_build(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        add(open_llama(), **settings)


def test_every_step_is_pefts(tmp_path: Path) -> None:
    """The same parameters and gradients: smoothed scores, budget and masks of every step of a whole schedule."""
    settings = {"init_r": 6, "target_r": 3, "tinit": 3, "tfinal": 5, "deltaT": 2, "total_step": 24}
    adapters = open_llama()
    adapter = kit.randomize(add(adapters, target_modules=TARGETS, beta1=0.8, beta2=0.7, **settings))
    adapters.save("it", tmp_path)
    theirs = peft.PeftModel.from_pretrained(kit.make_model("llama"), tmp_path, is_trainable=True)
    allocator = theirs.base_model.rankallocator
    adapter.begin_training(24)  # type: ignore[attr-defined]
    named = {name.replace(".default", ""): p for name, p in theirs.named_parameters() if "ranknum" not in name}
    pairs = [(mine, named[key]) for key, mine in adapter.tensors().items()]
    generator = torch.Generator().manual_seed(1)
    seen = set()
    for step in range(1, 25):
        for mine, other in pairs:
            assert torch.equal(mine, other)
            gradient = torch.randn(mine.shape, generator=generator)
            with torch.no_grad():
                mine -= 0.03 * gradient
                other -= 0.03 * gradient
            mine.grad, other.grad = gradient.clone(), gradient.clone()
        adapter.after_step(step)
        theirs.base_model.update_and_allocate(step)
        for path, layer in zip(adapter.paths, adapter.layers, strict=True):  # type: ignore[attr-defined]
            key = f"model.{path}"
            for part in "ABE":
                name = f"{key}.lora_{part}.default"
                if step < 19:
                    close = {"atol": 1e-9, "rtol": 1e-5}
                    ours = layer.get_buffer(f"sensitivity_{part}"), layer.get_buffer(f"uncertainty_{part}")
                    found = [k for k in allocator.exp_avg_ipt if k.endswith(f"{path}.lora_{part}.default")]
                    assert len(found) == 1, name
                    torch.testing.assert_close(ours[0], allocator.exp_avg_ipt[found[0]], **close)
                    torch.testing.assert_close(ours[1], allocator.exp_avg_unc[found[0]], **close)
        if step < 19:
            assert adapter.budget(step) == allocator.budget_schedule(step)[0], step  # type: ignore[attr-defined]
        assert all(torch.equal(mine, other) for mine, other in pairs), step  # masks: λ is zero in both
        seen.add(sum(adapter.ranks().values()))  # type: ignore[attr-defined]
    assert len(seen) > 4
    assert sum(adapter.ranks().values()) == 27  # type: ignore[attr-defined]


def test_equal_scores_do_not_fall_together() -> None:
    """peft's threshold would take all of them: before the first gradient every score is 0."""
    adapter = kit.randomize(add(open_llama(), init_r=4, target_r=2))
    adapter.begin_training(1)  # type: ignore[attr-defined]
    adapter.after_step(1)
    assert sum(adapter.ranks().values()) == 2 * 21  # type: ignore[attr-defined]


@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "qwen2"])
def test_a_training_leaves_the_budget(kind: str, tmp_path: Path) -> None:
    model = kit.make_model(kind)
    adapters = Adapters(model, describe(model))
    job = make_job(adapters)
    adapter: Any = job.adapter
    modules = len(adapter.layers)
    for layer in adapter.layers:
        assert torch.equal(layer.lora_E, torch.zeros(6, 1))
    Trainer(adapters, [job]).run()
    ranks = adapter.ranks()
    assert sum(ranks.values()) == 3 * modules
    assert len(set(ranks.values())) > 1
    check_ours(kind, "adalora after a training", adapters, tmp_path)
    stored = read_tensors(tmp_path / "adapter_model.safetensors")
    for path, rank in ranks.items():
        shapes = [tuple(stored[f"base_model.model.{path}.lora_{p}"].shape) for p in "AEB"]
        assert (shapes[0][0], shapes[1], shapes[2][1]) == (rank, (rank, 1), rank)
    pattern = json.loads((tmp_path / "adapter_config.json").read_text())["rank_pattern"]
    assert {k.removesuffix(".lora_E"): sum(v) for k, v in pattern.items()} == ranks
    print(f"[measured] {kind}: ranks {sorted(ranks.values())}, {3 * modules} in all")


def test_ranks_that_were_settled_stay() -> None:
    adapters = open_llama()
    job = make_job(adapters)
    adapter: Any = job.adapter
    from weft.training.step import train_step

    seen = []
    for _ in range(30):
        train_step(adapters, [job])
        seen.append(torch.cat([layer.kept for layer in adapter.layers]).clone())
    assert all(bool(kept.all()) for kept in seen[:5])  # tinit is 4, allotted at 6
    assert int(seen[5].sum()) < seen[5].numel()
    settled = [kept for kept in seen[19:]]
    assert all(torch.equal(kept, settled[0]) for kept in settled)
    assert not torch.equal(seen[16], seen[19])
    assert bool(adapter.settled)
    for layer in adapter.layers:
        assert not layer.lora_E[~layer.kept].any()
        assert layer.lora_E[layer.kept].all()


def test_a_step_that_is_left_out_does_not_leave_the_ranks_unsettled() -> None:
    """Gradients that are not finite skip a step of the schedule; here it is the one that settles."""
    adapter = kit.randomize(add(open_llama(), init_r=4, target_r=2, tfinal=5, deltaT=9, target_modules=TARGETS))
    adapter.begin_training(10)  # type: ignore[attr-defined]
    for step in (1, 2, 3, 4, 6):
        for parameter in adapter.parameters():
            parameter.grad = torch.ones_like(parameter) * 0.1
        adapter.after_step(step)
    assert sum(adapter.ranks().values()) == 2 * 9  # type: ignore[attr-defined]


def run_30_steps(broken: int | None) -> dict[str, Tensor]:
    """What the job holds in the end; it goes on in another job behind the step ``broken``."""
    adapters = open_llama()
    from weft.training.step import train_step

    job = make_job(adapters, settings={"lora_dropout": 0.2})
    for step in range(30):
        if step == broken:
            saved, progress = {k: v.clone() for k, v in job.tensors().items()}, job.state()
            adapters.close()
            adapters = open_llama()
            job = make_job(adapters, settings={"lora_dropout": 0.2})
            kit.randomize(job.adapter)
            job.restore(saved, progress)
        train_step(adapters, [job])
    found = {k: v.clone() for k, v in job.tensors().items()}
    adapters.close()
    return found


@pytest.fixture(scope="module")
def unbroken() -> dict[str, Tensor]:
    return run_30_steps(None)


@pytest.mark.parametrize(
    "broken", [3, pytest.param(8, marks=pytest.mark.slow), 19, 20, pytest.param(25, marks=pytest.mark.slow)]
)
def test_resume_is_exact(broken: int, unbroken: dict[str, Tensor]) -> None:
    """Whatever phase it is broken in: parameters, optimizer, scores and masks, to the bit."""
    resumed = run_30_steps(broken)
    assert unbroken.keys() == resumed.keys()
    assert any(key.endswith("uncertainty_E") for key in unbroken)
    assert all(torch.equal(unbroken[key], resumed[key]) for key in unbroken)


@pytest.mark.parametrize("kind", ["llama", pytest.param("bloom", marks=pytest.mark.slow)])
def test_jobs_that_drop_ranks_train_together_as_alone(kind: str) -> None:
    def train(seeds: list[int]) -> dict[str, dict[str, Tensor]]:
        model = kit.make_model(kind)
        adapters = Adapters(model, describe(model), exact=True)
        settings = [{}, {"target_r": 2, "deltaT": 1}, {"init_r": 4}]
        jobs = [make_job(adapters, f"job{s}", s, settings=settings[s], batch_size=2 + s) for s in seeds]
        Trainer(adapters, jobs).run()
        found = {job.name: {k: v.clone() for k, v in job.tensors().items()} for job in jobs}
        adapters.close()
        return found

    together = train([0, 1, 2])
    for seed in range(3):
        alone = train([seed])[f"job{seed}"]
        mixed = together[f"job{seed}"]
        assert all(torch.equal(alone[key], mixed[key]) for key in alone), seed
        assert not all(bool(v.all()) for k, v in mixed.items() if k.endswith("kept"))


def test_what_a_loaded_adapter_has_dropped_stays_dropped_when_it_trains_on(tmp_path: Path) -> None:
    adapters = open_llama()
    job = make_job(adapters)
    Trainer(adapters, [job]).run()
    adapters.save("it", tmp_path)
    before = job.adapter.ranks()  # type: ignore[attr-defined]
    adapters.remove("it")
    adapter: Any = adapters.load("it", tmp_path)
    assert adapter.ranks() == before
    again = Job(JobConfig(name="it", method="adalora", steps=30, batch_size=3), adapter, kit.samples(9, seed=4))
    values = kit.parameters(adapter)
    Trainer(adapters, [again]).run()
    assert all(rank <= before[path] for path, rank in adapter.ranks().items())
    assert any(not torch.equal(values[name], p) for name, p in kit.parameters(adapter).items())
    assert sum(adapter.ranks().values()) == sum(before.values())


def test_it_begins_as_the_identity_and_learns() -> None:
    from weft.objectives.passes import evaluate_loss

    adapters = open_llama()
    job = make_job(adapters, steps=60)
    texts = kit.texts(3)
    plain, first = (kit.hidden_of(adapters, [Part(name, texts)]) for name in (None, "it"))
    assert all(torch.equal(a, b) for a, b in zip(plain, first, strict=True))
    before = evaluate_loss(adapters, "it", kit.samples(9))
    Trainer(adapters, [job]).run()
    after = evaluate_loss(adapters, "it", kit.samples(9))
    assert after < 0.7 * before, (before, after)
    assert our_logits(adapters, "it", texts)[0].isfinite().all()
