"""A plan made without weights, beside what the run then does."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from weft import measured
from weft.cli.main import main
from weft.errors import UserError
from weft.models import load_base
from weft.models.quantize import Quantization
from weft.ops import products
from weft.planning import library
from weft.planning.dry_run import DryRun, Ghost, Piece, without_memory
from weft.planning.fit import fit
from weft.planning.flops import flops_of
from weft.planning.heap import Heap, HeapAndRooms, heap_of, peak_of
from weft.planning.memory import CAUSES, MemoryPlan
from weft.planning.plan import Plan, plan_of
from weft.planning.rehearsal import Rehearsal, material, rehearsed
from weft.planning.sizes import size_of
from weft.planning.timing import StepTime
from weft.training.config import make_config
from weft.training.loop import train_step
from weft.training.optimizers.eight_bit import SMALLEST
from weft.training.run import prepare


@pytest.fixture(autouse=True)
def _library(monkeypatch: pytest.MonkeyPatch) -> None:
    # A process of its own measures it, which takes ten seconds.
    monkeypatch.setattr("weft.planning.plan.growth", lambda quantization: 0)


def run_of(data: Path, **settings: Any) -> dict[str, Any]:
    common = {"model": "tiny-llama", "data": str(data), "steps": 3, "batch_size": 4, "dtype": "float32",
              "device": "cpu", "method": "lora", "verify_packing": False}  # fmt: skip
    return {**common, **settings}


class Watched(torch.utils._python_dispatch.TorchDispatchMode):
    """The most bytes of new memory that were held at once, of tensors with numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.held: dict[int, int] = {}
        self.most = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        import weakref

        found = func(*args, **(kwargs or {}))
        known = {id(x.untyped_storage()) for x in args if isinstance(x, torch.Tensor)}
        for tensor in found if isinstance(found, (list, tuple)) else (found,):
            if isinstance(tensor, torch.Tensor) and tensor.is_floating_point():
                storage = tensor.untyped_storage()
                if id(storage) not in self.held and id(storage) not in known:
                    self.held[id(storage)] = storage.nbytes()
                    weakref.finalize(storage, self.held.pop, id(storage), None)
        self.most = max(self.most, sum(self.held.values()))
        return found


@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"gradient_checkpointing": True, "batch_size": 8},
        {"gradient_checkpointing": "cheap"},
        {"method": ["prefix_tuning", "bottleneck"]},
        {"method": "full", "optimizer": "sgd"},
        {"model": "tiny-bloom", "method": "bitfit", "dtype": "bfloat16"},
    ],
    ids=str,
)
def test_a_rehearsal_holds_what_the_step_holds(tiny_data: Path, tmp_path: Path, settings: dict[str, Any]) -> None:
    config = make_config(run_of(tiny_data, output_dir=str(tmp_path / "run"), **settings))
    planned = rehearsed(material(config), lambda rehearsal: (rehearsal.calls_of(0), rehearsal.dry.recording))[1]
    most = peak_of(planned.pieces, Heap(mmap_threshold=0, page=1))[0]
    setup = prepare(config)
    products._SCRATCH.__dict__.clear()  # another test's would be used again
    watched = Watched()
    with watched:
        train_step(setup.adapters, setup.jobs)
    setup.adapters.close()
    assert most == pytest.approx(watched.most, rel=0.03)


def test_a_ghost_takes_no_memory_and_has_every_shape() -> None:
    dry = DryRun(torch.device("cpu"))
    model = nn.Sequential(nn.Linear(1 << 16, 1 << 16, bias=False, device="meta"), nn.GELU())
    without_memory(model.modules(), dry.empty)
    with dry:
        x = torch.ones(3, 1 << 16)
        y = model(x).sum()
        y.backward()
    weight = model[0].weight
    assert isinstance(weight, Ghost)
    assert weight.device.type == "cpu"
    assert weight.grad.shape == weight.shape
    assert flops_of(dry.recording.calls) == 2 * 2 * 3 * (1 << 32)
    assert dry.piece_of(weight.grad).bytes == 4 << 32


def test_integers_are_real_inside() -> None:
    dry = DryRun(torch.device("cpu"))
    with dry:
        rows = torch.tensor([2, 0])
        assert rows.tolist() == [2, 0]
        assert torch.arange(3).tolist() == [0, 1, 2]
        assert torch.zeros(4, 5).index_select(0, rows).shape == (2, 5)
        assert torch.randperm(5).sum().item() == 10


