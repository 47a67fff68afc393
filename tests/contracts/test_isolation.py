"""What one job can feel of another: nothing. Each of the three leaks seen in other tools has its own test."""

from __future__ import annotations

import pytest
import torch
from tests import kit
from torch import Tensor

from weft.api import Adapters
from weft.core.stream import Part
from weft.data import Sample
from weft.layouts import packed, padded_batch
from weft.models import describe
from weft.objectives.passes import Work, forward_losses
from weft.training import Job, JobConfig
from weft.training.step import train_step

PAIRS = [(method, kit.TRAINED[(i + 1) % len(kit.TRAINED)]) for i, method in enumerate(kit.TRAINED)]


def losses_and_gradients(
    adapters: Adapters, data: dict[str, list[Sample]]
) -> dict[str, tuple[Tensor, dict[str, Tensor]]]:
    """Each job's loss and its adapter's gradients, after one pass over all of ``data``."""
    work = [Work(name, batch, seed=7, divisor=3.0) for name, batch in data.items()]
    losses = forward_losses(adapters, work)
    torch.autograd.backward([loss for loss in losses if loss.requires_grad])
    return {name: (loss.detach(), kit.gradients(adapters[name])) for (name, loss) in zip(data, losses, strict=True)}


@pytest.mark.parametrize("kind", ["llama", "bloom"])
@pytest.mark.parametrize("exact", [True, False], ids=["exact", "normal"])
def test_another_jobs_tokens_change_nothing(kind: str, exact: bool) -> None:
    """Same shapes, other tokens; in exact mode also other lengths and counts."""
    model = kit.make_model(kind, torch.float32 if exact else torch.float64)
    adapters = kit.open_with_all(model, dropout=True, exact=exact)
    for mine, other in PAIRS:
        own, theirs = kit.samples(4, seed=1), kit.samples(3, seed=2)
        changed = kit.samples(5, high=30, seed=3) if exact else [
            Sample([96 - i for i in s.input_ids], s.weights, s.source) for s in theirs
        ]  # fmt: skip
        (loss, grads), (loss2, grads2) = (
            losses_and_gradients(adapters, {mine: own, other: batch})[mine] for batch in (theirs, changed)
        )
        assert grads
        assert grads.keys() == grads2.keys()
        if exact:
            assert torch.equal(loss, loss2), mine
            assert all(torch.equal(grads[name], grads2[name]) for name in grads), mine
            continue
        scale = max(float(g.abs().max()) for g in grads.values())
        worst = kit.difference(grads.values(), grads2.values()) / scale
        kit.measured(f"{kind} {mine} beside {other}, relative", worst, 1e-15)
    adapters.close()


@pytest.mark.parametrize("kind", ["llama", "bloom"])
def test_gradients_with_respect_to_a_neighbour_are_zero(kind: str) -> None:
    """d loss_A / d (parameters of B) does not exist or is exactly 0; so is d loss_A / d (embeddings of B's rows)."""
    adapters = kit.open_with_all(kit.make_model(kind, torch.float64))
    for mine, other in PAIRS:
        work = [Work(mine, kit.samples(3, seed=1)), Work(other, kit.samples(4, seed=2))]
        loss, _ = forward_losses(adapters, work)
        found = torch.autograd.grad(loss, list(adapters[other].parameters()), allow_unused=True)
        assert all(g is None or not g.any() for g in found), (mine, other)
    adapters.close()


