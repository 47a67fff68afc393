"""``weft generate``: prompts and adapters in one batch."""

from __future__ import annotations

import errno
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_one_answer_is_only_its_text(weft: Callable[..., Any], run_dir: Path) -> None:
    result = weft("generate", run_dir, "--prompt", "What comes after one?", "--max-new-tokens", 4)
    assert result.code == 0, result.err
    assert "lora answers; also there: prefix_tuning" in result.err
    assert "[lora]" not in result.out


def test_all_adapters_and_json(weft: Callable[..., Any], run_dir: Path) -> None:
    result = weft("generate", run_dir, "--prompt", "one", "--prompt", "two", "--all-adapters", "--json",
                  "--max-new-tokens", 4)  # fmt: skip
    rows = json.loads(result.out)["results"]
    assert [(row["prompt"], row["adapter"]) for row in rows] == [
        ("one", "lora"), ("one", "prefix_tuning"), ("two", "lora"), ("two", "prefix_tuning")
    ]  # fmt: skip
    # A row does not depend on what else is in the batch.
    for row in rows:
        alone = weft("generate", run_dir, "--prompt", row["prompt"], "--adapter", row["adapter"], "--json",
                     "--max-new-tokens", 4)  # fmt: skip
        assert json.loads(alone.out)["results"] == [{**row, "index": 0}]


def test_the_prompt_is_the_one_of_training(weft: Callable[..., Any], run_dir: Path, tiny_llama_dir: Path) -> None:
    from weft.generation.open import open_target

    opened = open_target(run_dir, adapters=["lora"])
    assert opened.names == ("lora",)
    text = opened.renderer.tokenizer.decode(opened.prompt_ids("Hi"))
    assert text == "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    assert opened.renderer.tokenizer.eos_token_id in opened.stop_ids
    assert opened.prompt_ids("Hi", raw=True) == opened.renderer.tokenizer("Hi")["input_ids"]
    opened.close()


