"""A base whose weights stay on the disk: no number changes, little is in memory, and damaged files are named."""

from __future__ import annotations

import mmap
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import kit
from tests.contracts.test_together_equals_alone import LENGTHS, job_config
from torch import Tensor

import weft
import weft.training.loop
from weft.api import Adapters
from weft.base.mapped import Span, can_map, joined, spans_of
from weft.base.streaming import streaming_of
from weft.core.stream import Part
from weft.errors import UserError
from weft.layouts.by_blocks import goes_by_blocks, proved
from weft.models import Base, load_base
from weft.models.offload import check_offload
from weft.models.quantize import Quantization
from weft.training import Job, Trainer

pytestmark = pytest.mark.skipif(not can_map(), reason="Linux alone says which memory is a file's")
OPTIONS: dict[str, Any] = {"device": "cpu", "tokenizer": object()}


def written(folder: Path, kind: str, dtype: torch.dtype, **more: Any) -> str:
    """The folder of a tiny model."""
    model = kit.make_model(kind, dtype, **more)
    model.config.dtype = dtype
    model.save_pretrained(folder)
    return str(folder)


def train(base: Base, *, offload: bool, **options: Any) -> dict[str, list[Tensor]]:
    """All that three steps of a job of every method leave, over the base."""
    adapters = Adapters(base.model, base.architecture, offload_param="disk" if offload else None, **options)
    jobs = []
    for method in kit.ALL:
        config = job_config(method, 6).model_copy(update={"steps": 3})
        data = kit.samples(12, *LENGTHS.get(method, (3, 25)), seed=config.seed)
        jobs.append(Job(config, adapters.add(method, config.method_config(), seed=config.seed), data, data[:2]))
    assert (streaming_of(base.model) is not None) == offload
    Trainer(adapters, jobs).run()
    adapters.close()
    assert streaming_of(base.model) is None
    return {job.name: list(job.tensors().values()) for job in jobs}


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), pytest.param("gpt2", {"exact": True}, marks=pytest.mark.slow),
     pytest.param("falcon", {}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_every_method_ends_with_the_same_bits(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    """Weights and optimizer states, in float64."""
    folder = written(tmp_path, kind, torch.float64)
    plain = train(load_base(folder, **OPTIONS), offload=False, **options)
    found = train(load_base(folder, offload_param="disk", **OPTIONS), offload=True, **options)
    for method, tensors in plain.items():
        assert all(torch.equal(a, b) for a, b in zip(tensors, found[method], strict=True)), method


@pytest.mark.parametrize(
    ("kind", "options"),
    [("llama", {}), ("gpt2", {"padded": True}), pytest.param("bloom", {}, marks=pytest.mark.slow),
     pytest.param("falcon", {}, marks=pytest.mark.slow)],
)  # fmt: skip
def test_all_passes_of_a_step_go_through_a_block_together(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, options: dict[str, Any]
) -> None:
    """Every method accumulates one to three micro-batches; each block is entered once forward and once back a step."""
    folder = written(tmp_path, kind, torch.float64)
    plain = train(load_base(folder, **OPTIONS), offload=False, **options)
    base = load_base(folder, offload_param="disk", **OPTIONS)
    steps: list[list[int]] = []
    own_step = weft.training.loop.train_step

    def step(adapters: Adapters, jobs: Any, splitting: Any) -> Any:
        assert goes_by_blocks(adapters)
        enters: list[int] = []
        streaming = streaming_of(adapters.model)
        assert streaming is not None
        with monkeypatch.context() as inside:
            plain_enter = streaming.enter

            def enter(index: int, after: int) -> None:
                if streaming._now != (index, after):
                    enters.append(index)
                plain_enter(index, after)

            inside.setattr(streaming, "enter", enter)
            found = own_step(adapters, jobs, splitting)
        steps.append(enters)
        return found

    monkeypatch.setattr(weft.training.loop, "train_step", step)
    found = train(base, offload=True, checkpointing=True, **options)
    for method, tensors in plain.items():
        kit.measured(f"{kind} {method} by blocks - plain", kit.difference(tensors, found[method]), 1e-12)
    there = list(range(len(base.architecture.blocks)))
    order = [*there, *there[-2::-1]]  # from the last block the gradient goes back at once
    assert steps == [order, order[1:], order[1:]], "the first block is still there when the next step begins"


def test_blocks_that_are_no_chain_are_run_pass_by_pass(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Something between two blocks would be left out."""
    base = load_base(written(tmp_path, "llama", torch.float32), offload_param="disk", **OPTIONS)
    adapters = Adapters(base.model, base.architecture, offload_param="disk", checkpointing=True)
    kit.hidden_of(adapters, [Part(None, kit.texts(1))])
    assert proved(adapters)
    base.model.get_submodule(base.architecture.blocks[1]).register_forward_hook(lambda module, given, out: 1.5 * out)
    assert not goes_by_blocks(adapters)
    assert "are no chain" in caplog.text
    adapters.close()
    plain = Adapters(base.model, base.architecture, offload_param="disk")
    assert not goes_by_blocks(plain), "without checkpointing all activations of all passes would be in memory"


def in_memory(spans: list[Span]) -> int:
    """The bytes of the spans that are in this process' memory."""
    with open("/proc/self/pagemap", "rb") as file:
        found = 0
        for span in spans:
            file.seek(span.begin // mmap.PAGESIZE * 8)
            pages = file.read(-(-span.size // mmap.PAGESIZE) * 8)
            found += mmap.PAGESIZE * sum(entry >> 63 for (entry,) in struct.iter_unpack("<Q", pages))
    return found


@pytest.mark.parametrize("quantization", [None, "nf4"])
def test_one_block_is_in_memory_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, quantization: Any) -> None:
    """Six blocks, each larger than what the system brings in by itself, watched when a pass enters one."""
    monkeypatch.setenv("WEFT_CACHE_DIR", str(tmp_path / "cache"))
    sizes = {"hidden_size": 256, "intermediate_size": 1024, "num_hidden_layers": 6}
    config = kit.model_config("llama")
    for key, value in sizes.items():
        setattr(config, key, value)
    config.head_dim = 64
    torch.manual_seed(0)
    model = type(kit.make_model("llama"))(config).bfloat16()
    config.dtype = torch.bfloat16
    model.save_pretrained(tmp_path / "model")
    base = load_base(str(tmp_path / "model"), offload_param="disk", quantization=quantization, **OPTIONS)
    blocks = [base.model.get_submodule(path) for path in base.architecture.blocks]
    spans = joined(spans_of([p.data for block in blocks for p in block.parameters() if p.dim() > 1]))
    whole = sum(span.size for span in spans)
    assert in_memory(spans) < 0.1 * whole, "the load gives back what it read"
    adapters = Adapters(base.model, base.architecture, offload_param="disk")
    kit.randomize(adapters.add("a", kit.method_config("lora")))
    streaming = streaming_of(base.model)
    assert streaming is not None
    seen, entered = [], []
    plain = streaming.enter

    def enter(index: int, after: int) -> None:
        plain(index, after)
        entered.append(index)
        seen.append(in_memory(spans) / whole)

    monkeypatch.setattr(streaming, "enter", enter)
    stream = adapters.stream([Part("a", kit.texts(2))])
    adapters.logits(adapters.forward(stream), stream).float().square().mean().backward()
    assert entered == [0, 1, 2, 3, 4, 5, 5, 4, 3, 2, 1, 0]
    # The system brings in what lies beside the pages that are touched, too.
    assert max(seen) < 0.45, seen
    adapters.close()
    assert in_memory(spans) == 0


def test_quantised_weights_are_made_once_and_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE_DIR", str(tmp_path / "cache"))
    folder = written(tmp_path / "model", "gpt2", torch.float32, n_embd=64)
    for quantization in ("nf4", "fp4"):
        options: dict[str, Any] = {"quantization": quantization, "dtype": "float32", **OPTIONS}
        plain = load_base(folder, **options).model.state_dict()
        found = load_base(folder, offload_param="disk", **options).model.state_dict()
        assert all(torch.equal(plain[key], found[key]) for key in plain | found)
        files = {path: path.stat().st_mtime_ns for path in (tmp_path / "cache").rglob("*.safetensors")}
        assert files
        load_base(folder, offload_param="disk", **options)
        assert {path: path.stat().st_mtime_ns for path in files} == files
    next(path for path in files if "fp4" in str(path)).unlink()
    with pytest.raises(UserError, match=r"is gone\. Delete .*; it is then written again"):
        load_base(folder, offload_param="disk", **options)
    monkeypatch.setenv("WEFT_CACHE_DIR", "")
    with pytest.raises(UserError, match="WEFT_CACHE_DIR is empty"):
        load_base(folder, offload_param="disk", **options)


def test_what_does_not_work_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"the device is 'cuda:0'\. Set device: cpu"):
        check_offload("cuda:0", None)
    with pytest.raises(UserError, match="int8 is not written in the form"):
        check_offload("cpu", Quantization("int8"))
    folder = written(tmp_path, "llama", torch.float32)
    with pytest.raises(UserError, match=r"model\.layers\.0\..* \(bfloat16\) the first: .* Set dtype: float32"):
        load_base(folder, offload_param="disk", dtype="bfloat16", **OPTIONS)


def test_damaged_weights_are_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WEFT_CACHE_DIR", str(tmp_path / "cache"))
    folder = Path(written(tmp_path / "model", "llama", torch.float32))
    file = folder / "model.safetensors"
    whole = tmp_path / "whole"
    shutil.copy(file, whole)
    tensors = load_file(whole)
    name = "model.layers.2.mlp.down_proj.weight"
    tensors[name][3, 5] = float("nan")
    save_file(tensors, file, metadata={"format": "pt"})
    for more in ({}, {"quantization": "nf4"}):
        with pytest.raises(UserError, match=rf"{file}: tensor '{name}' holds NaN or infinity"):
            load_base(str(folder), offload_param="disk", **more, **OPTIONS)
    file.write_bytes(whole.read_bytes()[:-1])
    for more in ({}, {"offload_param": "disk"}):
        with pytest.raises(UserError, match=rf"{file} is not whole: tensor '[\w.]+' .*1 tensor is cut off"):
            load_base(str(folder), **more, **OPTIONS)


def test_a_run_from_its_configuration_to_its_adapter(tmp_path: Path) -> None:
    data = tmp_path / "data.jsonl"
    data.write_text("".join(f'{{"instruction": "say {word}", "output": "{word}"}}\n' for word in "abcdef"))
    found = []
    for name, more in (("plain", {}), ("disk", {"offload_param": "disk"})):
        weft.train(
            {
                "model": "tiny-llama",
                "data": str(data),
                "method": "lora",
                "r": 2,
                "steps": 2,
                "device": "cpu",
                "dtype": "bfloat16",
                **more,
            },
            output_dir=str(tmp_path / name),
        )
        found.append((tmp_path / name / "adapters" / "lora" / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1]
