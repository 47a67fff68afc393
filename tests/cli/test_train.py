"""``weft train`` through its command line: output, exit codes, signals, resuming."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest

from weft.cli import progress


@pytest.fixture
def words(tiny_llama_dir: Path, tiny_data: Path) -> list[str]:
    return ["train", "--model", str(tiny_llama_dir), "--data", str(tiny_data)]


def test_two_methods_in_one_run(weft: Callable[..., Any], words: list[str]) -> None:
    result = weft(*words, "--method", "lora", "--method", "prefix_tuning", "steps=4", "num_virtual_tokens=4",
                  "eval_size=4", "logging_steps=2", "eval_steps=2")  # fmt: skip
    assert result.code == 0, result.err
    # PEFT's wording, first, per job.
    assert re.match(
        r"lora: trainable params: 8,192 \|\| all params: 36,\d+ \|\| trainable%: 22\.\d{4} -> runs/weft/adapters/lora\n"
        r"prefix_tuning: trainable params: 256 \|\|",
        result.out,
    )
    lines = result.err.splitlines()
    assert sum(line.startswith("step job=lora step=4/4 ") for line in lines) == 1
    assert [line.split()[2] for line in lines if line.startswith("eval job=lora")] == ["step=0", "step=2", "step=4"]
    for part in ("eval first", "finished", "runs/weft/adapters/prefix_tuning", "weft chat runs/weft"):
        assert part in result.out
    for job in ("lora", "prefix_tuning"):
        assert (Path("runs/weft/adapters") / job / "adapter_model.safetensors").is_file()


def test_json_stands_alone_on_stdout(weft: Callable[..., Any], words: list[str]) -> None:
    result = weft(*words, "--method", "lora", "steps=2", "eval_size=2", "--output-dir", "out", "--json")
    assert result.code == 0
    value = json.loads(result.out)
    assert value["completed"] is True
    assert value["output_dir"] == "out"
    (job,) = value["jobs"]
    assert job["steps"] == job["total_steps"] == 2
    assert job["ended"] == "finished"
    assert job["bytes"] == os.path.getsize("out/adapters/lora/adapter_model.safetensors")
    assert job["eval_loss_best"] <= job["eval_loss_first"]
    assert "trainable params" in result.err
    assert "step job=lora" in result.err


def test_quiet(weft: Callable[..., Any], words: list[str]) -> None:
    result = weft(*words, "--method", "lora", "steps=1", "--quiet")
    assert result.err == ""
    assert "trainable params" not in result.out
    assert "finished" in result.out


def test_file_flags_and_overrides(weft: Callable[..., Any], tiny_llama_dir: Path, tiny_data: Path) -> None:
    Path("run.yaml").write_text(
        f"model_name_or_path: {tiny_llama_dir}\ndataset: {tiny_data}\nlr: 1.0e-2\noutput_dir: from_file\n"
        "jobs:\n- {name: small, method: lora, r: 2}\n- {name: big, method: lora, r: 4}\n",
        encoding="utf-8",
    )
    result = weft("train", "run.yaml", "learning_rate=1e-3", "jobs.1.r=8", "jobs.small.lora_alpha=3", "max_steps=1",
                  "--output-dir", "from_flag", "--quiet")  # fmt: skip
    assert result.code == 0, result.err
    config = json.loads(Path("from_flag/run.json").read_text())["config"]
    small, big = config["jobs"]
    assert small["method_settings"] == {"r": 2, "lora_alpha": 3}
    assert big["method_settings"] == {"r": 8}
    assert small["learning_rate"] == big["learning_rate"] == 1e-3
    assert not Path("from_file").exists()


def test_a_job_that_fails_is_exit_3(weft: Callable[..., Any], words: list[str]) -> None:
    result = weft(*words, "--method", "lora", "--method", "bottleneck", "jobs.lora.learning_rate=1e30", "steps=3",
                  "warmup_ratio=0", "--json")  # fmt: skip
    assert result.code == 3
    lora, bottleneck = json.loads(result.out)["jobs"]
    assert (lora["ended"], bottleneck["ended"]) == ("failed", "finished")
    assert lora["loss"] is None or isinstance(lora["loss"], float)
    assert "warning: lora: loss or gradient is not finite" in result.err


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_saves_and_the_run_goes_on(
    weft: Callable[..., Any], words: list[str], monkeypatch: pytest.MonkeyPatch, number: signal.Signals, code: int
) -> None:
    settings = ("--method", "lora", "steps=6", "logging_steps=1", "--output-dir", "out")
    before = signal.getsignal(number)
    with monkeypatch.context() as patch:
        patch.setattr(progress, "plain_line", _raising(number, at_step=2))
        result = weft(*words, *settings)
    assert result.code == code
    assert "saved at step 2. Go on with:  weft train out --resume" in result.out
    assert signal.getsignal(number) is before
    assert not list(Path("out/adapters").iterdir())
    # The folder of an unfinished run answers from its checkpoint.
    answer = weft("generate", "out", "--prompt", "a", "--max-new-tokens", "2")
    assert answer.code == 0
    assert "not finished: lora as of step 2" in answer.err
    resumed = weft("train", "out", "--resume", "--json")
    assert resumed.code == 0, resumed.err
    assert weft(*words, *settings[:-1], "whole", "--quiet").code == 0
    names = [Path(folder) / "adapters/lora/adapter_model.safetensors" for folder in ("out", "whole")]
    assert names[0].read_bytes() == names[1].read_bytes()


def _raising(number: signal.Signals, at_step: int) -> Callable[[Mapping[str, Any]], str | None]:
    plain = progress.plain_line

    def line(event: Mapping[str, Any]) -> str | None:
        if event["event"] == "step" and event["step"] == at_step:
            signal.raise_signal(number)
        return plain(event)

    return line


def test_a_signal_while_loading_writes_nothing(
    weft: Callable[..., Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    run = importlib.import_module("weft.training.run")
    monkeypatch.setattr(run, "prepare", lambda config, **seen: signal.raise_signal(signal.SIGTERM))
    result = weft(*words, "--method", "lora")
    assert result.code == 143
    assert result.err == "interrupted before training began; nothing was written.\n"
    assert list(Path.cwd().iterdir()) == []


def test_ctrl_c_in_a_process_of_its_own(words: list[str], tmp_path: Path) -> None:
    command = [sys.executable, "-m", "weft.cli.main", *words, "--method", "lora", "steps=100000", "--json",
               f"output_dir={tmp_path / 'out'}"]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=tmp_path)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("step job=lora step=10/"):
            break
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    value = json.loads(out)
    assert value["completed"] is False
    assert value["jobs"][0]["ended"] == "interrupted"
    assert (tmp_path / "out/checkpoints" / f"step-{value['steps']:08d}" / "lora.safetensors").is_file()
    assert "Traceback" not in err


def test_live_display() -> None:
    from rich.console import Console

    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=80, color_system=None, legacy_windows=False)
    reporter = progress.LiveReporter([("lora", 100), ("a_name_that_is_long_indeed_yes", 100)], console)
    step = {"event": "step", "job": "lora", "step": 50, "total_steps": 100, "loss": 1.23456, "memory_gb": 1.5,
            "tokens_per_second": 54321.0, "eta_seconds": 3725.0}  # fmt: skip
    reporter.event(step)
    reporter.event({"event": "eval", "job": "lora", "step": 50, "eval_loss": 2.0})
    reporter.event({"event": "warning", "message": "[bold] is text"})
    reporter.close()
    text = screen.getvalue()
    assert "warning: [bold] is text" in text
    last = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", text).splitlines()
    (line,) = {line for line in last if line.startswith("lora") and "50/100" in line}
    for part in ("50/100", "1.2346", "2.0000", "54321", "1:02:05"):
        assert part in line
    assert all(len(line) <= 80 for line in last)


def test_start_up_is_light() -> None:
    heavy = "('torch', 'transformers', 'pydantic', 'yaml')"
    code = f"import sys, weft.cli.main as cli; cli.main(['--help']); sys.exit(any(n in sys.modules for n in {heavy}))"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("verb", ["train", "chat", "generate", "doctor"])
def test_help_tells_the_exit_codes(weft: Callable[..., Any], verb: str) -> None:
    result = weft(verb, "--help")
    assert result.code == 0
    for code in ("130", "143", "a defect of Weft"):
        assert code in " ".join(result.out.split())


@pytest.mark.parametrize(
    ("device", "threads", "load", "told"),
    [("cpu", 2, 9.0, True), ("cpu", 1, 9.0, False), ("cpu", 2, 1.0, False), ("cuda", 2, 9.0, False)],
)
def test_a_busy_machine_is_told(
    device: str, threads: int, load: float, told: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from types import SimpleNamespace

    import torch

    from weft.cli import common
    from weft.cli.train import _busy

    monkeypatch.setattr(common, "cores", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    monkeypatch.setattr("os.getloadavg", lambda: (load, 0.0, 0.0))
    line = _busy(SimpleNamespace(adapters=SimpleNamespace(device=torch.device(device))))  # type: ignore[arg-type]
    told_so = "this machine is busy (load 9.0, 2 cores): threads: 1 may be faster than the 2 in use"
    assert line == (told_so if told else None)