def test_input_files(weft: Callable[..., Any], run_dir: Path, tiny_data: Path) -> None:
    Path("lines.txt").write_text("one\n\nzwei 中\n", encoding="utf-8")
    rows = [
        {"prompt": "p"},
        {"instruction": "i", "input": "more", "output": "left out"},
        {"messages": [{"role": "user", "content": "m"}, {"role": "assistant", "content": "left out"}]},
    ]
    Path("rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    result = weft("generate", run_dir, "--input", "lines.txt", "--output", "out.jsonl", "--max-new-tokens", 2)
    assert result.code == 0, result.err
    assert result.out == ""
    written = [json.loads(line) for line in Path("out.jsonl").read_text(encoding="utf-8").splitlines()]
    assert [row["prompt"] for row in written] == ["one", "zwei 中"]
    assert weft("generate", run_dir, "--input", "lines.txt", "--output", "out.jsonl").code == 2
    result = weft("generate", run_dir, "--input", "rows.jsonl", "--json", "--max-new-tokens", 2)
    assert [row["prompt"] for row in json.loads(result.out)["results"]] == [
        "p", "i\nmore", [{"role": "user", "content": "m"}]
    ]  # fmt: skip
    Path("bad.jsonl").write_text('{"prompt": "p"}\n{"reply": "r"}\n', encoding="utf-8")
    Path("number.jsonl").write_text('{"prompt": 5}\n', encoding="utf-8")
    assert "number.jsonl:1: prompt is 5; expected text" in weft("generate", run_dir, "--input", "number.jsonl").err
    assert "bad.jsonl:2: no prompt" in weft("generate", run_dir, "--input", "bad.jsonl").err


def test_adapter_folder_inside_a_run_keeps_the_runs_template(weft: Callable[..., Any], run_dir: Path) -> None:
    whole = weft("generate", run_dir, "--prompt", "one", "--adapter", "prefix_tuning", "--max-new-tokens", 4)
    alone = weft("generate", run_dir / "adapters" / "prefix_tuning", "--prompt", "one", "--max-new-tokens", 4)
    assert whole.out == alone.out


def test_a_reader_that_leaves_is_no_defect(weft: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def leave(*args: object, **kwargs: object) -> None:
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")

    monkeypatch.setattr(sys.modules["weft.cli.generate"], "_check", leave)
    with monkeypatch.context() as patch:  # the parser replaces both streams by ones that keep quiet
        patch.setattr(sys, "stdout", sys.stdout)
        patch.setattr(sys, "stderr", sys.stderr)
        result = weft("generate", "x")
    assert result.code == 141
    assert "defect" not in result.err


def test_sampling_is_seeded(weft: Callable[..., Any], tiny_bloom_dir: Path) -> None:
    words = (
        "generate",
        tiny_bloom_dir,
        "--prompt",
        "one",
        "--temperature",
        2,
        "--max-new-tokens",
        8,
        "--json",
        "--raw",
    )
    texts = [weft(*words, "--seed", seed).out for seed in (1, 1, 2)]
    assert texts[0] == texts[1] != texts[2]


def test_top_p_0_is_the_likeliest_token(weft: Callable[..., Any], run_dir: Path) -> None:
    asked = ["generate", run_dir, "--prompt", "one", "--max-new-tokens", 3, "--json"]
    drawn = weft(*asked, "--temperature", 1, "--top-p", 0)
    assert drawn.code == 0, drawn.err
    assert json.loads(drawn.out) == json.loads(weft(*asked).out)


@pytest.mark.parametrize("extra", [["--output", ".", "--overwrite"], ["--temperature", 1, "--seed", 2**63]])
def test_unusable_options(weft: Callable[..., Any], run_dir: Path, extra: list[Any]) -> None:
    result = weft("generate", run_dir, "--prompt", "one", "--max-new-tokens", 2, *extra)
    assert result.code == 2, result.err


def test_another_chat_template(weft: Callable[..., Any], run_dir: Path) -> None:
    words = ["generate", run_dir, "--prompt", "one", "--max-new-tokens", 1, "--json"]
    plain = json.loads(weft(*words).out)["results"][0]["prompt_tokens"]
    Path("bare.jinja").write_text("{{ messages[0].content }}")
    for given in ("bare.jinja", "{{ messages[0].content }}"):
        result = weft(*words, "--chat-template", given)
        assert result.code == 0, result.err
        assert json.loads(result.out)["results"][0]["prompt_tokens"] < plain
        assert "the chat template given is not the one of training" in result.err
    result = weft(*words, "--chat-template", "nowhere.jinja")
    assert result.code != 0
    assert "chat_template: nowhere.jinja cannot be read" in result.err


@pytest.mark.parametrize("part", ["", "adapters/lora"])
def test_another_base_is_named_with_both_names_and_hashes(
    weft: Callable[..., Any], run_dir: Path, tiny_llama_dir: Path, tmp_path: Path, part: str
) -> None:
    from safetensors.torch import load_file, save_file

    moved, other = tmp_path / "moved", tmp_path / "other"
    shutil.copytree(run_dir, moved)
    shutil.copytree(tiny_llama_dir, other)
    tensors = load_file(other / "model.safetensors")
    tensors["model.norm.weight"] += 1
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    trained = json.loads((moved / "run.json").read_text())["base"]
    result = weft("generate", moved / part, "--prompt", "x", "--max-new-tokens", 2, "--model", other)
    assert result.code == 0, result.err
    for told in (str(other), str(tiny_llama_dir), trained["sha256_of_small_tensors"][:12], "instead of"):
        assert told in result.err
    # A base of another shape: the adapter does not fit, and the message says why.
    result = weft("generate", moved / part, "--prompt", "x", "--model", "tiny-bloom")
    assert result.code == 2
    for told in ("tiny-bloom", str(tiny_llama_dir), trained["sha256_of_small_tensors"][:12], "instead of"):
        assert told in result.err
    assert re.search(r"error: (\S+, on \S+: )?this is not the base of its training \(here ", result.err), (
        "the cause first"
    )


@pytest.fixture(scope="module")
def asked(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of a writer, whose columns are named, and a classifier, whose table has no header row."""
    from weft.cli.main import main

    folder = tmp_path_factory.mktemp("asked")
    rows = [{"title": f"T{n}", "ask me": f"What is {n}?", "said": f"It is {n}."} for n in range(4)]
    (folder / "write.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    texts = ["a fine film", "a dull one", "so slow and odd", "warm and true", "the plot is gone"]
    marks = "".join(f"gj04\t{n % 2}\t{'*' if n % 2 else ''}\t{text}\n" for n, text in enumerate(texts))
    (folder / "cola.tsv").write_text(marks)
    jobs = [
        {"name": "writer", "method": "lora", "data": [
            {"path": str(folder / "write.jsonl"), "columns": {"prompt": "{title}: {ask me}", "completion": "said"}}]},
        {"name": "judge", "method": "lora", "task": "sequence_classification", "data": str(folder / "cola.tsv"),
         "eval_data": str(folder / "cola.tsv")},
    ]  # fmt: skip
    config = {"model": str(tiny_llama_dir), "jobs": jobs, "steps": 2, "output_dir": str(folder / "run"),
              "logging_steps": 1}  # fmt: skip
    (folder / "run.yaml").write_text(json.dumps(config))
    assert main(["train", str(folder / "run.yaml"), "--quiet"]) == 0
    return folder


def test_what_was_evaluated_on_can_be_asked(weft: Callable[..., Any], asked: Path) -> None:
    """The figures are those of the last evaluation, for the file is read as training read it."""
    events = [json.loads(line) for line in (asked / "run" / "metrics.jsonl").read_text().splitlines()]
    last = [event for event in events if event["event"] == "eval" and event["job"] == "judge"][-1]
    for target in (asked / "run", asked / "run" / "adapters" / "judge"):
        result = weft("generate", target, "--adapter", "judge", "--input", asked / "cola.tsv", "--json")
        told = json.loads(result.out)
        assert told["scores"]["judge"] == {
            **{key: last[f"eval_{key}"] for key in ("accuracy", "majority", "macro_f1", "f1", "mcc")},
            "records": 5,
        }
        assert [row["label"] for row in told["results"]] == ["0", "1", "0", "1", "0"]
    shown = weft("generate", asked / "run", "--adapter", "judge", "--input", asked / "cola.tsv")
    told = f"judge: accuracy {last['eval_accuracy']:.4f}, macro-F1 {last['eval_macro_f1']:.4f}, MCC "
    assert told in shown.out.splitlines()[-1]


def test_the_questions_are_read_as_in_training(weft: Callable[..., Any], asked: Path) -> None:
    Path("others.jsonl").write_text('{"title": "T", "ask me": "Who?"}\n')
    Path("alpaca.jsonl").write_text('{"instruction": "i", "input": "more", "output": "left out"}\n')
    for file, prompts in (
        (asked / "write.jsonl", [f"T{n}: What is {n}?" for n in range(4)]),
        ("others.jsonl", ["T: Who?"]),
        ("alpaca.jsonl", ["i\nmore"]),
    ):
        result = weft("generate", asked / "run", "--adapter", "writer", "--input", file, "--json",
                      "--max-new-tokens", 1)  # fmt: skip
        assert result.code == 0, result.err
        assert [row["prompt"] for row in json.loads(result.out)["results"]] == prompts
    Path("torn.jsonl").write_text('{"ask me": "Who?", "said": "I."}\n')
    torn = weft("generate", asked / "run", "--adapter", "writer", "--input", "torn.jsonl")
    assert "torn.jsonl:1: columns: there is no field 'title'" in torn.err


def test_chat_is_for_adapters_that_write(weft: Callable[..., Any], asked: Path) -> None:
    run = asked / "run"
    judge = weft("chat", run, "--adapter", "judge", "--system", "s", stdin="hello\n")
    assert (judge.code, judge.out) == (2, "")
    assert "adapter 'judge' was trained to classify; it writes no text" in judge.err
    assert "answers (also there" not in judge.err, "before the first prompt"
    both = weft("chat", run, "--max-new-tokens", 1, stdin="/adapter judge\n")
    assert (both.code, "it writes no text" in both.err) == (2, True)
    part = weft("chat", run, "--adapter", "writer", stdin="/adapter judge\n")
    assert "adapter 'judge' is in the run, but not loaded: --adapter chose writer, base." in part.err
    assert "There are: writer, base." in weft("chat", run, "--adapter", "writer", stdin="/adapter x\n").err


def test_texts_to_classify_need_no_label(weft: Callable[..., Any], asked: Path) -> None:
    Path("t.txt").write_text("one\ttwo\nthree\n")
    result = weft("generate", asked / "run", "--adapter", "judge", "--input", "t.txt", "--json")
    told = json.loads(result.out)
    assert [row["prompt"] for row in told["results"]] == ["one\ttwo", "three"]
    assert "scores" not in told
    Path("other.tsv").write_text("so so\t7\ngood\t1\n")
    result = weft("generate", asked / "run", "--adapter", "judge", "--input", "other.tsv")
    assert "other.tsv:1: the adapter has no class '7'. It has 0, 1." in result.err


def test_the_label_is_the_column_that_training_named(
    weft: Callable[..., Any], tiny_llama_dir: Path, tmp_path: Path
) -> None:
    """Bad records, too, are left out where training left them out."""
    words = ["a fine film", "a dull one", "so slow", "warm and true"]
    rows = [{"text": text, "mine": n % 2, "target": 1 - n % 2} for n, text in enumerate(words)]
    lines = [json.dumps(row) for row in (rows[0], {"text": 5, "mine": 0}, *rows[1:])] + ['{"text": broken']
    Path("mine.jsonl").write_text("\n".join(lines))
    Path("bad.jsonl").write_text("\n".join(lines[-1:]))
    run = tmp_path / "run"
    trained = weft("train", f"model={tiny_llama_dir}", "data=mine.jsonl", "task=sequence_classification",
                   "label_column=mine", "method=lora", "steps=1", "on_bad_record=skip", f"output_dir={run}",
                   "--quiet")  # fmt: skip
    assert trained.code == 0, trained.err
    for target in (run, run / "adapters" / "lora"):
        result = weft("generate", target, "--input", "mine.jsonl", "--json")
        assert [row["label"] for row in json.loads(result.out)["results"]] == ["0", "1", "0", "1"]
        assert "mine.jsonl: left out 2 bad records" in result.err
    for other in ({"target": 1}, {"category": "news"}):
        Path("other.jsonl").write_text(json.dumps({"text": "a film", **other}))
        told = json.loads(weft("generate", run, "--input", "other.jsonl", "--json").out)
        assert "scores" not in told
        assert "label" not in told["results"][0]
    nothing = weft("generate", run, "--input", "bad.jsonl")
    assert nothing.code == 2
    assert "bad.jsonl:1" in nothing.err


@pytest.mark.parametrize(
    ("who", "words", "why"),
    [
        ("judge", ["--system", "s"], "--system does nothing for adapters that classify"),
        ("judge", ["--temperature", 1], "--temperature does nothing for adapters that classify"),
        ("judge", ["--batch-size", 2], "--batch-size does nothing for adapters that classify"),
        ("writer", ["--top-p", 0.5], "--top-p does nothing without --temperature"),
        ("writer", ["--raw", "--chat-template", "{{ messages }}"], "--chat-template does nothing with --raw"),
        ("writer", ["--overwrite"], "--overwrite does nothing without --output"),
    ],
)
def test_options_that_do_nothing(weft: Callable[..., Any], asked: Path, who: str, words: list[Any], why: str) -> None:
    result = weft("generate", asked / "run", "--adapter", who, "--prompt", "one", *words)
    assert result.code == 2
    assert why in result.err


def test_a_model_has_no_adapters_and_no_base(weft: Callable[..., Any], tiny_llama_dir: Path) -> None:
    words = ("generate", tiny_llama_dir, "--prompt", "one", "--max-new-tokens", 1)
    assert "--all-adapters does nothing for a model" in weft(*words, "--all-adapters").err
    assert "--model has no base to replace" in weft(*words, "--model", "tiny-bloom").err
