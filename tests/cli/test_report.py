"""``weft report`` and ``weft compare``: what they print, write and refuse."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import pytest
from tests.cli.conftest import Run
from tests.evaluate.made import make_run, simple, write

Weft = Callable[..., Run]


def test_a_run_is_reported_beside_itself(weft: Weft, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write(run / "evaluation" / "first", simple({"lora": range(60, 85), "ia3": []}))
    done = weft("report", run)
    assert done.code == 0, done.err
    lines = {line.split()[0]: line.split() for line in done.out.splitlines() if line.strip()}
    assert lines["base"] == ["base", "60.0", "±", "4.9", "–", "–", "–"]
    assert lines["lora"] == ["lora", "85.0", "±", "3.6", "+25.0*", "<", "0.001", "+25", "−0"]
    assert "ia3 is a no-op" in done.out
    assert "What was forgotten was not measured" in done.out
    assert f"wrote {run / 'report' / 'report.html'}" in done.err
    assert {"report.html", "report.md", "report.json", "figures.png", "losses.png"} == {
        one.name for one in (run / "report").iterdir()
    }


def test_a_run_without_results_tells_its_losses_and_how_to_evaluate(weft: Weft, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    done = weft("report", run, "--output", tmp_path / "out")
    assert done.code == 0, done.err
    assert [line.split() for line in done.out.splitlines() if line.startswith("lora")] == [
        ["lora", "lora", "3.0000", "0.1429", "0.1429", "0.1600"]
    ]
    assert f"weft eval {run} --tasks" in done.out
    page = (tmp_path / "out" / "report.html").read_text()
    assert "What training left" in page
    assert "Nothing was evaluated yet" in page


def test_two_folders_are_compared_and_nothing_is_written_unasked(weft: Weft, tmp_path: Path) -> None:
    write(tmp_path / "a", simple({"lora": range(60, 85)}))
    write(tmp_path / "b", simple({"lora": range(60, 62)}))
    before = sorted(tmp_path.rglob("*"))
    done = weft("compare", tmp_path / "a", tmp_path / "b")
    assert done.code == 0, done.err
    assert "lora (a)" in done.out
    assert "lora (b)" in done.out
    assert sorted(tmp_path.rglob("*")) == before
    shown = weft("compare", tmp_path / "a", tmp_path / "b", "--json", "--output", tmp_path / "out")
    found = json.loads(shown.out)
    assert [one["contestant"] for one in found["figures"]] == ["base", "lora (a)", "lora (b)"]
    assert found == json.loads((tmp_path / "out" / "report.json").read_text())


def test_the_json_of_one_contestant_as_the_reference(weft: Weft, tmp_path: Path) -> None:
    write(tmp_path / "a", simple({"lora": range(60, 85), "ia3": range(60, 80)}))
    found = json.loads(weft("report", tmp_path / "a", "--reference", "lora", "--json").out)
    assert {one["difference"]["reference"] for one in found["figures"] if one["difference"]} == {"lora"}


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("report", "nowhere"), "nowhere is not there"),
        (("report", "empty"), "is neither the folder of a run (run.json) nor of results (summary.json)"),
        (("compare", "good"), "one folder cannot be compared"),
        (("compare", "good", "good"), "good is named twice"),
        (("compare", "good", "empty"), "empty is neither"),
        (("compare", "good", "damaged"), "damaged/items.jsonl:7"),
        (("report", "good", "--reference", "loro"), "Did you mean 'lora'?"),
        (("report", "good", "--output", "good/items.jsonl"), "items.jsonl"),
    ],
)
def test_bad_input_is_named(weft: Weft, tmp_path: Path, words: tuple[str, ...], said: str) -> None:
    work = tmp_path / "work"
    (work / "empty").mkdir()
    for name in ("good", "damaged"):
        write(work / name, simple())
    lines = (work / "damaged" / "items.jsonl").read_text().splitlines()
    lines[6] = '{"item": 3}'
    (work / "damaged" / "items.jsonl").write_text("\n".join(lines))
    done = weft(*words)
    assert done.code == 2
    assert said in done.err
    assert done.out == ""
    assert not (work / "good" / "report").exists()


def test_a_torn_metrics_file_is_named(weft: Weft, tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    with (run / "metrics.jsonl").open("a") as file:
        file.write('{"event": "st')
    done = weft("report", run)
    assert done.code == 2
    assert "metrics.jsonl:19" in done.err


def test_a_run_without_results_beside_others_is_named(weft: Weft, tmp_path: Path) -> None:
    write(tmp_path / "a", simple())
    run = make_run(tmp_path / "run")
    done = weft("compare", tmp_path / "a", run)
    assert done.code == 0, done.err
    assert f"{run} has no results yet" in done.out


def test_two_runs_without_results_are_told_apart(weft: Weft, tmp_path: Path) -> None:
    done = weft("compare", make_run(tmp_path / "a"), make_run(tmp_path / "b"))
    assert done.code == 0, done.err
    assert {"lora (a)", "lora (b)", "ia3 (a)", "ia3 (b)"} <= {line[:8].strip() for line in done.out.splitlines()}
