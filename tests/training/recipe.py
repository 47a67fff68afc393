"""A small run with everything that a resume could forget: dropout, accumulation, an encoder that no adapter file holds,
early stopping, evaluation, jobs of different lengths. Also what its processes do when they are to be killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from tests import kit

from weft.api import Adapters
from weft.files.run_folder import RunStore
from weft.layouts.packed import Packed
from weft.models import describe
from weft.training import Job, JobConfig, Trainer

SETTINGS: list[dict[str, Any]] = [
    {"name": "lora", "method": "lora", "method_settings": {"r": 2, "lora_dropout": 0.2}, "steps": 14, "batch_size": 2,
     "eval_steps": 2, "early_stopping_patience": 2, "learning_rate": 0.03},
    {"name": "prefix", "method": "prefix_tuning", "steps": 11, "batch_size": 1, "gradient_accumulation_steps": 2,
     "method_settings": {"num_virtual_tokens": 2, "prefix_projection": True}, "eval_steps": 5},
    {"name": "bottleneck", "method": "bottleneck", "method_settings": {"dropout": 0.3}, "steps": 9, "batch_tokens": 30,
     "optimizer": "sgd", "lr_scheduler_type": "linear"},
]  # fmt: skip
# Fields of metrics.jsonl that no two runs share.
TIMING = {"time", "tokens_per_second", "eta_seconds", "memory_gb"}


def make_trainer(folder: Path | None, **options: Any) -> Trainer:
    """The run, not begun; in ``folder``, or in memory only."""
    model = kit.make_model("qwen2")
    adapters = Adapters(model, describe(model))
    jobs = []
    for seed, settings in enumerate(SETTINGS):
        config = JobConfig(seed=seed, **settings)
        adapter = adapters.add(config.name, config.method_config(), seed=seed)
        jobs.append(Job(config, adapter, kit.samples(7, seed=seed), kit.samples(3, seed=55 + seed)))
    store = None
    if folder is not None:
        store = RunStore(folder)
        store.prepare(overwrite=False, resume=True)
    given = {"logging_steps": 2, "save_steps": 2, "save_total_limit": 2, **options}
    return Trainer(adapters, jobs, store=store, **given)


def go_on(folder: Path, **options: Any) -> bool:
    """Resume (or begin) and run; writes the adapters if the run came to its end."""
    trainer = make_trainer(folder, **options)
    assert trainer.store is not None
    try:
        trainer.resume()
        result = trainer.run()
        if result.completed:
            for job in trainer.jobs:
                trainer.adapters.save(job.name, trainer.store.adapters / job.name)
    finally:
        trainer.store.release()
    return result.completed


def outcome(folder: Path) -> dict[str, Any]:
    """All that must be the same however often the run was broken: metrics, adapters, optimizers, progress."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    metrics = [{k: v for k, v in line.items() if k not in TIMING} for line in lines]
    found = RunStore(folder).latest()
    assert found is not None
    state, tensors, _ = found
    jobs = {
        name: {k: v for k, v in entry["progress"].items() if k != "seconds"} for name, entry in state["jobs"].items()
    }
    hashes = {name: {key: kit.sha256([t]) for key, t in sorted(group.items())} for name, group in tensors.items()}
    adapters = {path.parent.name: path.read_bytes() for path in sorted(folder.glob("adapters/*/*.safetensors"))}
    assert len(adapters) == len(SETTINGS)
    return {"metrics": metrics, "jobs": jobs, "tensors": hashes, "adapters": adapters, "step": state["step"]}


# What a save does to the disk, each a moment in which a machine can die.
_DISK = ("replace", "fsync", "unlink", "rmdir", "mkdir")


def at_the_disk(action: Callable[[int], None]) -> Callable[[], None]:
    """Call ``action(k)`` before the k-th call (from 1) that changes the disk; returns what undoes that."""
    import weft.files.run_folder as store

    count = 0
    before = {name: getattr(os, name) for name in _DISK}
    save_file = store.write_tensors

    def wrapped(plain: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            nonlocal count
            count += 1
            action(count)
            return plain(*args, **kwargs)

        return call

    def half_written(tensors: Any, path: Path, *args: Any, **kwargs: Any) -> None:
        nonlocal count
        save_file(tensors, path, *args, **kwargs)
        whole = Path(path).read_bytes()
        Path(path).write_bytes(whole[: len(whole) // 2])
        count += 1
        action(count)
        Path(path).write_bytes(whole)

    for name, plain in before.items():
        setattr(os, name, wrapped(plain))
    store.write_tensors = half_written
    # rmtree decided at import that unlink can take a directory's descriptor; a wrapper is not in that list.
    shutil._use_fd_functions = False  # type: ignore[attr-defined]

    def undo() -> None:
        for name, plain in before.items():
            setattr(os, name, plain)
        store.write_tensors = save_file
        shutil._use_fd_functions = True  # type: ignore[attr-defined]

    return undo


def child(folder: str, where: str, at: int) -> None:
    """A process that is killed at the ``at``-th forward pass or change of the disk (0: never), with no cleanup."""
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))  # sums come in the order of the run that was not killed

    def kill(count: int) -> None:
        if count == at:
            os.kill(os.getpid(), signal.SIGKILL)

    if at and where == "disk":
        at_the_disk(kill)
    elif at:
        plain, count = Packed.forward, 0

        def forward(self: Packed, stream: Any) -> torch.Tensor:
            nonlocal count
            count += 1
            hidden = plain(self, stream)
            kill(count)
            return hidden

        Packed.forward = forward  # type: ignore[method-assign]
    go_on(Path(folder))
