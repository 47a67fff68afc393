"""Objectives over judged answers, with every method: rows in common, step 0, neighbours, accumulation."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.kit.judged import OBJECTIVES, SCORED, records
from torch import Tensor

from weft.api import Adapters
from weft.core.layout import Layout
from weft.data import Sample
from weft.errors import UserError
from weft.heads.reward import RewardTask
from weft.models import describe, load_base
from weft.objectives.judging import Judging, denominators_of
from weft.objectives.passes import Work, forward_losses
from weft.objectives.registry import make_objective
from weft.training import Job, JobConfig, Trainer
from weft.training.judged import add_reference, judging_of

KINDS = ["llama", "gpt2", "bloom", "mistral"]


def judging(name: str, samples: list[Sample]) -> Judging:
    objective = make_objective(*OBJECTIVES[name])
    return Judging(objective, denominators_of(objective, samples), point=0.02)


def data_of(name: str, count: int, seed: int = 0) -> list[Sample]:
    answers = {"kto": 1, "regression": 1, "dpo": 3, "reward": 3}.get(name, 2)
    return records(count, answers=answers, seed=seed)


def losses_and_gradients(adapters: Adapters, works: list[Work]) -> list[Tensor]:
    losses = forward_losses(adapters, works)
    torch.autograd.backward(losses)
    return [
        *(loss.detach() for loss in losses),
        *(g for w in works for g in kit.gradients(adapters[str(w.adapter)]).values()),
    ]


@pytest.mark.parametrize(("kind", "exact"), kit.in_turn(KINDS, [False, True]))
def test_a_prompt_that_answers_share_is_computed_once(kind: str, exact: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """Values and gradients of every method are those of whole sequences, beside SFT rows; and there are fewer rows."""
    model = kit.make_model(kind, torch.float64, **({"sliding_window": 5} if kind == "mistral" else {}))
    adapters = kit.open_with_all(model, exact=exact)
    names = [name for name in OBJECTIVES if name not in SCORED]
    works = []
    for number, method in enumerate(kit.TRAINED):
        name = names[number % len(names)]
        samples = data_of(name, 3, seed=number)
        works.append(Work(method, samples, seed=number, judging=judging(name, samples)))
    works.insert(1, Work(kit.TRAINED[0], kit.samples(3), divisor=7.0))
    shared = losses_and_gradients(adapters, works)
    rows = len(adapters.stream([w.part() for w in works]).input_ids)
    monkeypatch.setattr(Layout, "can_share", lambda self, part: False)
    apart = losses_and_gradients(adapters, works)
    assert rows < len(adapters.stream([w.part() for w in works]).input_ids)
    assert len(shared) == len(apart) > 20
    kit.measured(f"{kind} rows in common - apart", kit.difference(shared, apart), 1e-12)


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_with_dropout_nothing_is_shared(kind: str) -> None:
    """Numbers that are drawn would be the same for both answers, and were not."""
    adapters = kit.open_with_all(kit.make_model(kind), dropout=True)
    for method in kit.TRAINED:
        whole = records(2)
        part = Work(method, whole, seed=1, judging=judging("dpo", whole)).part()
        rows = len(adapters.stream([part]).input_ids)
        virtual = adapters[method].num_virtual_tokens
        apart = sum(len(one.input_ids) + virtual for sample in whole for one in sample.each)
        assert (rows == apart) == bool(kit.DROPOUT.get(method)), method


def test_on_the_padded_path_it_is_the_same() -> None:
    found = []
    for padded in (False, True):
        adapters = kit.open_with_all(kit.make_model("gpt2", torch.float64), padded=padded)
        samples = records(3, answers=3)
        works = [Work(method, samples, judging=judging("dpo", samples)) for method in kit.TRAINED]
        found.append(losses_and_gradients(adapters, works))
        adapters.close()
    kit.measured("judged answers, packed - padded", kit.difference(*found), 1e-12)


def job_of(
    adapters: Adapters, method: str, objective: str, *, count: int = 8, seed: int = 0, moved: bool = False, **more: Any
) -> Job:
    """A job of this method, with the reference that a run gives it."""
    name, settings = OBJECTIVES[objective]
    given = {"steps": 3, "batch_size": 4, "seed": seed, "objective_settings": settings, **more}
    own = kit.SETTINGS.get(method, {})
    config = JobConfig(name=f"{method}-{objective}", method=method, method_settings=own, objective=name, **given)
    head = RewardTask() if objective in SCORED else None
    adapter = adapters.add(config.name, config.method_config(), seed=seed, head=head)
    if moved:
        kit.randomize(adapter, seed)
    reference = add_reference(adapters, config, adapter, Base(adapters), fresh=not moved)
    data = data_of(objective, count, seed=seed)
    return Job(config, adapter, data, data[:3], reference=reference, shares_rows=adapters.layout.shares_rows)


class Base:
    """What a reference asks of a base."""

    tokenizer = None
    added_ids: tuple[int, ...] = ()

    def __init__(self, adapters: Adapters) -> None:
        self.model = adapters.model


@torch.no_grad()
def at_step_0(adapters: Adapters, job: Job) -> tuple[dict[str, float], float]:
    """What there is to watch of a job's records, and their loss."""
    samples = list(job.samples)
    judged = judging_of(adapters, job, [samples])
    loss = float(forward_losses(adapters, [Work(job.name, samples, judging=judged)])[0])
    return judged.tally.means(), loss


