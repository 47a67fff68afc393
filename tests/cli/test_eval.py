"""``weft eval``: tasks by name and by file, tables and JSON, and what is refused."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

TASK = """
name: mine
kind: generation
data: mine.jsonl
prompt: "{{ question }}"
reference: "{{ answer }}"
max_new_tokens: 4
metrics: [exact_match, f1]
"""
ROWS = [{"question": f"What comes after {n}?", "answer": str(n + 1)} for n in range(5)]


@pytest.fixture
def mine() -> Callable[..., Path]:
    """Writes a task of one's own, with its data, into the working directory."""

    def make(text: str = TASK, rows: Any = ROWS) -> Path:
        Path("mine.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
        path = Path("mine.yaml")
        path.write_text(text)
        return path

    return make


def test_the_base_and_all_adapters_are_in_the_table_and_the_folder(
    weft: Callable[..., Any], run_dir: Path, mine: Callable[..., Path]
) -> None:
    mine()
    result = weft(
        "eval", run_dir, "--tasks", "mine.yaml,embedded", "--limit", 4, "--max-new-tokens", 4, "--output", "out"
    )
    assert result.code == 0, result.err
    heading, second, *lines = result.out.splitlines()
    assert heading.split() == ["mine", "(n=4)", "mine", "(n=4)", "embedded", "(n=4)"]
    assert second.split() == ["contestant", "exact_match", "f1", "exact_match"]
    assert [line.split()[0] for line in lines] == ["base", "lora", "prefix_tuning"]
    assert all(line.count("±") == 3 for line in lines)
    assert "24 answers -> out" in result.err
    from weft.evaluate.results import Results

    read = Results.read(Path("out"))
    assert [one.name for one in read.contestants] == ["base", "lora", "prefix_tuning"]
    assert [(one.name, one.kind, one.metric) for one in read.tasks] == [
        ("mine", "generation", "exact_match"), ("embedded", "generation", "exact_match")
    ]  # fmt: skip
    assert len(read.items) == 24


def test_json_and_the_folder_of_the_run(weft: Callable[..., Any], run_dir: Path, mine: Callable[..., Path]) -> None:
    mine()
    words = ["eval", run_dir, "--tasks", "mine.yaml", "--adapter", "lora", "--adapter", "base", "--json"]
    result = weft(*words)
    assert result.code == 0, result.err
    told = json.loads(result.out)
    assert [(one["contestant"], one["metric"], one["n"]) for one in told["scores"]] == [
        (name, metric, 5) for name in ("lora", "base") for metric in ("exact_match", "f1")
    ]  # fmt: skip
    assert (run_dir / "evaluation" / "mine-by=lora+base" / "summary.json").is_file()
    assert json.loads(weft(*words).out)["facts"]["tokens_written"] == 0  # all was kept


def test_a_plain_model_without_a_folder(weft: Callable[..., Any], mine: Callable[..., Path]) -> None:
    mine()
    result = weft("eval", "tiny-llama", "--tasks", "mine.yaml", "--limit", 1)
    assert result.code == 0, result.err
    assert "--output FOLDER" in result.err
    assert sorted(path.name for path in Path().iterdir()) == ["mine.jsonl", "mine.yaml"]


def test_classes_of_an_adapter_are_scored(
    weft: Callable[..., Any], tiny_llama_dir: Path, mine: Callable[..., Path]
) -> None:
    rows = [{"text": f"film {n} was {word}", "label": label}
            for n in range(8) for word, label in (("good", "yes"), ("bad", "no"))]  # fmt: skip
    mine("name: films\nkind: classification\ndata: mine.jsonl\nmetrics: [accuracy, macro_f1, mcc]\n", rows)
    trained = weft("train", f"model={tiny_llama_dir}", "data=mine.jsonl", "task=sequence_classification",
                   "method=lora", "steps=4", "output_dir=run")  # fmt: skip
    assert trained.code == 0, trained.err
    result = weft("eval", "run", "--tasks", "mine.yaml", "--json")
    assert result.code == 0, result.err
    assert "'base' does not answer task films: a base names no classes" in result.err
    told = json.loads(result.out)
    asked = weft("generate", "run", "--input", "mine.jsonl", "--json")
    theirs = json.loads(asked.out)["scores"]["lora"]
    figures = {one["metric"]: one["value"] for one in told["scores"]}
    assert figures == pytest.approx({key: theirs[key] for key in ("accuracy", "macro_f1", "mcc")})
    confusion = told["facts"]["details"]["films"]["lora"]["confusion"]
    assert confusion["classes"] == ["no", "yes"]
    assert [sum(row) for row in confusion["counts"]] == [8, 8]


@pytest.mark.parametrize(("words", "said"), [
    (["--tasks", "embeded"], "Did you mean 'embedded'"),
    (["--tasks", "nowhere.yaml"], "there is no task file nowhere.yaml"),
    (["--tasks", "gsm8k"], "task gsm8k has no data of its own"),
    (["--tasks", "gsm8k=nowhere"], "task gsm8k: there is no file or folder nowhere"),
    (["--tasks", "gsm8k=mine.jsonl"], "5 examples are to stand before each question"),
    (["--tasks", "mine.yaml", "--adapter", "lora", "--adapter", "lorra"], "has no adapter 'lorra'"),
    (["--tasks", "mine.yaml", "--quantization", "nf5"], "Did you mean 'nf4'"),
    (["--tasks", "mine.yaml", "--output", "mine.yaml"], "is no folder"),
    (["--tasks", "mine.yaml", "--limit", "0"], "greater than or equal to 1"),
])  # fmt: skip
def test_what_cannot_be_used_is_named(
    words: list[str], said: str, weft: Callable[..., Any], run_dir: Path, mine: Callable[..., Path]
) -> None:
    mine()
    result = weft("eval", run_dir, *words)
    assert result.code == 2
    assert said in " ".join(result.err.split())
    assert "Traceback" not in result.err
    assert not (run_dir / "evaluation" / "gsm8k").exists()


def test_a_task_without_answers_is_refused_before_the_model_is_loaded(
    weft: Callable[..., Any], run_dir: Path, mine: Callable[..., Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    mine(rows=[*ROWS, {"question": "And now?", "answer": None}])

    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("the model was loaded")

    monkeypatch.setattr("weft.generation.open.open_target", no_model)
    result = weft("eval", run_dir, "--tasks", "mine.yaml")
    assert result.code == 2
    assert "mine.jsonl:6: the record has no answer" in result.err


def test_a_warning_for_an_adapter_that_changes_nothing(
    weft: Callable[..., Any], tiny_llama_dir: Path, mine: Callable[..., Path], tmp_path: Path
) -> None:
    from weft.api import Adapters, LoraConfig, load_base

    mine()
    base = load_base(str(tiny_llama_dir))
    adapters = Adapters(base.model, base.architecture)
    adapters.add("idle", LoraConfig(r=2))
    adapters.save("idle", tmp_path / "idle")
    adapters.close()
    result = weft("eval", tmp_path / "idle", "--model", tiny_llama_dir, "--tasks", "mine.yaml")
    assert result.code == 0, result.err
    assert "warning: 'idle' changes nothing" in result.err
