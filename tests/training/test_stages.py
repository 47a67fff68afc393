"""Several runs in one file: what each begins with, where it lies, and how a chain goes on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import yaml

from weft.cli.main import main
from weft.errors import UserError
from weft.training.stages import read_stages

SUMS = [{"instruction": f"How much is {a} + {b}?", "output": str(a + b)} for a in range(1, 5) for b in range(1, 4)]
PAIRS = [{"prompt": row["instruction"], "chosen": row["output"], "rejected": "no"} for row in SUMS]


def chain(folder: Path, **changes: Any) -> Path:
    for name, rows in (("sums", SUMS), ("pairs", PAIRS)):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    settings = {"rewards": [{"adapter": "judge"}], "num_generations": 2, "max_completion_length": 3}
    values = {
        "model": "tiny-llama", "output_dir": str(folder / "runs"), "method": "lora", "threads": 1, "steps": 2,
        "batch_size": 2,
        "stages": [
            {"name": "sft", "data": str(folder / "sums.jsonl")},
            {"name": "judge", "data": str(folder / "pairs.jsonl"), "objective": "reward", "start_from": "sft"},
            {"name": "ppo", "data": str(folder / "sums.jsonl"), "start_from": "sft/lora", "objective": "ppo",
             "objective_settings": settings},
        ],
        **changes,
    }  # fmt: skip
    path = folder / "chain.yaml"
    path.write_text(yaml.safe_dump(values, sort_keys=False))
    return path


def test_a_chain_runs_and_goes_on(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = chain(tmp_path)
    assert main(["train", str(path), "--quiet"]) == 0
    runs = tmp_path / "runs"
    assert sorted(p.name for p in (runs / "ppo" / "adapters").iterdir()) == ["lora", "lora-value"]
    row = json.loads(next((runs / "ppo" / "rollouts").rglob("*.jsonl")).read_text().splitlines()[0])
    assert list(row["rewards"]) == [f"adapter {runs / 'judge' / 'adapters' / 'lora'}"]
    before = {path: path.stat().st_mtime_ns for path in runs.rglob("adapter_model.safetensors")}
    capsys.readouterr()
    assert main(["train", str(path), "--quiet"]) == 2  # the runs are there
    assert "already holds a run" in capsys.readouterr().err
    assert main(["train", str(path), "--quiet", "--resume"]) == 0
    assert capsys.readouterr().err.count("is done") == 3
    assert before == {path: path.stat().st_mtime_ns for path in runs.rglob("adapter_model.safetensors")}
    assert main(["rollouts", str(runs / "ppo"), "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["job"] == "lora"
    assert len(told["rollouts"]) == 4
    page = tmp_path / "page.html"
    assert main(["rollouts", str(runs / "ppo"), "--order", "worst", "--html", str(page)]) == 0
    assert "<script" not in page.read_text()
    assert main(["rollouts", str(runs / "sft")]) == 2


def test_a_stage_that_was_broken_goes_on(tmp_path: Path) -> None:
    path = chain(tmp_path)
    assert main(["train", str(path), "--quiet"]) == 0
    done = tmp_path / "runs" / "judge" / "adapters" / "lora"
    kept = (done / "adapter_model.safetensors").read_bytes()
    for file in done.iterdir():
        file.unlink()
    done.rmdir()
    assert main(["train", str(path), "--quiet", "--resume"]) == 0
    assert (done / "adapter_model.safetensors").read_bytes() == kept


def test_what_is_said_last_wins_in_every_stage(tmp_path: Path) -> None:
    stages = read_stages(chain(tmp_path), ["steps=5"], flags={"output_dir": str(tmp_path / "other")})
    assert [stage.config.jobs[0].steps for stage in stages] == [5, 5, 5]
    assert stages[1].config.output_dir == str(tmp_path / "other" / "judge")
    assert stages[1].config.jobs[0].start_from == str(tmp_path / "other" / "sft" / "adapters" / "lora")


@pytest.mark.parametrize(
    ("stages", "message"),
    [
        ([], "must be a list of mappings"),
        ([{"data": "x"}], "stages\\[0\\] has no name"),
        ([{"name": "a"}, {"name": "a"}], "two stages are named a"),
        ([{"name": "a"}, {"name": "b", "start_from": "aa"}], "no earlier stage \\(a\\)"),
        ([{"name": "a"}, {"name": "b", "start_from": "a/loro"}], "has no job 'loro'"),
        ([{"name": "a", "method": ["lora", "bitfit"]}, {"name": "b", "start_from": "a"}], "say which, a/lora"),
        ([{"name": "a", "stepps": 2}], "stage a.*stepps"),
    ],
)
def test_a_chain_that_cannot_be_is_refused(stages: list[Any], message: str, tmp_path: Path) -> None:
    path = chain(tmp_path, stages=stages, data=str(tmp_path / "sums.jsonl"))
    with pytest.raises(UserError, match=message):
        read_stages(path, flags={})


def test_an_adapter_to_start_from_must_fit(tmp_path: Path) -> None:
    path = chain(tmp_path)
    assert main(["train", str(path), "--quiet"]) == 0
    base = ["train", "--quiet", "--data", str(tmp_path / "sums.jsonl"), "--output-dir", str(tmp_path / "x"), "steps=1"]
    sft, judge = (str(tmp_path / "runs" / name / "adapters" / "lora") for name in ("sft", "judge"))
    for more in (
        ["--model", "tiny-bloom", "--method", "lora", f"start_from={sft}"],
        ["--model", "tiny-llama", "--method", "bitfit", f"start_from={sft}"],
        ["--model", "tiny-llama", "--method", "lora", f"start_from={sft}", "r=2"],
        ["--model", "tiny-llama", "--method", "lora", f"start_from={judge}"],
        ["--model", "tiny-llama", "--method", "lora", f"start_from={tmp_path}"],
    ):
        assert main([*base, *more]) == 2, more
        assert not (tmp_path / "x").exists()
