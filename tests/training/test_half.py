"""Sixteen bits: overflowing passes, small numbers, and what a device lacks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from torch import nn

from weft.api import Adapters
from weft.base.kinds import is_norm
from weft.data import Sample
from weft.errors import UserError
from weft.files.run_folder import RunStore
from weft.models import describe, load
from weft.ops.attention import varlen_attention
from weft.ops.fused import rms_norm, rms_norm_ref
from weft.ops.sequence_layout import SequenceLayout
from weft.training import Job, JobConfig, Trainer, job

LOUD = 7  # a token whose embedding overflows


def texts(loud: int, count: int = 12) -> list[Sample]:
    """Samples of which ``loud`` have the token."""
    found = []
    for number, sample in enumerate(kit.samples(count, 6, 12)):
        ids = [9 if i == LOUD else i for i in sample.input_ids]
        found.append(Sample([LOUD, *ids[1:]] if number < loud else ids, sample.weights, sample.source))
    return found


def trainer(model: Any, samples: list[Sample], steps: int = 12, **options: Any) -> Trainer:
    adapters = Adapters(model, describe(model))
    config = JobConfig(name="one", method="lora", steps=steps, batch_size=1, learning_rate=1e-3)
    jobs = [Job(config, adapters.add("one", config.method_config()), samples)]
    with torch.no_grad():  # after the proof of the base, which would refuse it
        if any(LOUD in sample.input_ids for sample in samples):
            model.get_input_embeddings().weight[LOUD] = float("inf")
    return Trainer(adapters, jobs, verify_packing=False, **options)


def test_forwards_that_overflow_are_skipped_and_the_run_goes_on_bitwise(tmp_path: Path) -> None:
    """Fourteen of twenty-four steps: more than the scale can be halved."""
    unbroken = trainer(kit.make_model("llama", torch.float16), texts(7), 24)
    unbroken.jobs[0].progress.loss_scale = 2.0**5
    result = unbroken.run().jobs["one"]
    unbroken.adapters.close()
    assert (result["ended"], result["skipped"], result["moved"]) == ("finished", 14, 10)
    assert result["loss_scale"] == 1.0
    stops = iter([False] * 9 + [True] * 9)
    store = RunStore(tmp_path / "run")
    store.prepare(overwrite=False, resume=False)
    stopped = trainer(
        kit.make_model("llama", torch.float16), texts(7), 24, store=store, should_stop=lambda: next(stops)
    )
    stopped.jobs[0].progress.loss_scale = 2.0**5
    assert not stopped.run().completed
    assert 0 < stopped.jobs[0].progress.skipped < 9
    resumed = trainer(kit.make_model("llama", torch.float16), texts(7), 24, store=store)
    assert resumed.resume()
    again = resumed.run().jobs["one"]
    store.release()
    seconds = {"seconds": 0.0}
    assert again | seconds == result | seconds
    found, wanted = (kit.parameters(one.jobs[0].adapter).values() for one in (resumed, unbroken))
    assert all(torch.equal(a, b) for a, b in zip(found, wanted, strict=True))


def test_a_run_that_only_overflows_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(job, "_GIVE_UP", 14)
    result = trainer(kit.make_model("llama", torch.float16), texts(12), 30).run().jobs["one"]
    assert (result["ended"], result["step"]) == ("failed", 14)
    assert "overflowed in the last 14 steps; take dtype bfloat16" in result["reason"]


def test_the_scale_grows_again_from_one() -> None:
    one = trainer(kit.make_model("llama", torch.float16), texts(0))
    progress = one.jobs[0].progress
    progress.loss_scale, progress.good_steps = 1.0, 199
    one._step(one.jobs)
    assert progress.loss_scale == 2.0
    assert trainer(kit.make_model("llama"), texts(0)).jobs[0].progress.loss_scale == 1.0


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["llama", "gpt2", "bloom", "gemma", "opt", "falcon"])
def test_norms_compute_in_float32(kind: str, dtype: torch.dtype) -> None:
    """Squares of 300 are more than float16 has, and the variance of a constant row is an epsilon that it has not."""
    model = kit.make_model(kind, dtype)
    norms = [m for m in model.modules() if is_norm(m)]
    with Adapters(model, describe(model)):
        for norm in norms[:2]:
            width = norm.weight.shape[-1]
            x = torch.randn(1, 5, width, generator=torch.Generator().manual_seed(0)).to(dtype) * 300
            x[0, 0] = 0.0
            x.requires_grad_()
            y = norm(x)
            y.float().square().sum().backward()
            assert bool(torch.isfinite(y).all())
            assert x.grad is not None
            assert bool(torch.isfinite(x.grad[0, 1:]).all())
            exact = _wide(norm, x.detach().float())
            near = 4 * torch.finfo(dtype).eps * float(exact.abs().max())
            kit.measured(kind, float((y.float() - exact).abs().max()), near, derived=True)


def _wide(norm: nn.Module, x: torch.Tensor) -> torch.Tensor:
    import copy

    return copy.deepcopy(norm).float()(x)


def test_an_epsilon_below_sixteen_bits() -> None:
    for dtype in (torch.float16, torch.bfloat16):
        x = torch.zeros(2, 8, dtype=dtype)
        weight = torch.ones(8, dtype=dtype)
        for norm in (rms_norm, rms_norm_ref):
            own = x.clone().requires_grad_()
            y = norm(own, weight, 1e-8)
            y.sum().backward()
            assert bool(torch.isfinite(y).all())
            assert own.grad is not None
            assert bool(torch.isfinite(own.grad).all())  # 1 / sqrt(1e-8) is 1e4


def test_softmax_of_large_scores_in_float16() -> None:
    """Scores of thousands, and more keys than float16 can count by ones."""
    length = 3000
    layout = SequenceLayout.build([length], device=torch.device("cpu"))
    q = torch.full((1, length, 4), 30.0, dtype=torch.float16)
    v = torch.ones(1, length, 4, dtype=torch.float16)
    out = varlen_attention(q, q, v, layout, scale=0.5)
    assert float((out.float() - 1).abs().max()) <= 2e-3


def test_adams_epsilon_beside_a_half_precision_base() -> None:
    """In float16 1e-8 is zero, and a gradient of zero would make a step of 0 / 0."""
    one = trainer(kit.make_model("llama", torch.float16), texts(0), 2)
    result = one.run().jobs["one"]
    assert result["ended"] == "finished"
    assert all(bool(torch.isfinite(p).all()) for p in one.jobs[0].parameters)
    optimizer = one.jobs[0].optimizer
    assert optimizer is not None
    assert {s["exp_avg_sq"].dtype for s in optimizer.state.values()} == {torch.float32}


def test_a_gpu_without_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    class NoContext:
        def __init__(self, device: object) -> None: ...
        def __enter__(self) -> None: ...
        def __exit__(self, *error: object) -> None: ...

    monkeypatch.setattr(torch.cuda, "device", NoContext)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda: "Tesla T4")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: including_emulation)
    cuda = torch.device("cuda")
    with pytest.raises(UserError, match=r"Tesla T4 does not compute in bfloat16\. Take dtype: float16"):
        load.check_number_format(torch.bfloat16, cuda)
    load.check_number_format(torch.float16, cuda)
    load.check_number_format(torch.bfloat16, torch.device("cpu"))
