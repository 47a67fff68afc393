"""Updates within the backward pass: the same weights to the bit, and hardly more than one gradient at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.kit.alive import Alive
from tests.training.test_optimizers import USABLE
from torch import Tensor

from weft.api import Adapters
from weft.errors import UserError
from weft.files.run_folder import RunStore
from weft.models import describe
from weft.training import Job, JobConfig, Trainer, step

ARGS: dict[str, dict[str, Any]] = {"apollo": {"rank": 3, "update_proj_gap": 2}}


def trainer(layerwise: bool, *methods: str, model: Any = None, adapters: dict[str, Any] | None = None,
            trainer: dict[str, Any] | None = None, **job: Any) -> Trainer:  # fmt: skip
    model = model or kit.make_model("llama")
    opened = Adapters(model, describe(model), **(adapters or {}))
    jobs = []
    for seed, method in enumerate(methods or ("full",)):
        settings = {**kit.SETTINGS.get(method, {}), **kit.DROPOUT.get(method, {})}
        given = {"max_grad_norm": 0, "steps": 3, "batch_size": 3, "learning_rate": 1e-3, "weight_decay": 0.1, **job}
        config = JobConfig(name=method, method=method, method_settings=settings, layerwise_updates=layerwise, **given)
        adapter = opened.add(method, config.method_config(), seed=seed)
        jobs.append(Job(config, adapter, kit.samples(9, seed=seed)))
    return Trainer(opened, jobs, verify_packing=False, **(trainer or {}))


def ended(one: Trainer) -> dict[str, Tensor]:
    result = one.run()
    assert all(job["ended"] == "finished" for job in result.jobs.values()), result.jobs
    return {f"{job.name}.{key}": tensor for job in one.jobs for key, tensor in job.tensors().items()}


def differing(found: dict[str, Tensor], wanted: dict[str, Tensor]) -> list[str]:
    assert found.keys() == wanted.keys()
    return [key for key, tensor in found.items() if not torch.equal(tensor, wanted[key])]


@pytest.mark.parametrize("optimizer", USABLE)
def test_every_optimizer(optimizer: str) -> None:
    more: dict[str, Any] = {"optimizer": optimizer, "optim_args": ARGS.get(optimizer, {})}
    events: list[list[Any]] = [[], []]
    found = [
        ended(trainer(on, trainer={"on_event": events[on].append, "logging_steps": 1}, **more)) for on in (False, True)
    ]
    assert differing(*found) == []
    norms = [[(e["loss"], e["grad_norm"], e["learning_rate"]) for e in told if e["event"] == "step"] for told in events]
    assert norms[0] == norms[1]
    assert len(norms[0]) == 3


@pytest.mark.parametrize(
    "options",
    [{"adapters": {"checkpointing": True}}, {"adapters": {"checkpointing": "cheap"}}, {"pack_tokens": 40}, {}],
    ids=["blocks", "cheap", "two passes", "gpt2, tied"],
)
def test_beside_other_jobs(options: dict[str, Any]) -> None:
    """Recomputed blocks; steps of several passes, whose first gradients wait; a head that is the embeddings."""
    methods = [m for m in kit.TRAINED if m != "adalora"] if options.get("pack_tokens") else ["full", "lora", "bitfit"]
    kind = "llama" if options else "gpt2"
    found = [ended(trainer(on, *methods, model=kit.make_model(kind), **options)) for on in (False, True)]
    assert differing(*found) == []


def test_hardly_more_than_one_gradient_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    sizes = {}
    for on in (False, True):
        one = trainer(on, adapters={"checkpointing": True})
        held: list[int] = []
        optimizer = one.jobs[0].optimizer
        assert optimizer is not None
        plain = optimizer.step

        def spied(plain: Any = plain, held: list[int] = held, one: Trainer = one) -> None:
            held.append(sum(p.grad.nbytes for p in one.jobs[0].parameters if p.grad is not None))
            plain()

        monkeypatch.setattr(optimizer, "step", spied)
        one._step(one.jobs)  # the state of the optimizer is there now
        held.clear()
        with Alive(watch_most=True) as alive:
            one._step(one.jobs)
        sizes[on] = max(held), alive.most
        assert all(p.grad is None for p in one.jobs[0].parameters)
    parameters = [p.nbytes for p in one.jobs[0].parameters]
    assert sizes[False][0] == sum(parameters)
    assert sizes[True][0] == max(parameters)
    assert sizes[False][1] - sizes[True][1] > 0.5 * sum(parameters)


def test_goes_on_bitwise(tmp_path: Path) -> None:
    wanted = ended(trainer(True))
    stops = iter([False] * 2 + [True] * 9)
    store = RunStore(tmp_path / "run")
    store.prepare(overwrite=False, resume=False)
    assert not trainer(True, trainer={"store": store, "should_stop": lambda: next(stops)}).run().completed
    again = trainer(True, trainer={"store": store})
    assert again.resume()
    assert differing(ended(again), wanted) == []
    store.release()


def test_memory_that_runs_out(monkeypatch: pytest.MonkeyPatch) -> None:
    """Before the first update the step begins again; after it, it cannot."""
    wanted = ended(trainer(False))
    one = trainer(True)
    fails = iter([True, False, False])
    forward_losses = step.forward_losses

    def forward(*given: Any) -> Any:
        if next(fails, False):
            raise MemoryError
        return forward_losses(*given)

    monkeypatch.setattr(step, "forward_losses", forward)
    found = ended(one)
    assert max(kit.difference([found[key]], [wanted[key]]) for key in wanted if "parameter" in key) < 1e-4
    assert one.splitting.limit is not None
    monkeypatch.setattr(step, "forward_losses", forward_losses)
    late = trainer(True)
    first = late.adapters.model.get_submodule("model.layers.0")

    def raises(gradient: Tensor) -> None:
        raise MemoryError

    first.register_forward_hook(lambda m, a, out: out.register_hook(raises) and None)
    with pytest.raises(UserError, match="had updated a part of its tensors"):
        late.run()


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"max_grad_norm": 1.0}, "layerwise_updates cannot clip"),
        ({"gradient_accumulation_steps": 2}, "saves nothing with gradient_accumulation_steps"),
    ],
)
def test_settings_that_cannot_be_equal(more: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        trainer(True, **more)


def test_methods_and_bases_that_cannot_be_equal() -> None:
    with pytest.raises(UserError, match="does not go with method adalora"):
        trainer(True, "adalora")
    with pytest.raises(UserError, match="does not go with a base in float16"):
        trainer(True, model=kit.make_model("llama", torch.float16))