def test_a_heap_never_gives_two_pieces_one_place() -> None:
    drawn = random.Random(0)
    heap, there = Heap(mmap_threshold=5000), {}
    for _ in range(2000):
        if there and drawn.random() < 0.48:
            place = drawn.choice(list(there))
            heap.give_back(place, there.pop(place))
        else:
            count = drawn.choice([1, 100, 1000, 4999])
            place = heap.take(count)
            assert all(place + count <= other or other + size <= place for other, size in there.items())
            there[place] = count
    for place, count in there.items():
        heap.give_back(place, count)
    assert heap._gaps == [(heap.length, 0)], "all gaps have become one"


def test_large_pieces_go_back_at_once() -> None:
    pieces = [Piece(1 << 30, 2 * n, phase="", freed=2 * n + 1) for n in range(3)]
    assert peak_of(pieces, Heap()) == (1 << 30, 0)
    assert peak_of([Piece(1000, n, phase="") for n in range(3)], heap_of("cuda"))[0] == 3 * 1024


def test_a_plan_by_cause(tiny_data: Path, tmp_path: Path) -> None:
    config = make_config(run_of(tiny_data, output_dir=str(tmp_path / "run"), r=8, target_modules="all-linear"))
    plan = plan_of(material(config), timed=False)
    assert tuple(plan.memory.by_cause) == tuple(CAUSES)
    (job,) = plan.jobs
    assert plan.memory.by_cause["adapters"] == 4 * job.trainable
    assert plan.memory.by_cause["optimizer"] == pytest.approx(8 * job.trainable, rel=0.01)
    assert plan.memory.by_cause["weights"] >= 4 * plan.parameters
    assert plan.fits
    assert plan.time is None
    assert plan.worst[1] >= plan.longest


@pytest.mark.parametrize("kind", ["nf4", "fp4", "int8"])
def test_a_quantised_base_is_planned_as_it_is_loaded(tiny_data: Path, tmp_path: Path, kind: str) -> None:
    pytest.importorskip("bitsandbytes")
    config = make_config(run_of(tiny_data, output_dir=str(tmp_path / "run"), quantization=kind, dtype="bfloat16"))
    plan = plan_of(material(config), timed=False)
    loaded = config.base().model
    there = sum(p.nbytes for p in loaded.parameters()) + sum(b.nbytes for b in loaded.buffers())
    assert plan.memory.by_cause["weights"] == pytest.approx(there, rel=0.01)


