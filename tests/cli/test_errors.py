"""Bad input gives one clear message, exit code 2, no traceback, and writes nothing."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

CONFIG = "model: {model}\ndata: {data}\nmethod: lora\n"


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, tiny_llama_dir: Path, tiny_data: Path) -> dict[str, Path]:
    """Paths that the cases below may name, with some damaged files made. Nothing of a user's is ever changed, so all
    cases share them."""
    tmp_path = tmp_path_factory.mktemp("place")
    model = tmp_path / "broken-model"
    shutil.copytree(tiny_llama_dir, model)
    weights = model / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:1000])
    bad_json = tmp_path / "bad-json-model"
    shutil.copytree(tiny_llama_dir, bad_json)
    (bad_json / "config.json").write_text("{not json", encoding="utf-8")
    odd = tmp_path / "odd-model"
    shutil.copytree(tiny_llama_dir, odd)
    config = json.loads((odd / "config.json").read_text())
    (odd / "config.json").write_text(json.dumps({**config, "num_attention_heads": 5}))
    shallow = tmp_path / "shallow-model"
    shutil.copytree(tiny_llama_dir, shallow)
    (shallow / "config.json").write_text(json.dumps({**config, "num_hidden_layers": 3}))
    wide = tmp_path / "wide-model"
    shutil.copytree(tiny_llama_dir, wide)
    (wide / "config.json").write_text(json.dumps({**config, "intermediate_size": 80}))
    no_tokenizer = tmp_path / "no-tokenizer"
    no_tokenizer.mkdir()
    for name in ("config.json", "model.safetensors"):
        shutil.copy(tiny_llama_dir / name, no_tokenizer / name)
    files = {
        "empty": ("empty.jsonl", ""),
        "fields": ("fields.jsonl", '{"instruction": "a", "output": "b"}\n{"instruction": "only"}\n'),
        "long": ("long.jsonl", json.dumps({"instruction": "a", "output": "word " * 300}) + "\n"),
        "nearly": ("nearly.jsonl", json.dumps({"instruction": "a", "output": "9 " * 110}) + "\n"),
        "broken": ("broken.jsonl", '{"instruction": "a", \n'),
        "yaml": ("bad.yaml", "model: [unclosed\n"),
        "twice": ("twice.yaml", "seed: 1\nseed: 2\n"),
        "list": ("list.yaml", "- a\n- b\n"),
        "void": ("void.yaml", ""),
        "good": ("good.yaml", CONFIG.format(model=tiny_llama_dir, data=tiny_data)),
        "occupied": ("occupied.txt", "in the way"),
    }
    paths = {"model": tiny_llama_dir, "data": tiny_data, "cut": model, "badjson": bad_json, "notok": no_tokenizer}
    paths |= {"odd": odd, "shallow": shallow, "wide": wide}
    for key, (name, text) in files.items():
        paths[key] = tmp_path / name
        paths[key].write_text(text, encoding="utf-8")
    return paths


TRAIN = "train --model {model} --data {data} --method lora"
CASES = [
    ("train {good} learning_rat=1", ["unknown key 'learning_rat'", "'learning_rate'"]),
    ("train {good} jobs.0.rr=4", ["unknown key 'rr'", "'r'"]),
    ("train {good} model_nam=4", ["unknown key 'model_nam'", "'model'"]),
    ("train {good} r=many", ["r:", "integer", "many"]),
    ("train {good} epochs=-1", ["epochs", "greater than 0", "-1"]),
    ("train {good} batch_size=[1,2]", ["batch_size", "integer"]),
    ("train {good} dtype=float12", ["dtype 'float12'", "float16"]),
    ("train {good} train_on=answer", ["train_on", "answers"]),
    ("train {good} jobs.3.r=4", ["jobs.3.r", "'3'"]),
    ("train {good} model.x=4", ["'model' holds a value"]),
    ("train {good} =4", ["'=4'", "key=value"]),
    ("train {good} .r=4", ["'.r=4'", "key=value"]),
    ("train {good} r=[1", ["r=[1", "YAML"]),
    ("train {good} --resume stray", ["'stray'", "key=value"]),
    ("train {good} method=lorra", ["lorra", "'lora'"]),
    ("train {good} method=[lora,lora]", ["two jobs are named lora"]),
    ("train {good} jobs=3", ["jobs must be a list"]),
    ("train {good} early_stopping_patience=2", ["early_stopping_patience needs eval_steps"]),
    ("train {good} max_length=4000", ["max_length 4000", "256"]),
    ("train {good} eval_size=24", ["24"]),
    ("train {good} eval_data=nowhere.jsonl", ["no data file at nowhere.jsonl"]),
    ("train {good} chat_template='{{{{bad'", ["chat template"]),
    ("train {good} columns={{prompt:nothing}}", ["prompt"]),
    ("train {good} data_format=alpacca", ["alpacca", "alpaca"]),
    ("train nowhere.yaml", ["no configuration file at nowhere.yaml"]),
    ("train {yaml}", ["bad.yaml is not valid YAML", "line"]),
    ("train {twice}", ["'seed' stands twice", "line 2"]),
    ("train {list}", ["list.yaml must hold", "list"]),
    ("train {void}", ["void.yaml must hold", "nothing"]),
    ("train {data}", ["train.jsonl"]),
    ("train", ["nothing to train"]),
    ("train --data {data} --method lora", ["'model' is missing"]),
    ("train --model {model} --method lora", ["'data' is missing"]),
    ("train --model {model} --data {data}", ["no method", "lora"]),
    ("train --model nowhere --data {data} --method lora", ["no model at 'nowhere'"]),
    ("train --model ./nowhere --data {data} --method lora", ["no model at './nowhere'"]),
    ("train --model {cut} --data {data} --method lora", ["broken-model", "cannot be loaded"]),
    ("train --model {badjson} --data {data} --method lora", ["bad-json-model", "cannot be loaded"]),
    ("train --model {odd} --data {data} --method lora", ["odd-model", "cannot be loaded", "attention heads"]),
    ("train --model {shallow} --data {data} --method lora", ["shallow-model", "lacks 9", "layers.2"]),
    ("train --model {wide} --data {data} --method lora", ["wide-model", "(32, 64)", "(32, 80)"]),
    ("train --model {notok} --data {data} --method lora", ["tokenizer", "no-tokenizer"]),
    ("train --model {model} --data nowhere.jsonl --method lora", ["no data file at nowhere.jsonl"]),
    ("train --model {model} --data {empty} --method lora", ["empty.jsonl"]),
    ("train --model {model} --data {fields} --method lora", ["fields.jsonl:2", "output"]),
    ("train --model {model} --data {broken} --method lora", ["broken.jsonl:1"]),
    ("train --model {model} --data {long} --method lora", ["long.jsonl:1", "256"]),
    ("train --model {model} --data {nearly} --method prefix_tuning", ["nearly.jsonl:1", "max_length: 236"]),
    (TRAIN + " target_modules=[q_prj]", ["q_prj", "q_proj", "down_proj"]),
    (TRAIN + " target_modules=[q_proj,v_porj]", ["v_porj", "v_proj"]),
    (TRAIN + " layers_to_transform=[0,99]", ["no layer 99", "0 to 1"]),
    (TRAIN + " r=true", ["r: expected a whole number, not true"]),
    (TRAIN + " batch_size=true", ["batch_size: expected a whole number, not true"]),
    (TRAIN + " eval_size=true", ["eval_size: expected a whole number, not true"]),
    (TRAIN + " learning_rate=.inf", ["learning_rate", "finite"]),
    (TRAIN + " target_modules=(", ["target_modules", "regular expression"]),
    (TRAIN + " --device cuda", ["No such option", "--device"]),
    (TRAIN + " device=cuda:7", ["device 'cuda:7' is not there"]),
    (TRAIN + " device=tpu", ["device 'tpu'"]),
    (TRAIN + " --output-dir {occupied}", ["occupied.txt", "file"]),
    (TRAIN + " --output-dir {occupied}/deeper", ["occupied.txt", "file"]),
    (TRAIN + " --output-dir {model}", ["is no run's folder", "left alone"]),
    (TRAIN + " --output-dir {model} --overwrite-output-dir", ["is no run's folder", "left alone"]),
    (TRAIN + " --output-dir {model} --resume", ["is no run's folder", "left alone"]),
    ("train {model} --resume", ["without a run.json"]),
    ("train --model {model} --data {data} --method bitfit add_missing=no", ["no bias", "add_missing"]),
    ("chat nowhere", ["no model at 'nowhere'"]),
    ("chat {occupied}", ["occupied.txt"]),
    ("generate {model}", ["--prompt"]),
    ("generate {model} --prompt a --adapter lora", ["no adapter named 'lora'"]),
    ("generate {model} --prompt a --max-new-tokens 999", ["256", "999"]),
    ("generate {model} --input {empty}", ["empty.jsonl"]),
    ("generate {model} --input nowhere.txt", ["nowhere.txt"]),
    ("generate {model} --prompt a --temperature=-1", ["temperature"]),
    ("generate {model} --prompt a --output no/such/file.jsonl", ["no folder"]),
    ("generate {model} --prompt a --device cuda:9", ["device 'cuda:9' is not there"]),
    ("generat x", ["no verb 'generat'", "'generate'"]),
    ("train --bogus", ["No such option", "--bogus"]),
]


@pytest.mark.parametrize(("line", "expected"), CASES, ids=[line for line, _ in CASES])
def test_message(weft: Callable[..., Any], place: dict[str, Path], line: str, expected: list[str]) -> None:
    words = [word.format(**place) for word in line.split()]
    result = weft(*words)
    print(result.err)
    assert result.code == 2
    for part in expected:
        assert part in result.err
    assert "Traceback" not in result.err
    assert result.err.startswith("error: ")
    assert result.err.count("error: ") == 1
    assert result.out == ""
    assert list(Path.cwd().iterdir()) == []


def test_json_says_it_on_stdout_too(weft: Callable[..., Any]) -> None:
    result = weft("train", "nowhere.yaml", "--json")
    assert result.code == 2
    assert json.loads(result.out) == {"error": "no configuration file at nowhere.yaml."}
    assert result.err == "error: no configuration file at nowhere.yaml.\n"


def test_several_faults_in_one_message(weft: Callable[..., Any], place: dict[str, Path]) -> None:
    result = weft("train", place["good"], "epochs=-1", "batch_size=x")
    assert "epochs" in result.err
    assert "batch_size" in result.err


def test_a_run_is_not_overwritten(weft: Callable[..., Any], place: dict[str, Path], run_dir: Path) -> None:
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    result = weft("train", place["good"], "--output-dir", run_dir)
    assert result.code == 2
    assert "already holds a run" in result.err
    result = weft("train", place["good"], "--output-dir", run_dir, "--resume")
    assert result.code == 2
    assert "the configuration has changed" in result.err
    assert weft("train", run_dir).code == 2
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    ("file", "content", "expected"),
    [
        ("run.json", "{oops", "run.json is not valid JSON"),
        ("run.json", "{}", "holds no configuration"),
        ("run.json", '{"config": {"model": 3}}', "run.json"),
        ("adapters/lora/adapter_config.json", "{oops", "adapter_config.json is not valid JSON"),
        ("adapters/lora/adapter_model.safetensors", "short", "cannot be read as safetensors"),
        ("adapters/lora/weft.json", '{"method": "lora", "config": {"r": "x"}}', "cannot be used"),
        ("adapters/lora/weft.json", '{"method": "lora", "config": {"r": 2}}', "disagree"),
    ],
)
def test_damaged_run(
    weft: Callable[..., Any], run_dir: Path, tmp_path: Path, file: str, content: str, expected: str
) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir, copy)
    (copy / file).write_text(content, encoding="utf-8")
    result = weft("generate", copy, "--prompt", "a")
    assert result.code == 2, result.err
    assert expected in result.err
    assert "Traceback" not in result.err


def test_adapter_of_unknown_kind(weft: Callable[..., Any], run_dir: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(run_dir / "adapters" / "lora", copy)
    (copy / "weft.json").unlink()
    config = json.loads((copy / "adapter_config.json").read_text())
    (copy / "adapter_config.json").write_text(json.dumps({**config, "peft_type": "NEW"}))
    result = weft("chat", copy)
    assert result.code == 2
    assert "'NEW'" in result.err
    (copy / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": None}))
    result = weft("chat", copy)
    assert result.code == 2
    assert "--model" in result.err


def test_another_base_than_the_one_trained_on(
    weft: Callable[..., Any], run_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    other = tmp_path / "other"
    shutil.copytree(tiny_llama_dir, other)
    tensors = load_file(other / "model.safetensors")
    changed = {key: value + 0.5 if value.dim() == 1 else value for key, value in tensors.items()}
    save_file(changed, other / "model.safetensors", {"format": "pt"})
    run = tmp_path / "run"
    shutil.copytree(run_dir, run)
    stored = json.loads((run / "run.json").read_text())
    stored["base"]["model"] = str(other)
    (run / "run.json").write_text(json.dumps(stored))
    result = weft("generate", run, "--prompt", "a")
    assert result.code == 2
    assert "its tensors have changed" in result.err
    assert weft("generate", run, "--prompt", "a", "--model", other, "--max-new-tokens", 2).code == 0


def test_a_defect_is_exit_1_and_its_traceback_needs_debug(
    weft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*args: object) -> None:
        raise AssertionError("inside")

    monkeypatch.setattr(sys.modules["weft.cli.train"], "settings_of", broken)
    result = weft("train")
    assert result.code == 1
    assert "defect" in result.err
    assert "Traceback" not in result.err
    assert "Traceback" in weft("train", "--debug").err


def test_no_word_is_cut_at_the_edge_of_a_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    from weft.cli.common import folded

    path = "/a/long-named/" + "folder/" * 12 + "train.jsonl"
    text = (
        f"2 records cannot be used:\n  {path}:3: 'output' must be a string, found int 5; write such a value in quotes"
    )
    assert folded(text) == text  # a pipe gets the lines as they are
    monkeypatch.setenv("COLUMNS", "80")
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True)
    lines = folded(text).split("\n")
    assert " ".join(line.strip() for line in lines) == " ".join(line.strip() for line in text.split("\n"))
    assert all(len(line) <= 80 or path in line for line in lines)
    assert all(line.startswith("  ") for line in lines[1:])