@pytest.mark.parametrize("moved", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_at_step_0_the_margin_is_0_and_the_loss_is_ln_2(kind: str, moved: bool) -> None:
    for method in kit.TRAINED:
        adapters = Adapters(model := kit.make_model(kind, torch.float64), describe(model))
        job = job_of(adapters, method, "dpo", objective_settings={}, moved=moved)
        figures, loss = at_step_0(adapters, job)
        assert figures["rewards/margins"] == 0.0 == figures["rewards/chosen"], (method, figures)
        assert loss == pytest.approx(math.log(2), abs=2e-16), method
        adapters.close()


@pytest.mark.parametrize("moved", [False, True], ids=["fresh", "continued"])
@pytest.mark.parametrize("quantization", ["nf4", "int8"])
def test_at_step_0_over_a_quantised_base(quantization: Any, moved: bool, tmp_path: Path) -> None:
    """Policy and reference read the same weights by the same kernels, so that nothing is left of the difference."""
    pytest.importorskip("bitsandbytes")
    kit.make_model("llama").save_pretrained(tmp_path)
    tokenizer: Any = object()
    base = load_base(str(tmp_path), quantization=quantization, dtype="float32", device="cpu", tokenizer=tokenizer)
    adapters = Adapters(base.model, base.architecture)
    refused = []
    for method in kit.TRAINED:
        try:
            job = job_of(adapters, method, "dpo", objective_settings={}, moved=moved)
        except UserError:
            refused.append(method)
            continue
        figures, loss = at_step_0(adapters, job)
        assert figures["rewards/margins"] == 0.0 == figures["rewards/chosen"], (method, figures)
        assert loss == pytest.approx(math.log(2), abs=1e-7), method
    assert set(refused) <= {"full", "freeze"}, "they train the weights that are quantised"


def train(objectives: list[str], dtype: torch.dtype, *, exact: bool = False, **more: Any) -> dict[str, list[Tensor]]:
    """The tensors of jobs with these objectives, each of another method, beside one another; "sft" is a plain one."""
    methods = ["lora", "prompt_tuning", "bottleneck", "prefix_tuning", "bitfit", "adalora", "ia3", "p_tuning", "dora",
               "llama_pro", "vera"]  # fmt: skip
    methods = [method for method in methods if method in kit.TRAINED]
    adapters = Adapters(model := kit.make_model("llama", dtype), describe(model), exact=exact)
    jobs = []
    for objective in objectives:
        number = [*OBJECTIVES, "sft"].index(objective)
        if objective == "sft":
            config = JobConfig(name="sft", method="lora", steps=3, batch_size=3)
            jobs.append(Job(config, adapters.add("sft", config.method_config()), kit.samples(9)))
        else:
            jobs.append(job_of(adapters, methods[number % len(methods)], objective, seed=number, **more))
    Trainer(adapters, jobs).run()
    found = {job.name: [t for t in job.tensors().values() if t.is_floating_point()] for job in jobs}
    assert all(job.progress.ended == "finished" for job in jobs)
    adapters.close()
    return found


def test_together_is_alone() -> None:
    """Every objective beside every other and beside SFT."""
    together = train([*OBJECTIVES, "sft"], torch.float64)
    for objective in (*OBJECTIVES, "sft"):
        ((name, alone),) = train([objective], torch.float64).items()
        kit.measured(f"{objective} together - alone", kit.difference(together[name], alone), 1e-10)


def test_exact_mode_is_bitwise() -> None:
    together = train([*OBJECTIVES, "sft"], torch.float32, exact=True)
    for objective in ("dpo", "kto", "reward", "regression", "orpo", "sft"):
        ((name, alone),) = train([objective], torch.float32, exact=True).items()
        assert all(torch.equal(a, b) for a, b in zip(together[name], alone, strict=True)), objective


@pytest.mark.parametrize("objective", list(OBJECTIVES))
def test_accumulation_changes_nothing(objective: str) -> None:
    """KTO's reference point too is of the whole step."""
    whole = train([objective], torch.float64, batch_size=8)
    parts = train([objective], torch.float64, batch_size=2, gradient_accumulation_steps=4, pack_tokens=80)
    for name, tensors in whole.items():
        kit.measured(f"{objective} in parts - whole", kit.difference(tensors, parts[name]), 1e-11)