@pytest.mark.parametrize("padded", [False, True], ids=["stream", "padded"])
def test_gradients_with_respect_to_a_neighbours_rows_are_zero(padded: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    adapters = kit.open_with_all(kit.make_model("gpt2", torch.float64), padded=padded)
    kept: list[Tensor] = []
    layout = padded_batch if padded else packed
    plain = layout.embed

    def embed(*args: object) -> Tensor:
        kept.append(plain(*args).requires_grad_())  # type: ignore[arg-type]
        return kept[-1]

    monkeypatch.setattr(layout, "embed", embed)
    parts = [Part(name, kit.texts(2, seed=i)) for i, name in enumerate([*kit.ALL, None])]
    stream, hidden = adapters.run(parts)
    sizes = [segment.tokens for segment in stream.route.segments]
    for index, rows in enumerate(hidden.split(sizes)):
        (grad,) = torch.autograd.grad(rows.square().sum(), kept[0], retain_graph=True)
        for other, part in enumerate(grad.split(sizes)):
            assert bool(part.any()) == (other == index), (index, other)
    adapters.close()


def make_jobs(adapters: Adapters, **settings: dict) -> list[Job]:
    """One LoRA job per keyword; ``count`` samples, the rest is the job's configuration."""
    jobs = []
    for seed, (name, given) in enumerate(settings.items()):
        given = {"count": 8, "batch_size": 2, "steps": 20, "method": "lora", **given}
        data = kit.samples(given.pop("count"), *given.pop("lengths", (3, 14)), seed=seed)
        config = JobConfig(name=name, seed=seed, **given)
        jobs.append(Job(config, adapters.add(name, config.method_config(), seed=seed), data))
    return jobs


def test_leak_1_the_mean_is_each_jobs_own() -> None:
    """One token-mean over the whole batch would scale a job's gradient by its share of the tokens."""
    model = kit.make_model("llama", torch.float64)
    norms = []
    for big in (2, 60):
        adapters = Adapters(model, describe(model))
        jobs = make_jobs(adapters, mine={}, other={"count": 60, "batch_size": big, "lengths": (20, 40)})
        norms.append(train_step(adapters, jobs)["mine"])
        adapters.close()
    kit.measured(
        "gradient norm beside 2 or 60 sequences, relative", abs(norms[0].grad_norm / norms[1].grad_norm - 1), 1e-13
    )
    kit.measured("loss beside 2 or 60 sequences", abs(norms[0].loss - norms[1].loss), 1e-13)


def test_leak_2_an_adapter_without_rows_does_not_move() -> None:
    """With one shared AdamW its moments and weight decay would move it, though it had nothing in the batch."""
    adapters = Adapters(kit.make_model("llama"), describe(kit.make_model("llama")))
    jobs = make_jobs(adapters, mine={}, other={"weight_decay": 0.5, "learning_rate": 0.1})
    for _ in range(2):
        train_step(adapters, jobs)
    before = kit.sha256(jobs[1].tensors().values())
    for _ in range(3):
        train_step(adapters, jobs[:1])
    assert kit.sha256(jobs[1].tensors().values()) == before


@pytest.mark.parametrize(
    ("method", "padded"),
    kit.in_turn(sorted(kit.DROPOUT), [pytest.param(False, id="stream"), pytest.param(True, id="padded")]),
)
def test_leak_3_a_neighbours_dropout_does_not_change_mine(method: str, padded: bool) -> None:
    """With one generator a neighbour that draws (or draws more) would shift my masks."""
    model = kit.make_model("gpt2", torch.float64)
    adapters = kit.open_with_all(model, dropout=True, padded=padded)
    own = kit.samples(3, seed=1)
    plain = losses_and_gradients(adapters, {method: own})[method]
    again = losses_and_gradients(adapters, {method: own})[method]
    assert torch.equal(plain[0], again[0])
    others = {name: kit.samples(4, high=40, seed=2) for name in kit.ALL if name != method}
    for data in ({method: own, **others}, {**others, method: own}):
        torch.rand(13)  # the global generator plays no part
        found = losses_and_gradients(adapters, data)[method]
        kit.measured(f"{method} loss, dropout beside others", abs(float(found[0] - plain[0])), 1e-12)
        kit.measured(f"{method} gradients", kit.difference(found[1].values(), plain[1].values()), 1e-12)
    (without,) = forward_losses(adapters, [Work(method, own, seed=None, divisor=3.0)])
    assert float(without) != float(plain[0]), "the dropout does nothing: this test would prove nothing"
    adapters.close()


@pytest.mark.parametrize(("broken", "kind"), kit.in_turn(kit.TRAINED, ["llama", "bloom", "falcon"]))
def test_nan_in_one_adapter_stays_there(broken: str, kind: str) -> None:
    adapters = kit.open_with_all(kit.make_model(kind))
    data = {name: kit.samples(3, seed=i) for i, name in enumerate(kit.ALL)}
    healthy = losses_and_gradients(adapters, data)
    with torch.no_grad():
        for parameter in adapters[broken].parameters():
            parameter.fill_(float("nan"))
    sick = losses_and_gradients(adapters, data)
    assert sick[broken][0].isnan()
    for name in kit.ALL:
        if name != broken:
            assert torch.equal(sick[name][0], healthy[name][0])
            assert all(torch.equal(sick[name][1][k], g) for k, g in healthy[name][1].items()), name
    adapters.close()
