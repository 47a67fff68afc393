"""A run that was killed, stopped or damaged ends bit for bit as the unbroken one."""

from __future__ import annotations

import random
import time
from pathlib import Path
from typing import Any

import pytest
from tests.training import recipe

from weft.errors import UserError

ROOT = Path(__file__).parents[2]
KILLED = -9


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What comes out when nothing happens."""
    folder = tmp_path_factory.mktemp("unbroken") / "run"
    assert recipe.go_on(folder)
    found = recipe.outcome(folder)
    ended = {name: progress["ended"] for name, progress in found["jobs"].items()}
    assert ended == {"lora": "early_stop", "prefix": "finished", "bottleneck": "finished"}, (
        "the run must hold all cases"
    )
    assert found["jobs"]["lora"]["step"] < 14
    return found


def run_child(context: Any, folder: Path, where: str = "", at: int = 0, delay: float | None = None) -> int:
    process = context.Process(target=recipe.child, args=(str(folder), where, at))
    process.start()
    if delay is not None:
        time.sleep(delay)
        process.kill()
    process.join(120)
    assert process.exitcode is not None
    return process.exitcode


def assert_same(found: dict[str, Any], wanted: dict[str, Any]) -> None:
    for key in wanted:
        assert found[key] == wanted[key], key


# Six hold each case once: inside a save and in a forward pass, killed once and twice.
POINTS = [pytest.param(point, marks=pytest.mark.slow if point >= 6 else ()) for point in range(20)]


@pytest.mark.parametrize("point", POINTS)
def test_kill_9(point: int, context: Any, unbroken: dict[str, Any], tmp_path: Path) -> None:
    """Half of the points lie inside a save. A third of the runs is killed a second time, after going on."""
    rng, where = random.Random(point), ("disk" if point % 2 else "forward")
    at = rng.randint(1, 100 if where == "disk" else 30)
    folder = tmp_path / "run"
    code = run_child(context, folder, where, at)
    assert code == KILLED, f"the point {where} {at} was not reached: exit code {code}"
    if point % 3 == 0:
        run_child(context, folder, where, rng.randint(1, 8))
    assert run_child(context, folder) == 0
    assert_same(recipe.outcome(folder), unbroken)


@pytest.mark.slow
@pytest.mark.parametrize("point", range(30))
def test_kill_9_at_any_time(point: int, context: Any, unbroken: dict[str, Any], tmp_path: Path) -> None:
    """From outside, after a random delay."""
    folder = tmp_path / "run"
    for attempt in range(2):
        run_child(context, folder, delay=random.Random(100 * point + attempt).uniform(0.05, 1.5))
    assert run_child(context, folder) == 0
    assert_same(recipe.outcome(folder), unbroken)


@pytest.mark.parametrize(
    "ask", [1, 4, 11, 20, *(pytest.param(ask, marks=pytest.mark.slow) for ask in (2, 3, 6, 8, 14, 17))]
)
def test_asked_to_stop_anywhere(ask: int, unbroken: dict[str, Any], tmp_path: Path) -> None:
    """It is asked after every step and before every evaluation; here it stops at the ``ask``-th and every 7th after."""
    asked, folder = 0, tmp_path / "run"

    def should_stop() -> bool:
        nonlocal asked
        asked += 1
        return asked >= ask and (asked - ask) % 7 == 0

    sittings = 1
    while not recipe.go_on(folder, should_stop=should_stop, save_steps=None if ask % 2 else 3):
        sittings += 1
        assert sittings < 40
    assert sittings > 1
    assert_same(recipe.outcome(folder), unbroken)


@pytest.mark.parametrize("save_steps", [1, 3, None])
def test_how_often_it_is_saved_changes_nothing(
    save_steps: int | None, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    recipe.go_on(tmp_path / "run", save_steps=save_steps)
    assert_same(recipe.outcome(tmp_path / "run"), unbroken)


def test_a_finished_run_stays_as_it_is(unbroken: dict[str, Any], tmp_path: Path) -> None:
    for _ in range(2):
        assert recipe.go_on(tmp_path / "run")
        assert_same(recipe.outcome(tmp_path / "run"), unbroken)


def break_at(folder: Path, step: int) -> None:
    """Run until ``step`` steps are done."""
    made: list[Any] = []
    trainer = recipe.make_trainer(folder, should_stop=lambda: made[0].step >= step)
    made.append(trainer)
    trainer.resume()
    assert not trainer.run().completed
    assert trainer.step == step
    trainer.store.release()


@pytest.mark.parametrize("how", ["truncate", "flip", "remove", "empty"])
def test_a_damaged_checkpoint_is_noticed_and_the_one_before_is_used(
    how: str, unbroken: dict[str, Any], tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    break_at(folder, 5)
    newest = max((folder / "checkpoints").glob("step-*"))
    assert newest.name == "step-00000005"
    victim = newest / "lora.safetensors"
    whole = victim.read_bytes()
    if how == "remove":
        victim.unlink()
    else:
        middle = len(whole) // 2
        flipped = whole[:middle] + bytes([whole[middle] ^ 4]) + whole[middle + 1 :]
        victim.write_bytes({"truncate": whole[:middle], "flip": flipped, "empty": b""}[how])
    events: list[Any] = []
    # Other steps than before are saved: what is damaged and newer must not push out what is intact.
    assert recipe.go_on(folder, on_event=events.append, save_steps=1, save_total_limit=1)
    warnings = [e["message"] for e in events if e["event"] == "warning"]
    assert len(warnings) == 1
    assert "step-00000005 is damaged (lora.safetensors" in warnings[0]
    assert_same(recipe.outcome(folder), unbroken)
    assert [p.name for p in (folder / "checkpoints").iterdir()] == [f"step-{unbroken['step']:08d}"]


def test_no_intact_checkpoint_is_an_error_not_a_new_beginning(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    break_at(folder, 5)
    for path in (folder / "checkpoints").glob("step-*/state.json"):
        path.write_text(path.read_text()[:-9])
    with pytest.raises(UserError, match="no intact checkpoint"):
        recipe.go_on(folder)


def test_other_data_or_jobs_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "run"
    break_at(folder, 3)
    trainer = recipe.make_trainer(folder)
    trainer.jobs[1].samples = trainer.jobs[1].samples[::-1]
    with pytest.raises(UserError, match="data of job 'prefix'"):
        trainer.resume()
    trainer.store.release()
    trainer = recipe.make_trainer(folder)
    trainer.jobs.pop()
    with pytest.raises(UserError, match="jobs are"):
        trainer.resume()
    trainer.store.release()
    monkeypatch.setattr("weft.training.loop.environment", lambda: {"torch": "other"})
    events: list[Any] = []
    recipe.make_trainer(folder, on_event=events.append).resume()
    assert "not bit for bit" in events[0]["message"]
