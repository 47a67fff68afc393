"""``weft watch``: what it says of a run that trains, has ended, was stopped, or crashed."""

from __future__ import annotations

import json
import shutil
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.cli.conftest import Run

from weft.cli.curves import plot
from weft.cli.watch import View
from weft.files.metrics import Metrics
from weft.files.run_folder import RunStore

Cli = Callable[..., Run]


@pytest.fixture
def run(run_dir: Path, tmp_path: Path) -> Path:
    """A finished run of two jobs, to change."""
    return Path(shutil.copytree(run_dir, tmp_path / "two"))


def step(job: str, number: int, loss: float) -> str:
    row: dict[str, Any] = {"event": "step", "job": job, "step": number, "total_steps": 9, "epoch": 1.0, "loss": loss}
    row |= {"grad_norm": 1.0, "learning_rate": 1e-3, "tokens": 9, "tokens_per_second": 1234.5, "eta_seconds": 75.0}
    return json.dumps(row | {"memory_gb": 0.5}) + "\n"


def test_one_picture_of_a_finished_run(weft: Cli, run: Path) -> None:
    found = weft("watch", run, "--once")
    assert found.code == 0
    lines = found.out.splitlines()
    assert lines[0] == f"{run}: finished"
    for job in ("lora", "prefix_tuning"):
        assert any(line.startswith(f"{job}  step 4 of 4  finished") and "tokens/s" in line for line in lines)
    last = json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])
    assert f"eval {last['eval_loss']:.4f}" in found.out
    assert "rate" in found.out


@pytest.mark.parametrize("width", [20, 60, 99, 100, 160])
@pytest.mark.parametrize("height", [None, 10, 24, 60])
def test_the_picture_keeps_to_its_width_and_height(width: int, height: int | None, run: Path) -> None:
    view = View(run)
    view.look()
    lines = list(view.lines(width, height))
    assert max(map(len, lines)) <= max(width, len(f"{run}: finished"[:width]))
    if height is not None and height >= 24:
        assert len(lines) <= height


def test_a_run_that_trains_says_what_is_left(weft: Cli, run: Path) -> None:
    store = RunStore(run)
    store.prepare(overwrite=False, resume=True)
    try:
        with open(run / "metrics.jsonl", "a") as file:
            file.write(step("lora", 5, 0.25) + step("lora", 6, 0.125)[:9])
        found = weft("watch", run, "--once")
        assert ": training" in found.out
        assert "lora  step 5 of 9  1:15 left  1,234 tokens/s" in found.out
        told = json.loads(weft("watch", run, "--json").out)
        assert (told["state"], told["jobs"]["lora"]["loss"]) == ("trains", 0.25)
    finally:
        store.release()


def test_one_that_crashed_says_so_and_how_it_goes_on(weft: Cli, run: Path) -> None:
    with open(run / "metrics.jsonl", "a") as file:
        file.write(step("lora", 5, 0.25))
    found = weft("watch", run, "--once")
    assert found.code == 3
    assert "crashed: no process trains it" in found.out
    assert f"weft train {run} --resume" in found.out
    shutil.rmtree(run / "checkpoints")
    assert "crashed" in weft("watch", run, "--once").out


def test_one_that_was_stopped_is_not_called_crashed(weft: Cli, run: Path) -> None:
    path = next((run / "checkpoints").glob("step-*")) / "state.json"
    state = json.loads(path.read_text())
    assert state["last"] is True
    state["jobs"]["lora"]["progress"]["ended"] = None
    path.write_text(json.dumps(state))
    found = weft("watch", run, "--once")
    assert (found.code, "stopped; what it has done is saved" in found.out) == (0, True)
    path.write_text(json.dumps({**state, "last": False}))
    assert "crashed" in weft("watch", run, "--once").out


def test_without_a_terminal_events_are_lines_until_the_run_ends(weft: Cli, run: Path) -> None:
    store = RunStore(run)
    store.prepare(overwrite=False, resume=True)

    def end() -> None:
        time.sleep(0.5)
        with open(run / "metrics.jsonl", "a") as file:
            file.write(step("lora", 5, 0.25))
        time.sleep(0.5)
        store.release()

    thread = threading.Thread(target=end)
    thread.start()
    found = weft("watch", run, "--every", 0.1)
    thread.join()
    lines = found.out.splitlines()
    assert lines[0].endswith(": training")
    assert sum(line.startswith("step job=lora step=5/9") for line in lines) == 1
    assert "crashed" in lines[-1]  # the row is beyond the last checkpoint


def test_a_folder_without_a_run_is_refused(weft: Cli, tmp_path: Path) -> None:
    for folder in (tmp_path, tmp_path / "none"):
        found = weft("watch", folder, "--once")
        assert (found.code, "is no run's folder" in found.err) == (2, True)


# --------------------------------------------------------------------------------------------------------------- curves


def test_a_curve_falls_as_its_values_do() -> None:
    assert plot([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0], 4) == ["█▆▃▁"]
    assert plot([0, 10], [0.0, 1.0], 5) == ["▁▃▅▆█"]  # a line between two values
    high, low = plot([0, 1, 2, 3], [4.0, 3.0, 2.0, 1.0], 4, 2)
    assert (high, low) == ("█▃  ", "██▆▁")


def test_curves_of_odd_values() -> None:
    nan = float("nan")
    assert plot([], [], 3, 2) == ["   ", "   "]
    assert plot([1], [nan], 3) == ["   "]
    assert plot([1], [2.0], 3) == ["▅▅▅"]
    assert plot([0, 1, 2], [1.0, nan, 3.0], 3)[0][0] == "▁"
    assert plot([0, 1, 2], [5.0, 5.0, 5.0], 3)[0] == plot([0], [5.0], 3)[0]
    assert Metrics().curve("loss") == ([], [])
