"""Runs, adapters and configurations of an earlier version (21 November 2026) load, answer and go on as they did there.

The folders under ``folders/`` are as that version wrote them, without the tokenizer's largest file, which is the
embedded base's. ``stopped`` is a run of nine steps as it was after step 8; ``stopped_ends`` holds the adapters of its
end.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests import kit

import weft
from weft import assets

RUNS = Path(__file__).parent / "folders"


@pytest.fixture
def runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the runs, as the working directory that they were made in."""
    folder = tmp_path / "runs"
    shutil.copytree(RUNS, folder)
    for run in ("several", "classes", "stopped"):
        shutil.copy(assets.model_path("tiny-llama") / "tokenizer.json", folder / run / "tokenizer")
    monkeypatch.chdir(folder)
    return folder


def command(capsys: pytest.CaptureFixture[str], *words: str) -> Any:
    from weft.cli.main import main

    capsys.readouterr()
    code = main(list(words))
    out, err = capsys.readouterr()
    assert code == 0, err
    return out


def test_every_adapter_answers_as_it_did(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = json.loads((runs / "answers.json").read_text())
    words = [word for prompt in dict.fromkeys(row["prompt"] for row in wanted) for word in ("--prompt", prompt)]
    out = command(capsys, "generate", "several", *words, "--all-adapters", "--max-new-tokens", "8", "--json")
    found = {(row["prompt"], row["adapter"]): row for row in json.loads(out)["results"]}
    for row in wanted:
        now = found[row["prompt"], row["adapter"]]
        assert (now["text"], now["prompt_tokens"]) == (row["text"], row["prompt_tokens"]), row


def test_the_classes_are_as_likely_as_they_were(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = json.loads(command(capsys, "generate", "classes", "--prompt", "a good day", "--json"))["results"]
    kit.measured("probability", abs(row["probabilities"]["good"] - 0.5702535510063171), 1e-5)


def test_a_stopped_run_goes_on_to_the_same_end(runs: Path, capsys: pytest.CaptureFixture[str]) -> None:
    command(capsys, "train", "--resume", "stopped", "--quiet")
    for name in ("lora", "p_tuning"):
        then = load_file(runs / "stopped_ends" / f"{name}.safetensors")
        now = load_file(runs / "stopped" / "adapters" / name / "adapter_model.safetensors")
        assert then.keys() == now.keys()
        # Where Adam divides by nearly nothing another machine differs by more than rounding; a wrong step by 1e-2.
        kit.measured(name, kit.difference(list(now.values()), list(then.values())), 1e-4)


@pytest.mark.parametrize("name", ["several", "classes", "stopped"])
def test_its_configuration_means_what_it_meant(runs: Path, name: str) -> None:
    config = weft.load_config(str(runs / f"{name}.yaml"))
    stored = json.loads((runs / name / "run.json").read_text())["config"]
    now = config.model_dump(mode="json")
    for key, value in stored.items():
        if key != "jobs":
            assert now[key] == value, key
    for old, new in zip(stored["jobs"], now["jobs"], strict=True):
        assert {key: new[key] for key in old} == old