def test_a_base_that_is_quantised_already(
    tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pytest.importorskip("bitsandbytes")
    loaded = load_base("tiny-llama", quantization=Quantization("nf4", double=False), device="cpu", dtype="bfloat16")
    loaded.model.save_pretrained(tmp_path / "model")
    loaded.tokenizer.save_pretrained(tmp_path / "model")
    settings = {"model": str(tmp_path / "model"), "output_dir": str(tmp_path / "run")}
    config = make_config(run_of(tiny_data, **settings))
    plan, model = plan_of(material(config), timed=False), config.base().model
    there = sum(p.nbytes for p in model.parameters()) + sum(b.nbytes for b in model.buffers())
    assert plan.memory.by_cause["weights"] == pytest.approx(there, rel=0.01)
    monkeypatch.setattr("weft.planning.rehearsal.stored_quantization", lambda config: Quantization("gptq"))
    with pytest.raises(UserError, match="is kept by gptq, and there is no plan"):
        material(make_config(run_of(tiny_data, **settings)))


def test_weights_on_the_disk_are_in_memory_block_by_block(tiny_data: Path, tmp_path: Path) -> None:
    settings = run_of(tiny_data, output_dir=str(tmp_path / "run"), dtype="bfloat16")
    whole, streamed = (
        plan_of(material(make_config({**settings, **more})), timed=False).memory.by_cause["weights"]
        for more in ({}, {"offload_param": "disk"})
    )
    model = make_config(settings).sketch().model
    blocks = [sum(p.nbytes for p in block.parameters()) for block in model.model.layers]
    assert whole - streamed == sum(blocks) - max(blocks)


def test_an_operator_without_shapes_is_named() -> None:
    dry = DryRun(torch.device("cpu"))
    with dry, pytest.raises(UserError, match=r"no plan for this run: the operator aten\.nonzero"):
        torch.ones(3).nonzero()


def test_experts_in_any_dtype() -> None:
    """Their product gives shapes in bfloat16 alone."""
    dry = DryRun(torch.device("cpu"))
    with dry:
        ends = torch.tensor([1, 4], dtype=torch.int32)
        found = torch._grouped_mm(torch.ones(4, 16), torch.ones(2, 16, 8), offs=ends)
    assert found.shape == (4, 8)
    assert found.dtype == torch.float32


def test_the_time_of_a_step(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE_DIR", str(tmp_path / "cache"))
    config = make_config(run_of(tiny_data, output_dir=str(tmp_path / "run")))
    first = plan_of(material(config)).time
    assert first is not None
    assert 0 < first.step < 60
    assert first.run == 3 * first.step
    assert first.flops > 0
    assert len(measured.recall("calls")) > 20
    again = plan_of(material(config)).time
    assert again == first, "what was measured once is kept"


def test_what_is_kept_by_another_program_is_measured_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE_DIR", str(tmp_path))
    measured.keep("calls", {"a": 1.5})
    assert measured.recall("calls") == {"a": 1.5}
    assert measured.recall("library") == {}
    next((tmp_path / "machine").iterdir()).write_text('{"a": "b"}')
    assert measured.recall("calls") == {}
    monkeypatch.setenv("WEFT_CACHE_DIR", "")
    measured.keep("calls", {"a": 1.5})
    assert measured.recall("calls") == {}


def test_the_search(tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """With plans that are made up: passes take up to 100, checkpointed a fifth of it or, cheaply, six tenths.

    The base takes 50, or 25 in 4 bits, and a tenth of that on the disk.
    """
    made = material(make_config(run_of(tiny_data, output_dir=str(tmp_path / "run"), batch_size=16)))
    real = plan_of(made, timed=False)

    def planned(made: Any, settings: dict[str, Any], *, timed: bool = False) -> Plan:
        share = settings.get("pack_tokens", real.worst[1]) / real.worst[1]
        ways = {False: (1, 0), "cheap": (0.6, 0.15), True: (0.2, 0.3)}
        part, longer = ways[settings.get("gradient_checkpointing", False)]
        activations = round(100 * share * part)
        weights = 25 if settings.get("quantization") else 50
        step = 1 / share + longer + 0.1 * (weights == 25)
        weights //= 10 if settings.get("offload_param") else 1
        memory = MemoryPlan({"weights": weights, "activations": activations})
        return replace(real, memory=memory, time=StepTime(step, step, 0.0) if timed else None)

    monkeypatch.setattr("weft.planning.fit._plan", planned)
    whole = planned(made, {})

    def found(budget: int) -> dict[str, Any] | None:
        one = fit(made, budget, whole)
        return None if one is None else dict(one.settings)

    assert found(150) == {}
    assert found(149) in ({"pack_tokens": real.worst[1] - 1}, {"pack_tokens": int(real.worst[1] * 0.99)})
    assert found(75) == {"gradient_checkpointing": True}, "passes of a quarter take longer"
    assert found(46) == {"quantization": "nf4", "gradient_checkpointing": True}
    assert found(24) == {"gradient_checkpointing": True, "quantization": "nf4", "offload_param": "disk"}
    assert found(1) is None


@pytest.mark.slow
def test_the_fastest_that_fits(tiny_data: Path, tmp_path: Path) -> None:
    config = make_config(run_of(tiny_data, output_dir=str(tmp_path / "run"), batch_size=16, quantization="nf4"))
    pytest.importorskip("bitsandbytes")
    made = material(config)
    whole = plan_of(made.with_config(config), timed=False)

    def found(budget: int) -> tuple[dict[str, Any], Plan]:
        one = fit(made, budget, whole)
        assert one is not None
        assert one.plan.memory.total <= budget
        return dict(one.settings), one.plan

    assert found(whole.memory.total)[0] == {}
    settings, plan = found(whole.memory.total - 1)
    assert settings
    assert plan.memory.total < whole.memory.total
    assert fit(made, whole.memory.by_cause["library"], whole) is None


@pytest.mark.parametrize(
    ("text", "count"), [("8GB", 8 * 10**9), ("7.5 GiB", 15 << 29), ("24g", 24 * 10**9), ("1000", 1000)]
)
def test_sizes(text: str, count: int) -> None:
    assert size_of(text) == count


@pytest.mark.parametrize("text", ["", "GB", "8 XB", "-3GB", "8GB9"])
def test_what_is_no_size(text: str) -> None:
    with pytest.raises(UserError, match="write it as 8GB"):
        size_of(text)


def words(data: Path, folder: Path, *more: str) -> list[str]:
    return ["plan", "model=tiny-llama", f"data={data}", f"output_dir={folder / 'run'}", "method=lora", "steps=3",
            "device=cpu", "--no-time", *more]  # fmt: skip


def test_by_the_command_line(tiny_data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(words(tiny_data, tmp_path)) == 0
    told = capsys.readouterr().out
    assert "It fits." in told
    assert "activations" in told
    assert not (tmp_path / "run").exists()
    assert main(words(tiny_data, tmp_path, "--fit", "1MB", "--json")) == 3
    found = json.loads(capsys.readouterr().out)
    assert found["fits"] is False
    assert found["fit"] is None
    assert found["budget"] == 10**6
    assert main(words(tiny_data, tmp_path, "--fit", "much")) == 2


def test_the_growth_of_the_library_is_measured_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("WEFT_CACHE_DIR", str(tmp_path))
    asked: list[str] = []
    monkeypatch.setattr(library, "_measured", lambda kind: asked.append(kind) or 7.0)
    assert [library.growth(kind) for kind in (None, "nf4", None)] == [7, 7, 7]
    assert asked == ["None", "nf4"]


@pytest.mark.parametrize("optimizer", ["adamw_8bit", "paged_adamw_8bit"])
def test_an_optimizer_in_eight_bits_has_its_own_state(optimizer: str, tiny_data: Path, tmp_path: Path) -> None:
    pytest.importorskip("bitsandbytes")
    plans = {}
    for one in ("adamw", optimizer):
        config = make_config(run_of(tiny_data, output_dir=str(tmp_path / "run"), method="full", optimizer=one))
        plans[one] = plan_of(material(config), timed=False)
    state = {one: plan.memory.by_cause["optimizer"] for one, plan in plans.items()}
    assert 0.2 < state[optimizer] / state["adamw"] < 0.5
    assert plans[optimizer].disk < plans["adamw"].disk


def test_the_update_in_eight_bits_is_played(tiny_data: Path, tmp_path: Path) -> None:
    """For every tensor that has a state in 8 bits bitsandbytes makes both moments in fp32, and a root of one."""
    pytest.importorskip("bitsandbytes")
    roots = {}
    for one in ("sgd", "adamw_8bit"):
        config = make_config(run_of(tiny_data, output_dir=str(tmp_path / "run"), method="full", optimizer=one))

        def large(rehearsal: Rehearsal) -> tuple[int, int]:
            calls = rehearsal.calls_of(0)
            (job,) = rehearsal.jobs
            found = [c for c in calls if "sqrt" in str(c.operator) and "rsqrt" not in str(c.operator)]
            return len(found), sum(p.numel() >= SMALLEST for p in job.parameters)

        roots[one], tensors = rehearsed(material(config), large)
    assert roots["adamw_8bit"] - roots["sgd"] == tensors > 0


def test_rooms_wait_for_pieces_of_their_size() -> None:
    """Where a heap would put a smaller piece into the gap of a larger one."""
    heap, rooms = Heap(), HeapAndRooms()
    for played in (heap, rooms):
        first = played.take(8 << 20)
        played.give_back(first, 8 << 20)
        second = played.take(4 << 20)
        third = played.take((8 << 20) - 1000)
        played.give_back(second, 4 << 20)
        played.give_back(third, (8 << 20) - 1000)
        assert played.take(1000) is not None, "small pieces lie in the heap"
    assert heap.peak < 12.1 * 2**20
    assert 12 * 2**20 <= rooms.peak < 12.1 * 2**20
    assert rooms.take(5 << 20) is None
    assert rooms.peak > 17 * 2**20 > heap.peak
