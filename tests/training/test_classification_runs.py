"""Whole classification runs, from the configuration to the label that the command line answers."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, ClassVar

import pytest
from tests.kit.encoders import save_bert, write_reviews

from weft.data import load_labelled
from weft.errors import UserError
from weft.evaluate import predict
from weft.files.adapter_folder import METHODS
from weft.generation import Request, generate
from weft.generation.open import open_target
from weft.methods import LoraConfig
from weft.training import make_config
from weft.training.run import train


@pytest.fixture(scope="module")
def bert(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_bert(tmp_path_factory.mktemp("models") / "bert", hidden_size=128)


@pytest.fixture(scope="module")
def reviews(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    folder = tmp_path_factory.mktemp("reviews")
    return {"data": str(write_reviews(folder / "train.tsv", 320)),
            "eval_data": str(write_reviews(folder / "dev.tsv", 80, seed=1))}  # fmt: skip


@pytest.fixture
def bases(bert: Path, tiny_llama_dir: Path) -> dict[str, Path]:
    return {"bert": bert, "llama": tiny_llama_dir}


JOBS: list[dict[str, Any]] = [
    {"method": "lora", "learning_rate": 2e-3},
    {"method": "bitfit", "add_missing": True, "learning_rate": 1e-2},
    {"method": "prefix_tuning", "num_virtual_tokens": 8, "learning_rate": 0.1},
]


def settings(base: Path, reviews: dict[str, str], folder: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(base), **reviews, "task": "sequence_classification", "output_dir": str(folder), "jobs": JOBS,
            "epochs": 14, "batch_size": 16, "eval_steps": 70, "threads": 1, "warmup_ratio": 0.1, **more}  # fmt: skip


def evaluations(folder: Path, job: str) -> list[dict[str, Any]]:
    events = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    told = [event for event in events if event["event"] == "eval" and event["job"] == job]
    return [{key: value for key, value in event.items() if key != "time"} for event in told]


@pytest.mark.parametrize("kind", ["bert", pytest.param("llama", marks=pytest.mark.slow)])
def test_a_run_learns_and_its_folder_answers(
    kind: str, bases: dict[str, Path], reviews: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from weft.cli.main import main

    folder, config = tmp_path / "run", tmp_path / "run.yaml"
    config.write_text(json.dumps(settings(bases[kind], reviews, folder)))
    assert main(["train", str(config)]) == 0
    said = capsys.readouterr()
    assert "accuracy majority" in " ".join(said.out.split())
    assert f"weft generate {folder} --prompt" in said.out
    assert "majority=0." in said.err
    opened = open_target(folder)
    samples, names = load_labelled(reviews["eval_data"], opened.renderer, encoder=kind == "bert")
    for job in JOBS:
        name = job["method"]
        told = evaluations(folder, name)
        print(f"[measured] {kind} {name}: accuracy {told[0]['eval_accuracy']} -> {told[-1]['eval_accuracy']}, "
              f"majority {told[-1]['eval_majority']}")  # fmt: skip
        assert {"eval_loss", "eval_accuracy", "eval_majority", "eval_f1", "eval_mcc"} <= told[0].keys()
        assert told[-1]["eval_accuracy"] > told[-1]["eval_majority"] + 0.1
        assert told[-1]["eval_loss"] < told[0]["eval_loss"]
        found = predict(opened.adapters, name, samples)
        right = sum(label == sample.label for label, sample in zip(found.labels, samples, strict=True))
        assert right / len(samples) == told[-1]["eval_accuracy"]
        assert found.names == names == ("0", "1")
    opened.close()
    capsys.readouterr()
    words = ["--prompt", "the film is quite lovely", "--prompt", "its music is stale", "--adapter", "lora"]
    assert main(["generate", str(folder), *words, "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["results"]
    assert [row["text"] for row in rows] == ["1", "0"]
    assert rows[0]["probabilities"]["1"] > 0.5
    assert main(["generate", str(folder), "--prompt", "a dull film", "--all-adapters"]) == 0
    assert "[lora] 0" in capsys.readouterr().out


def test_a_stopped_run_answers_and_ends_as_the_unbroken_one(
    bert: Path, reviews: dict[str, str], tmp_path: Path
) -> None:
    """Bit for bit, heads and evaluations too."""
    # The prefix gains nothing in so few steps, and would have failed had it to keep its best.
    jobs = [{**job, "early_stopping_patience": 4} for job in JOBS[:2]] + JOBS[2:]
    given = {"epochs": 2, "eval_steps": 5, "labels": [0, 1], "jobs": jobs}
    whole = make_config(settings(bert, reviews, tmp_path / "whole", **given))
    assert train(whole).completed
    broken = make_config(settings(bert, reviews, tmp_path / "broken", **given))
    seen: list[Any] = []
    first = train(broken, on_event=seen.append, should_stop=lambda: len(seen) > 12)
    assert not first.completed
    opened = open_target(tmp_path / "broken")
    assert "not finished" in opened.notes[-1]
    assert predict(opened.adapters, "lora", []).names == ("0", "1")
    opened.close()
    second = train(broken.model_copy(update={"resume": True}))
    assert second.completed
    for job in JOBS:
        name = job["method"]
        files = [tmp_path / run / "adapters" / name / "adapter_model.safetensors" for run in ("whole", "broken")]
        assert files[0].read_bytes() == files[1].read_bytes()
        assert evaluations(tmp_path / "whole", name) == evaluations(tmp_path / "broken", name)
        assert second.jobs[name]["metrics"]["accuracy"] == evaluations(tmp_path / "whole", name)[-1]["eval_accuracy"]


def test_other_labels_are_other_data(bert: Path, reviews: dict[str, str], tmp_path: Path) -> None:
    data = tmp_path / "data.tsv"
    data.write_text(Path(reviews["data"]).read_text())
    config = make_config(settings(bert, {"data": str(data)}, tmp_path / "run", steps=6, jobs=JOBS[:1]))
    seen: list[Any] = []
    assert not train(config, on_event=seen.append, should_stop=lambda: len(seen) > 0).completed
    data.write_text("".join(f"{line[:-1]}{1 - int(line[-1])}\n" for line in data.read_text().splitlines()))
    with pytest.raises(UserError, match="the data of job 'lora'"):
        train(config.model_copy(update={"resume": True}))


def test_a_decoder_carries_both_tasks(
    tiny_llama_dir: Path, tiny_data: Path, reviews: dict[str, str], tmp_path: Path
) -> None:
    """Each job with its task and its data; the one that writes still writes, the one that classifies names a class."""
    from weft.cli.main import main

    jobs = [
        {"name": "writes", "method": "lora", "data": str(tiny_data), "eval_size": 4},
        {"name": "sorts", "method": "lora", "task": "sequence_classification", **reviews},
    ]
    del jobs[0]["eval_size"]
    config = make_config({"model": str(tiny_llama_dir), "data": str(tiny_data), "eval_size": 4, "jobs": jobs,
                          "steps": 4, "output_dir": str(tmp_path / "run"), "threads": 1})  # fmt: skip
    result = train(config)
    assert result.jobs["writes"]["metrics"] == {}
    assert result.jobs["sorts"]["metrics"]["majority"] > 0.5
    run = str(tmp_path / "run")
    assert main(["generate", run, "--prompt", "What comes after one?", "--all-adapters", "--max-new-tokens", "3"]) == 0
    opened = open_target(run)
    with pytest.raises(UserError, match="'sorts' was trained to classify"):
        generate(opened.adapters, [Request([5], "sorts")], stop_ids=())


def test_pairs_are_encoded_as_the_tokenizer_does(bert: Path, tmp_path: Path) -> None:
    rows = [{"premise": "a fine film", "hypothesis": f"the film is {w}", "label": w} for w in ("dull", "lovely")] * 6
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    folder = tmp_path / "run"
    train(make_config({"model": str(bert), "data": str(data), "method": "lora", "task": "sequence_classification",
                       "steps": 3, "output_dir": str(folder), "threads": 1}))  # fmt: skip
    opened = open_target(folder)
    sample = opened.queries(["a fine film\tthe film is dull"], "lora")[0].prompt
    (read, *_), names = load_labelled(data, opened.renderer, encoder=True)
    assert names == ("dull", "lovely")
    assert (sample.input_ids, sample.token_types) == (read.input_ids, read.token_types)
    assert any(sample.token_types)
    with pytest.raises(UserError, match="3 texts with tabs"):
        opened.queries(["a\tb\tc"], "lora")
    opened.close()


class _Writer(LoraConfig):
    method: ClassVar[str] = "writer"
    tasks: ClassVar[frozenset[str]] = frozenset({"causal_lm"})


REFUSED: dict[str, tuple[dict[str, Any], str]] = {
    "an encoder that is to write": ({"task": "causal_lm"}, "is an encoder .bert. and writes no text"),
    "labels without the task": ({"task": "causal_lm", "labels": ["a", "b"]}, "labels is for classification"),
    "a method that cannot": ({"jobs": [{"method": "writer"}]}, "method writer is not for that; it is for causal_lm"),
    "such a method among others": ({"jobs": [{"method": "bitfit+writer"}]}, "method writer is not for that"),
    "switches for labels": ({"labels": [False, True]}, "put the labels in quotes"),
    "one label": ({"labels": ["a"]}, "two names or more"),
    "labels that are not the data's": ({"labels": ["good", "bad"]}, "the label '.' is none of the labels good, bad"),
    "no such column": ({"text_columns": ["review"]}, "there is no column 'review'"),
    "an unknown task": ({"task": "seq_cls"}, "causal_lm"),
}


@pytest.mark.parametrize("what", REFUSED)
def test_what_cannot_work_is_refused_before_anything_is_written(
    what: str, bert: Path, reviews: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "writer", _Writer)
    change, message = REFUSED[what]
    with pytest.raises(UserError, match=message):
        train(make_config({**settings(bert, reviews, tmp_path / "run"), **change}))
    assert not (tmp_path / "run").exists()


def test_a_chat_with_an_encoder_is_refused(bert: Path, capsys: pytest.CaptureFixture[str]) -> None:
    from weft.cli.main import main

    assert main(["generate", str(bert), "--prompt", "hello"]) == 2
    assert "is an encoder: it writes no text" in capsys.readouterr().err


def sst2(folder: Path) -> tuple[Path, dict[str, str]]:
    """A random BERT whose tokenizer knows SST-2's words, and the data."""
    shared = Path(os.environ.get("WEFT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data")) / "nlu" / "SST-2"
    if not shared.is_dir():
        pytest.skip(f"needs the shared data: {shared} is absent")
    lines = (shared / "train.tsv").read_text(encoding="utf-8").splitlines()
    texts = [line.rpartition("\t")[0] for line in lines]
    base = save_bert(folder / "bert", texts, vocabulary=4000, hidden_size=128, intermediate_size=256)
    return base, {"data": str(shared / "train.tsv"), "eval_data": str(shared / "dev.tsv")}


def test_real_data_runs_end_to_end(tmp_path: Path) -> None:
    base, data = sst2(tmp_path)
    result = train(make_config(settings(base, data, tmp_path / "run", steps=3, limit=60)))
    assert result.completed
    assert all(0.5 <= result.jobs[job["method"]]["metrics"]["majority"] <= 0.7 for job in JOBS)


@pytest.mark.slow
def test_real_data_is_learned_by_a_random_bert(tmp_path: Path) -> None:
    """Better than the majority class with every method; nothing here is pre-trained, so not by much."""
    base, data = sst2(tmp_path)
    rates = {"adalora": 4e-3, "bitfit": 1e-2, "p_tuning_v2": 3e-2}
    jobs = [{"method": method, "learning_rate": rate} for method, rate in rates.items()]
    more = {"epochs": 4, "limit": 2000, "batch_size": 32, "eval_steps": 126, "jobs": jobs}
    result = train(make_config(settings(base, data, tmp_path / "run", **more)))
    for name in rates:
        found = result.jobs[name]["metrics"]
        print(f"[measured] SST-2 on a random BERT, {name}: {found}")
        assert found["accuracy"] > found["majority"] + 0.03, name
