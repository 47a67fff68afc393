"""Checkpointing and the offload of what it keeps: with every method nothing changes, and memory is saved."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.kit.alive import Alive
from torch import Tensor

from weft import machine
from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.models import describe
from weft.objectives.passes import Work, forward_losses
from weft.ops import kept
from weft.training import Job, JobConfig, Trainer

KINDS = ["llama", "gpt2", "bloom"]
DISK: dict[str, Any] = {"offload": "disk"}
CHOICES: list[list[dict[str, Any]]] = [
    [{"checkpointing": True}, {"checkpointing": "cheap"}],
    [{"checkpointing": 2}, {"checkpointing": "cheap", **DISK}],
    [{"checkpointing": True, **DISK}, {"checkpointing": "cheap"}],
]


@pytest.fixture(autouse=True)
def _tiny_products_are_dear(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept, "DEAR", 0)


def losses(adapters: Adapters, seed: int) -> list[Tensor]:
    work = [Work(n, kit.samples(3, seed=seed + i), seed=seed + i, divisor=4.0) for i, n in enumerate(kit.TRAINED)]
    return forward_losses(adapters, work)


@pytest.mark.parametrize(
    ("kind", "padded", "choices"),
    kit.in_turn(KINDS, [False, True], [pytest.param(c, id=str(i)) for i, c in enumerate(CHOICES)]),
)
def test_checkpointing_changes_nothing(kind: str, padded: bool, choices: list[dict[str, Any]]) -> None:
    """With dropout on, and with a second forward under another route between forward and backward."""
    found = []
    for options in ({}, *choices):
        adapters = kit.open_with_all(kit.make_model(kind), dropout=True, padded=padded, **options)
        for _ in range(2):  # the second pass finds the files of the first
            first = losses(adapters, seed=1)
            if options:
                kit.hidden_of(adapters, [Part(kit.ALL[-1], kit.texts(5, high=30)), Part(None, kit.texts(2))])
            torch.autograd.backward(first)
        found.append([g for name in kit.ALL for g in kit.gradients(adapters[name]).values()])
        adapters.close()
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("kind", KINDS)
def test_memory_that_is_used_again_changes_nothing(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every tensor that can lie in it does, however small; and what comes back is filled with another number."""
    monkeypatch.setattr(machine, "SMALLEST_ROOM", 1)
    taken, take = [0], machine.Rooms.take

    def poisoned(self: machine.Rooms, count: int) -> memoryview | None:
        memory = take(self, count)
        if memory is not None:
            taken.append(count)
            memory[:] = b"\xff" * len(memory)
        return memory

    monkeypatch.setattr(machine.Rooms, "take", poisoned)
    found = []
    for rooms in (False, True):
        for checkpointing in ("cheap", True):
            adapters = kit.open_with_all(kit.make_model(kind), dropout=True, checkpointing=checkpointing)
            with machine.freed_memory_kept("cpu") if rooms else contextlib.nullcontext():
                for _ in range(2):
                    torch.autograd.backward(losses(adapters, seed=1))
            found.append([g for name in kit.ALL for g in kit.gradients(adapters[name]).values()])
            adapters.close()
    assert len(taken) > 20
    assert machine.ROOMS.used == 0
    for other in found[1:]:
        assert all(torch.equal(a, b) for a, b in zip(found[0], other, strict=True))


@pytest.mark.parametrize("options", [{"checkpointing": 2}, {"checkpointing": "cheap", **DISK}], ids=str)
def test_trained_weights_are_the_same(options: dict[str, Any]) -> None:
    found = []
    for more in ({}, options):
        adapters = Adapters(model := kit.make_model("llama"), describe(model), **more)
        jobs = []
        for method in kit.TRAINED:
            settings = {**kit.SETTINGS.get(method, {}), **kit.DROPOUT.get(method, {})}
            config = JobConfig(name=method, method=method, method_settings=settings, steps=3, batch_size=2)
            jobs.append(Job(config, adapters.add(method, config.method_config()), kit.samples(6)))
        Trainer(adapters, jobs).run()
        found.append(kit.sha256([t for job in jobs for t in kit.parameters(job.adapter).values()]))
        adapters.close()
    assert found[0] == found[1]


def test_checkpointing_really_recomputes(monkeypatch: pytest.MonkeyPatch) -> None:
    """All of attention with ``true``, that of the blocks 0 and 2 of three with 2, none with ``cheap``."""
    from weft.ops import attention

    counts = []
    for checkpointing in (False, True, 2, "cheap"):
        adapters = kit.open_with_all(kit.make_model("llama"), checkpointing=checkpointing)
        calls: list[int] = []
        plain = attention._attended
        monkeypatch.setattr(attention, "_attended", lambda *a, p=plain, c=calls: (c.append(1), p(*a))[1])
        torch.autograd.backward(losses(adapters, seed=1))
        monkeypatch.setattr(attention, "_attended", plain)
        counts.append(len(calls))
        inserted = [p for name in kit.ALL for p, new in adapters[name].inserted_blocks().items() for _ in new]
        adapters.close()
    blocks = 3 + len(inserted)
    assert counts == [blocks, 2 * blocks, blocks + 2 + sum(not p.endswith("1") for p in inserted), blocks]


