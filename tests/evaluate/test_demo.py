"""The demonstration: what it trains, and its picture. It runs whole in ``make demo``."""

from __future__ import annotations

from pathlib import Path

from weft.evaluate.demo import JOBS, demo_config, draw_losses


def test_five_methods_on_the_embedded_questions() -> None:
    config = demo_config("tiny-llama", "out", steps=7)
    assert [job.name for job in config.jobs] == [job["method"] for job in JOBS]
    assert {job.steps for job in config.jobs} == {7}
    assert [job.learning_rate for job in config.jobs] == [job["learning_rate"] for job in JOBS]
    assert config.jobs[1].method_settings["add_missing"] is True


def test_the_picture_takes_every_jobs_losses(tmp_path: Path) -> None:
    events = [{"event": "step", "job": name, "step": step, "loss": 2.0 / step} for name in "ab" for step in (1, 2)]
    events.append({"event": "eval", "job": "a", "step": 2, "eval_loss": 0.5})
    path = draw_losses(events, tmp_path / "loss.png", "tiny")
    assert path.read_bytes().startswith(b"\x89PNG")
