"""A run that writes down which samples it sees, instead of learning from them; its processes can be killed."""

from __future__ import annotations

import hashlib
import json
import os
import signal
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests import kit
from tests.kit.tokenizers import byte_tokenizer

import weft.training.loop
from weft.api import Adapters
from weft.data import Renderer
from weft.files.run_folder import RunStore
from weft.models import describe
from weft.training import Job, JobConfig, RunConfig, Trainer
from weft.training.reader import Reader, data_files
from weft.training.step import StepResult

ROWS = {"mine.jsonl": 700, "general.jsonl": 650}
EPOCHS = 4


def write_data(folder: Path) -> None:
    """Two files; every seventh row of them cannot be used."""
    for name, count in ROWS.items():
        rows = [{"instruction": f"{name} {i}", "output": "" if i % 7 == 3 else f"answer {i}"} for i in range(count)]
        (folder / name).write_text("".join(json.dumps(row) + "\n" for row in rows))


def go_on(folder: Path, workers: int, kill_at: int = 0) -> bool:
    """Resume (or begin) and go through all epochs; the process is killed at its ``kill_at``-th step."""
    job = JobConfig(name="one", method="lora", method_settings={"r": 1}, epochs=EPOCHS, batch_size=20, seed=3)
    data = f"0.6*{folder / 'mine.jsonl'} + 0.4*{folder / 'general.jsonl'}"
    config = RunConfig(
        model="none", data=data, jobs=(job,), on_bad_record="report", eval_split=0.05, data_workers=workers
    )
    model = kit.make_model("qwen2")
    adapters = Adapters(model, describe(model))
    found = Reader(config, Renderer(byte_tokenizer()), adapters.architecture, data_files(config)).job(job)
    made = Job(job, adapters.add("one", job.method_config()), found.train, (), found.mixture)
    store = RunStore(folder / "run")
    store.prepare(overwrite=False, resume=True)
    ledger, steps = (folder / "ledger.jsonl").open("a"), 0

    def step(_: Any, active: Sequence[Job], splitting: Any) -> dict[str, StepResult]:
        nonlocal steps
        steps += 1
        for job in active:
            seen = [
                [sample.source, hashlib.sha256(repr((sample.input_ids, sample.weights)).encode()).hexdigest()]
                for batch in job.micro_batches()
                for sample in batch
            ]
            ledger.write(json.dumps({"step": job.progress.step, "seen": seen}) + "\n")
            ledger.flush()
            if steps == kill_at:
                os.kill(os.getpid(), signal.SIGKILL)
            job.progress.step += 1
            job.progress.ended = "finished" if job.progress.step >= job.total_steps else None
        return {job.name: StepResult(0.0, grad_norm=0.0, learning_rate=0.0, tokens=0) for job in active}

    plain, weft.training.loop.train_step = weft.training.loop.train_step, step  # type: ignore[assignment]
    trainer = Trainer(adapters, [made], store=store, save_steps=7, verify_packing=False)  # the ids are not the model's
    try:
        trainer.resume()
        return trainer.run().completed
    finally:
        weft.training.loop.train_step = plain
        store.release()
        ledger.close()


def child(folder: str, workers: int, kill_at: int) -> None:
    go_on(Path(folder), workers, kill_at)


def epochs(folder: Path) -> list[list[tuple[str, str]]]:
    """What each epoch saw, in order. A step that a killed process had done is done again, and must see the same."""
    steps: dict[int, Any] = {}
    for line in (folder / "ledger.jsonl").read_text().splitlines():
        entry = json.loads(line)
        assert steps.setdefault(entry["step"], entry["seen"]) == entry["seen"], (
            f"step {entry['step']} saw other samples"
        )
    assert sorted(steps) == list(range(len(steps)))
    per_epoch = len(steps) // EPOCHS
    seen = [[(Path(s).name, h) for s, h in steps[i]] for i in range(len(steps))]
    return [[sample for step in seen[e * per_epoch : (e + 1) * per_epoch] for sample in step] for e in range(EPOCHS)]