def kept_by(kind: str, **options: Any) -> int:
    """The bytes that a pass keeps for its backward pass, at the size at which ``cheap`` saves."""
    adapters = Adapters(
        model := kit.make_model(
            kind, **{"llama": {"hidden_size": 64, "intermediate_size": 172}}.get(kind, {"n_embd": 64})
        ),
        describe(model),
        **options,
    )
    kit.randomize(adapters.add("one", kit.METHODS["lora"](r=2, target_modules="all-linear")))
    with Alive() as alive:
        loss = forward_losses(adapters, [Work("one", kit.samples(8, 30, 60), 1)])[0]
        found = alive.bytes()
        loss.backward()
        del loss
        left = alive.bytes() - sum(p.grad.nbytes for p in adapters["one"].parameters() if p.grad is not None)
    adapters.close()
    assert left < 100_000, "the backward pass frees it"
    return found


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_memory_is_saved(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A Llama block is lean already (its norms and products are single nodes), so there ``cheap`` saves less."""
    monkeypatch.setattr(kept, "DEAR", 32)  # above LoRA's rank and the heads' width, as the real one
    plain = kept_by(kind)
    share = {str(c): kept_by(kind, checkpointing=c) / plain for c in (True, 2, "cheap")}
    on_disk = {str(c): kept_by(kind, checkpointing=c, **DISK) / plain for c in (True, "cheap")}
    assert share["True"] < 0.2
    assert share["True"] < share["2"] < 0.8
    assert share["cheap"] < (0.85 if kind == "llama" else 0.5)
    assert on_disk["True"] < share["True"] - 0.01
    assert on_disk["cheap"] < share["cheap"] - 0.15


def test_what_comes_back_from_the_disk_is_not_kept_twice() -> None:
    """Its pages leave memory again. All of a step's were there at its end: 6 GB of 7B with 2,048 tokens."""
    from weft.base.offload import DiskStore

    if sys.platform != "linux":
        pytest.skip("the system does not say what is mapped")
    x = torch.arange(1 << 20).float()
    kept = DiskStore().put(x)
    for _ in range(2):
        assert torch.equal(kept.get(), x)
    lines = Path("/proc/self/smaps").read_text().splitlines()
    begin = next(n for n, line in enumerate(lines) if f"{kept.numbers.data_ptr():x}-" in line)  # type: ignore[attr-defined]
    assert next(line for line in lines[begin:] if line.startswith("Rss:")).split()[1] == "0"


def test_nothing_is_computed_again_or_put_away_below_the_lowest_adapter(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.base.offload import DiskStore

    put, plain = [], DiskStore.put
    monkeypatch.setattr(DiskStore, "put", lambda self, x: (put.append(x.shape), plain(self, x))[1])
    model = kit.make_model("llama")
    calls: list[int] = []
    for number in range(3):
        path = f"model.layers.{number}.self_attn.k_proj"
        model.get_submodule(path).register_forward_hook(lambda *_, number=number: calls.append(number))
    adapters = Adapters(model, describe(model), checkpointing=True, **DISK)
    kit.randomize(adapters.add("one", kit.METHODS["lora"](r=2, target_modules=r"model\.layers\.[12]\..*q_proj")))
    calls.clear()
    put.clear()
    forward_losses(adapters, [Work("one", kit.samples(2), 1)])[0].backward()
    adapters.close()
    assert sorted(calls) == [0, 1, 1, 2, 2]
    assert len(put) == 1, "the input of block 2; that of block 1 is no part of the graph"


def test_a_result_that_was_written_to_is_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """Else what was kept of a product would be what became of it later."""
    adapters = Adapters(model := kit.make_model("llama"), describe(model), checkpointing="cheap", padded=True)
    kit.randomize(adapters.add("one", kit.METHODS["lora"](r=2)))
    mlp = type(model.get_submodule("model.layers.0.mlp"))
    plain: list[Tensor] = []
    for spoil in (False, True):

        def forward(self: Any, x: Tensor, spoil: bool = spoil) -> Tensor:
            gate, up = self.gate_proj(x), self.up_proj(x)
            gate = gate.add_(1.0) if spoil else gate + 1.0
            return self.down_proj(torch.nn.functional.silu(gate) * up)

        monkeypatch.setattr(mlp, "forward", forward)
        forward_losses(adapters, [Work("one", kit.samples(2), 1)])[0].backward()
        found = list(kit.gradients(adapters["one"]).values())
        plain = plain or found
    assert all(torch.equal(a, b) for a, b in zip(plain, found, strict=True))
    adapters.close()


def test_a_block_that_does_not_compute_the_same_twice_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    results = kept.Results()
    keeping, giving = results.contexts()
    a = torch.ones(3, 3)
    with keeping:
        a @ a
    with giving, pytest.raises(RuntimeError, match="does not compute the same twice"):
        torch.bmm(a[None], a[None])


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"offload": "disk"}, "needs gradient_checkpointing"),
        ({"offload": "cpu", "checkpointing": True}, "in CPU memory already"),
        ({"offload_folder": "/no/such", "checkpointing": True, "offload": "disk"}, "/no/such is no folder"),
        ({"offload_folder": "/tmp", "checkpointing": True}, "only offload_activations: disk has one"),
    ],
)
def test_what_is_refused(options: dict[str, Any], message: str) -> None:
    model = kit.make_model("llama")
    before = [type(module) for module in model.modules()]
    with pytest.raises(UserError, match=message):
        Adapters(model, describe(model), **options)
    assert [type(module) for module in model.modules()] == before


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("checkpointing", [True, "cheap"])
def test_a_gpus_activations_in_cpu_memory(checkpointing: Any) -> None:
    found = []
    for options in ({}, {"checkpointing": checkpointing, "offload": "cpu"}, {"checkpointing": checkpointing, **DISK}):
        adapters = kit.open_with_all(kit.make_model("llama").cuda(), **options)
        torch.autograd.backward(losses(adapters, seed=1))
        found.append([g.cpu() for name in kit.ALL for g in kit.gradients(adapters[name]).values()])
        adapters.close()
    for other in found[1:]:
        assert kit.difference(found[0], other) < 1e-6
