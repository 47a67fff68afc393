"""A checkpoint appears whole or not at all, at whatever moment the machine dies."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.training.recipe import at_the_disk

from weft.errors import UserError
from weft.files.run_folder import RunStore, read_metrics


class CrashError(BaseException):
    """The machine is gone: no handler of ours may catch this."""


def content(value: int) -> tuple[dict[str, Any], dict[str, dict[str, torch.Tensor]]]:
    tensors = {name: {"w": torch.full((50,), float(value)), "v": torch.arange(value + 1)} for name in ("a", "b")}
    return {"value": value}, tensors


def save(store: RunStore, step: int, value: int, keep: int) -> None:
    state, tensors = content(value)
    store.save(step, state, tensors, keep)


def value_of(store: RunStore) -> tuple[int, list[str]]:
    """What the newest intact checkpoint holds; its tensors belong to its state."""
    found = store.latest()
    assert found is not None
    state, tensors, warnings = found
    wanted = content(state["value"])[1]
    assert tensors.keys() == wanted.keys()
    assert all(torch.equal(tensors[name][key], t) for name, group in wanted.items() for key, t in group.items())
    return state["value"], warnings


def saves_that_crash(tmp_path: Path, before: list[tuple[int, int]], step: int, keep: int) -> Iterator[RunStore]:
    """For every k: a folder with ``before`` saved, then a save of ``step`` (value 99) that dies before its k-th change
    of the disk. Ends with the one that got through."""
    for k in range(1, 200):
        store = RunStore(tmp_path / f"run-{k}")
        store.prepare(overwrite=False, resume=False)
        for at, value in before:
            save(store, at, value, keep)

        def crash(count: int, k: int = k) -> None:
            if count == k:
                raise CrashError

        undo = at_the_disk(crash)
        try:
            save(store, step, 99, keep)
            died = False
        except CrashError:
            died = True
        finally:
            undo()
        yield RunStore(store.folder)
        if not died:
            return
    raise AssertionError("200 changes of the disk for one save?")


@pytest.mark.parametrize("keep", [1, 2])
@pytest.mark.parametrize(
    ("before", "step"),
    [([(5, 5), (10, 10)], 15), ([(5, 5), (10, 10)], 10), ([(10, 10)], 10)],
    ids=["next", "same step", "same step, nothing else"],
)
def test_every_crash_point_of_a_save(keep: int, before: list[tuple[int, int]], step: int, tmp_path: Path) -> None:
    seen = []
    for store in saves_that_crash(tmp_path, before, step, keep):
        value, warnings = value_of(store)
        assert value in {before[-1][1], 99}, "neither the one before nor the new one"
        assert warnings == [], "a crash is no damage"
        seen.append(value)
        # And the next save succeeds and tidies up.
        save(store, step + 1, 7, keep)
        assert value_of(store) == (7, [])
        names = sorted(p.name for p in store.checkpoints.iterdir())
        assert len(names) <= keep
        assert not any("unfinished" in name or "replaced" in name for name in names)
    assert seen == sorted(seen), "once the new one is there it stays"
    assert seen[0] != 99
    assert seen[-1] == 99
    assert len(seen) > 10


def test_the_first_save_may_leave_nothing(tmp_path: Path) -> None:
    states = [store.latest() for store in saves_that_crash(tmp_path, [], 5, 2)]
    assert states[0] is None
    assert states[-1] is not None
    assert [s is not None for s in states] == sorted(s is not None for s in states)


FILES = ["a.safetensors", "b.safetensors", "state.json", "manifest.json"]


@pytest.mark.parametrize("name", FILES)
def test_every_damage_is_noticed(name: str, tmp_path: Path) -> None:
    """Any truncation and any flipped bit of any file."""
    store = RunStore(tmp_path / "run")
    store.prepare(overwrite=False, resume=False)
    save(store, 5, 5, 2)
    save(store, 10, 10, 2)
    path = store.checkpoints / "step-00000010" / name
    whole = path.read_bytes()
    for place in range(0, len(whole), max(1, len(whole) // 25)):
        for broken in (whole[:place], whole[:place] + bytes([whole[place] ^ 1]) + whole[place + 1 :]):
            path.write_bytes(broken)
            if name == "manifest.json" and broken.strip() == whole.strip():
                continue  # the newline at the end says nothing
            value, warnings = value_of(store)
            assert value == 5
            assert "step-00000010" in warnings[0]
    path.unlink()
    assert value_of(store)[0] == 5
    path.write_bytes(whole)
    assert value_of(store) == (10, [])


def test_a_damaged_newer_one_does_not_push_out_an_intact_one(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    store.prepare(overwrite=False, resume=False)
    for step in (10, 20):
        save(store, step, step, 2)
    (store.checkpoints / "step-00000020" / "a.safetensors").write_bytes(b"")
    save(store, 15, 15, 1)
    assert value_of(store) == (15, [])
    assert [p.name for p in store.checkpoints.iterdir()] == ["step-00000015"]


def test_metrics_are_cut_back_never_filled_up(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    store.prepare(overwrite=False, resume=False)
    store.log({"event": 1})
    save(store, 5, 5, 2)
    found = store.latest()
    assert found is not None
    size = found[0]["metrics_bytes"]
    store.log({"event": 2})
    store.rewind_metrics(size)
    path = store.folder / "metrics.jsonl"
    assert [row["event"] for row in read_metrics(store.folder)] == [1]
    path.write_text("")
    store.rewind_metrics(size)
    assert path.read_bytes() == b"", "the gap was filled with zero bytes"


def test_a_folder_is_not_taken_by_mistake(tmp_path: Path) -> None:
    store = RunStore(tmp_path / "run")
    store.prepare(overwrite=False, resume=False)
    with pytest.raises(UserError, match="already holds something"):
        store.prepare(overwrite=False, resume=False)
    with pytest.raises(UserError, match="run's folder"):
        store.prepare(overwrite=True, resume=False)
    store.write_run({"config": {}})
    save(store, 5, 5, 2)
    with pytest.raises(UserError, match="already holds a run"):
        store.prepare(overwrite=False, resume=False)
    store.prepare(overwrite=False, resume=True)
    assert value_of(store)[0] == 5
    store.prepare(overwrite=True, resume=False)
    assert store.latest() is None
    (tmp_path / "file").write_text("mine")
    with pytest.raises(UserError):
        RunStore(tmp_path / "file").prepare(overwrite=True, resume=False)
    assert (tmp_path / "file").read_text() == "mine"


def test_two_processes_cannot_train_in_one_folder(tmp_path):
    """A lock belongs to an open file, so a second store in this process stands for a second process."""
    first = RunStore(tmp_path / "run")
    first.prepare(overwrite=False, resume=True)
    with pytest.raises(UserError, match="another process is training"):
        RunStore(tmp_path / "run").prepare(overwrite=False, resume=True)
    first.release()
    RunStore(tmp_path / "run").prepare(overwrite=False, resume=True)


def test_a_folder_that_cannot_be_made_is_the_users_to_mend():
    with pytest.raises(UserError, match=r"output_dir /proc/weft\S*/run cannot be written, because of 'No such"):
        RunStore("/proc/weft-cannot-write-here/run").prepare(overwrite=False, resume=False)
