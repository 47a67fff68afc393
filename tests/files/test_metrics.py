"""The rows of a run as a table, and as they come."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from weft.errors import UserError
from weft.files.metrics import Follower, Metrics
from weft.files.run_folder import RunStore, read_metrics

ROWS = [
    {"event": "eval", "job": "a", "step": 0, "eval_loss": 3.0},
    {"event": "step", "job": "a", "step": 1, "loss": 2.0},
    {"event": "step", "job": "b", "step": 1, "loss": 4.0},
    {"event": "warning", "message": "take care"},
    {"event": "step", "job": "a", "step": 2, "loss": 1.0},
]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    return tmp_path


def test_rows_are_filtered_and_made_columns_without_pandas(run: Path) -> None:
    found = read_metrics(run)
    assert isinstance(found, list)
    assert [{k: v for k, v in row.items() if k != "time"} for row in found] == ROWS
    assert read_metrics(run, event="step", job="a") == found.where(event="step", job="a") == [found[1], found[4]]
    assert found.columns("step", "loss") == {"step": [0, 1, 1, None, 2], "loss": [None, 2.0, 4.0, None, 1.0]}
    assert list(found.where(job="b").columns()) == ["time", "event", "job", "step", "loss"]
    assert found.jobs == ["a", "b"]
    assert found.curve("loss", "a") == ([1, 2], [2.0, 1.0])
    assert found.where(job="b").curve("loss") == ([1], [4.0])
    with pytest.raises(UserError, match=r"several jobs \(a, b\)"):
        found.curve("loss")


def test_pandas_takes_them_as_they_are(run: Path) -> None:
    pandas = pytest.importorskip("pandas", reason="pip install pandas")
    table = pandas.DataFrame(read_metrics(run))
    assert list(table[table.job == "a"].loss.dropna()) == [2.0, 1.0]


def test_a_follower_leaves_torn_lines_and_hears_of_a_file_that_began_anew(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    follower = Follower(path)
    assert follower.rows() == (False, [])
    lines = [json.dumps(row) + "\n" for row in ROWS]
    path.write_text(lines[0] + lines[1][:7])
    assert follower.rows() == (False, ROWS[:1])
    assert follower.rows() == (False, [])
    path.write_text("".join(lines[:3]))
    assert follower.rows() == (False, ROWS[1:3])
    # Cut back, and grown again beyond where the reader was, with other rows.
    path.write_text(lines[0] + lines[4] * 4)
    assert follower.rows() == (True, [ROWS[0], *[ROWS[4]] * 4])
    path.unlink()
    assert follower.rows() == (True, [])
    path.write_text("{no\n")
    with pytest.raises(UserError, match="byte 0"):
        follower.rows()


def test_an_empty_run_has_no_rows(tmp_path: Path) -> None:
    (tmp_path / "run.json").write_text("{}")
    assert read_metrics(tmp_path) == Metrics() == []


def test_a_look_at_the_lock_keeps_nobody_from_training(tmp_path: Path) -> None:
    looking, training = RunStore(tmp_path / "run"), RunStore(tmp_path / "run")
    assert not looking.in_use()
    training.prepare(overwrite=False, resume=True)
    assert looking.in_use()
    with pytest.raises(UserError, match="another process is training"):
        RunStore(tmp_path / "run").prepare(overwrite=False, resume=True)
    training.release()
    assert not looking.in_use()
    training.prepare(overwrite=False, resume=True)
    training.release()
