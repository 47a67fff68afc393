"""A run whose policies write their own answers ends bit for bit as the unbroken one, wherever it was killed."""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from tests import kit

from weft.files.run_folder import RunStore
from weft.files.tensors import read_tensors
from weft.generation import rollouts as engine
from weft.layouts.packed import Packed
from weft.rewards.registry import REWARDS, register_reward
from weft.training import loop
from weft.training.config import make_config
from weft.training.run import train

ROWS = [{"instruction": f"How much is {a} + {b}?", "output": str(a + b)} for a in range(1, 5) for b in range(1, 4)]
# In the rollouts, between rollout and update, in the update or an evaluation, and while a checkpoint is written.
PLACES: dict[str, tuple[Any, str]] = {
    "writing": (engine, "generate"),
    "between": (loop, "train_step"),
    "forward": (Packed, "forward"),
    "saving": (RunStore, "save"),
}
POINTS = [
    ("ppo", "writing", 1), ("grpo", "between", 2), ("ppo", "forward", 5), ("grpo", "saving", 2),
    *(pytest.param(*point, marks=pytest.mark.slow) for point in (
        ("grpo", "writing", 2), ("grpo", "writing", 3), ("ppo", "writing", 2), ("grpo", "between", 1),
        ("grpo", "between", 4), ("ppo", "between", 1), ("ppo", "between", 3), ("ppo", "between", 5),
        ("grpo", "forward", 1), ("grpo", "forward", 6), ("grpo", "forward", 11), ("ppo", "forward", 2),
        ("ppo", "forward", 9), ("ppo", "forward", 14), ("ppo", "saving", 1), ("ppo", "saving", 4),
    )),
]  # fmt: skip


def near_two(prompts: Sequence[str], completions: Sequence[str], *, completion_ids: Any, **_: Any) -> list[float]:
    """Something about every answer, so that groups differ."""
    return [-abs(len(ids) - 2) + (ids[0] % 7) / 10 for ids in completion_ids]


def go_on(folder: str, objective: str) -> None:
    """Begin the run in ``folder``, or go on with it."""
    if "near_two" not in REWARDS:
        register_reward("near_two")(near_two)
    data = Path(folder) / "sums.jsonl"
    if not data.exists():
        data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"rewards": ["near_two"], "num_generations": 2, "max_completion_length": 3, "num_iterations": 2}
    train(make_config({
        "model": "tiny-llama", "data": str(data), "output_dir": f"{folder}/run", "method": "lora", "threads": 1,
        "objective": objective, "objective_settings": settings, "steps": 5, "batch_size": 2, "logging_steps": 1,
        "save_steps": 1, "eval_size": 2, "eval_steps": 2, "learning_rate": 1e-3, "resume": True,
    }), writer=engine.writer)  # fmt: skip


def child(folder: str, objective: str, place: str, at: int) -> None:
    """The same in a process of its own, which is killed at the ``at``-th call of a place."""
    owner, name = PLACES[place]
    own: Callable[..., Any] = getattr(owner, name)
    calls = [0]

    def counted(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        if calls[0] == at:
            os.kill(os.getpid(), signal.SIGKILL)
        return own(*args, **kwargs)

    setattr(owner, name, counted)
    go_on(folder, objective)


def outcome(folder: Path) -> dict[str, str]:
    """The adapters, and every answer that was written."""
    found = {
        str(path.parent.name): kit.sha256(list(read_tensors(path).values()))
        for path in sorted((folder / "run" / "adapters").glob("*/adapter_model.safetensors"))
    }
    written = sorted((folder / "run" / "rollouts").rglob("*.jsonl"))
    return found | {path.name: path.read_text().replace(str(folder), "") for path in written}


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, str]]:
    """What comes out when nothing happens, by objective."""
    found = {}
    for objective in ("grpo", "ppo"):
        folder = tmp_path_factory.mktemp(objective)
        go_on(str(folder), objective)
        found[objective] = outcome(folder)
    assert len(found["ppo"]) == 2 + 3
    return found


@pytest.mark.parametrize(("objective", "place", "at"), POINTS)
def test_kill_9(
    objective: str, place: str, at: int, context: Any, unbroken: dict[str, dict[str, str]], tmp_path: Path
) -> None:
    process = context.Process(target=child, args=(str(tmp_path), objective, place, at))
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL, f"{place} {at} was not reached: exit code {process.exitcode}"
    go_on(str(tmp_path), objective)
    assert outcome(tmp_path) == unbroken[objective]
