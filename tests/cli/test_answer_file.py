"""``weft generate --output``: nothing is lost, and the same command goes on to the file of an unbroken run."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.kit.processes import forkserver

from weft.cli.answers import AnswerFile, Key, Row
from weft.errors import UserError
from weft.generation.identity import content_hash
from weft.generation.open import open_target


@pytest.fixture
def asked(run_dir: Path, tmp_path: Path) -> list[str]:
    """The command, but for its output."""
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("".join(f"What comes after {n}?\n" for n in range(6)))
    return [str(word) for word in (
        "generate", run_dir, "--input", prompts, "--all-adapters", "--max-new-tokens", 24, "--temperature", 1.5,
        "--n", 2, "--seed", 3, "--batch-size", 3, "--output",
    )]  # fmt: skip


def slow_answers(words: list[str]) -> None:
    """The command, with a pause behind each answer, so that it can be killed there."""
    from weft.cli.main import main

    add = AnswerFile.add

    def slow(self: AnswerFile, row: Row) -> None:
        add(self, row)
        time.sleep(0.1)

    AnswerFile.add = slow  # type: ignore[method-assign]
    main(words)


def test_killed_and_continued(weft: Callable[..., Any], asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    assert weft(*asked, "whole.jsonl").code == 0
    whole = Path("whole.jsonl").read_bytes()
    rows = [json.loads(line) for line in whole.splitlines()]
    assert [(row["index"], row["adapter"], row["sample"]) for row in rows] == [
        (n, name, sample) for n in range(6) for name in ("lora", "prefix_tuning") for sample in (0, 1)
    ]
    out = Path("broken.jsonl").absolute()
    process = forkserver().Process(target=slow_answers, args=([*asked, str(out)],))
    with monkeypatch.context() as patch:
        patch.chdir(Path(__file__).parents[2])  # where the first process of its kind finds the tests
        process.start()
    until = time.monotonic() + 60
    while not out.exists() or out.read_bytes().count(b"\n") < 5:
        assert time.monotonic() < until
        assert process.is_alive()
        time.sleep(0.02)
    assert process.pid is not None
    os.kill(process.pid, signal.SIGKILL)
    process.join()
    kept = out.read_bytes().count(b"\n")
    assert 5 <= kept < 24
    with out.open("ab") as file:
        file.write(b'{"index": 5, "prompt": "What com')  # a line that was cut off
    result = weft(*asked, out)
    assert (result.code, f"{kept} of 24 answers are in" in result.err) == (0, True), result.err
    assert out.read_bytes() == whole
    assert "24 of 24 answers are in" in weft(*asked, out).err
    assert out.read_bytes() == whole


def test_ctrl_c_says_how_to_go_on(weft: Callable[..., Any], asked: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    add = AnswerFile.add

    def stop(self: AnswerFile, row: Row) -> None:
        add(self, row)
        if len(self.rows) == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "add", stop)
        result = weft(*asked, "out.jsonl")
    assert result.code == 130
    assert "interrupted: 3 of 24 answers are in out.jsonl; the same command goes on." in result.err
    assert len(Path("out.jsonl").read_text().splitlines()) == 3
    assert weft(*asked, "out.jsonl").code == 0


def test_answers_of_another_run_are_refused(weft: Callable[..., Any], asked: list[str], run_dir: Path) -> None:
    assert weft(*asked, "out.jsonl").code == 0
    before = Path("out.jsonl").read_bytes()
    Path("other.txt").write_text("What comes after 7?\n")
    shutil.copytree(run_dir, "run")
    moved = [word if word != str(run_dir) else "run" for word in asked]
    assert "24 of 24 answers" in weft(*moved, "out.jsonl").err, "the same contents in another place"
    _change_a_tensor(Path("run/adapters/lora/adapter_model.safetensors"))
    for words, why in (
        ([*asked, "out.jsonl", "--top-k", "5"], "it was begun with --top-k 0, this is 5."),
        ([*asked, "out.jsonl", "--n", "1"], "it was begun with --n 2, this is 1."),
        ([*asked, "out.jsonl", "--input", "other.txt"], "other prompts"),
        ([*moved, "out.jsonl"], "adapter 'lora' is not what it was"),
    ):
        result = weft(*words)
        assert (result.code, why in result.err) == (2, True), result.err
        assert Path("out.jsonl").read_bytes() == before
    Path("strange.jsonl").write_bytes(before)
    assert "no run is known that wrote it" in weft(*asked, "strange.jsonl").err
    assert weft(*moved, "out.jsonl", "--overwrite").code == 0
    assert Path("out.jsonl").read_bytes() != before


def _change_a_tensor(path: Path) -> None:
    from safetensors.torch import load_file, save_file

    tensors = load_file(path)
    name = next(iter(tensors))
    save_file({**tensors, name: tensors[name] + 0.5}, path, {"format": "pt"})
    (path.parent / "weft.json").unlink()  # it would say that the file is damaged


def test_the_hash_of_an_adapter_is_its_contents(run_dir: Path) -> None:
    with open_target(run_dir) as opened, open_target(run_dir / "adapters" / "lora") as alone, torch.no_grad():
        adapter = opened.adapters["lora"]
        before = content_hash(adapter)
        assert before == content_hash(alone.adapters["lora"]) != content_hash(opened.adapters["prefix_tuning"])
        parameter = next(adapter.parameters())
        parameter[0, 0] += 1e-4
        assert content_hash(adapter) != before
        parameter.copy_(next(alone.adapters["lora"].parameters()))
        assert content_hash(adapter) == before


def test_begun_anew_the_old_file_stands_until_the_first_answer(tmp_path: Path) -> None:
    path = tmp_path / "out.jsonl"
    path.write_text("earlier answers\n")
    file = AnswerFile(path, {"n": 1}, overwrite=True)
    file.open({}, "p")
    assert path.read_text() == "earlier answers\n"
    # Ended here, no answer of that run is there.
    with pytest.raises(UserError, match="no run is known that wrote it"):
        AnswerFile(path, {"n": 1}, overwrite=False)
    rows: dict[Key, Row] = {(n, "base", 0): {"index": n, "adapter": "base", "text": "织"} for n in (1, 0)}
    for row in rows.values():
        file.add(row)
    again = AnswerFile(path, {"n": 1}, overwrite=False)
    again.open({}, "p")
    assert (again.rows, list(again.rows)) == (rows, [(1, "base", 0), (0, "base", 0)])
    again.close([(0, "base", 0), (1, "base", 0)])
    assert [json.loads(line)["index"] for line in path.read_text().splitlines()] == [0, 1]
    with pytest.raises(UserError, match="it has an answer of 'base' to prompt 1, which this run does not ask"):
        again.check_keys([(0, "base", 0)])
    for damaged in ('{"text": "no place"}', '{"index": [0], "adapter": "base"}', '{"index": "0", "adapter": "base"}'):
        path.write_text(f"{damaged}\n")
        with pytest.raises(UserError, match="not all of its lines are answers of this run"):
            AnswerFile(path, {"n": 1}, overwrite=False).open({}, "p")


def test_what_fails_before_the_first_answer_changes_nothing(
    weft: Callable[..., Any], asked: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def files() -> dict[str, bytes]:
        return {path.name: path.read_bytes() for path in Path().iterdir() if path.is_file()}

    def stop(self: AnswerFile, row: Row) -> None:
        raise KeyboardInterrupt

    empty = files()
    assert "leave no room" in weft(*asked, "out.jsonl", "--max-new-tokens", 5000).err
    assert files() == empty
    assert weft(*asked, "out.jsonl").code == 0
    before = files()
    assert "leave no room" in weft(*asked, "out.jsonl", "--max-new-tokens", 5000, "--overwrite").err
    assert files() == before
    with monkeypatch.context() as patch:
        patch.setattr(AnswerFile, "add", stop)
        result = weft(*asked, "out.jsonl", "--overwrite")
    assert (result.code, "interrupted before an answer came; out.jsonl is as it was." in result.err) == (130, True)
    assert files() == before
    assert weft(*asked, "out.jsonl", "--overwrite").code == 0
    assert files() == before, "the new answers are the old ones"
    assert "24 of 24 answers are in" in weft(*asked, "out.jsonl").err


def test_samples_log_probabilities_and_stop_strings(weft: Callable[..., Any], run_dir: Path) -> None:
    words = ("generate", run_dir, "--prompt", "one", "--max-new-tokens", 12, "--json")

    def rows(*more: object) -> list[Row]:
        result = weft(*words, *more)
        assert result.code == 0, result.err
        found: list[Row] = json.loads(result.out)["results"]
        return found

    drawn = rows("--temperature", 2, "--n", 3, "--logprobs", 2)
    (alone,) = rows("--temperature", 2)
    assert [row["sample"] for row in drawn] == [0, 1, 2]
    assert len({row["text"] for row in drawn}) == 3
    assert drawn[0]["text"] == alone["text"], "the first is drawn with the seed itself"
    for row in drawn:
        assert len(row["logprobs"]) == row["tokens"]
        assert all(len(one["top"]) == 2 and one["logprob"] <= one["top"][0]["logprob"] <= 0 for one in row["logprobs"])
    (greedy,) = rows("--logprobs", 1)
    assert all(one["id"] == one["top"][0]["id"] for one in greedy["logprobs"])
    stop = greedy["text"][2:5]
    (stopped,) = rows("--stop", stop, "--stop", "never said")
    assert stopped["text"] == greedy["text"][: greedy["text"].index(stop)]
    assert stopped["finish_reason"] == "stop"
    (other,) = rows("--repetition-penalty", 5, "--frequency-penalty", 2)
    assert other["text"] != greedy["text"]
    assert "--n does nothing without --temperature" in weft(*words, "--n", 2).err
    assert "repetition_penalty is 0.0" in weft(*words, "--repetition-penalty", 0).err


def test_classes_are_continued_too(
    weft: Callable[..., Any], tiny_llama_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.cli.answering._CLASSIFIED", 2)
    texts = [json.dumps({"text": f"a film {n}", "label": n % 2}) for n in range(5)]
    Path("films.jsonl").write_text("\n".join(texts))
    trained = weft("train", f"model={tiny_llama_dir}", "data=films.jsonl", "task=sequence_classification",
                   "method=lora", "steps=1", "output_dir=run", "--quiet")  # fmt: skip
    assert trained.code == 0, trained.err
    words = ("generate", "run", "--input", "films.jsonl", "--output", "out.jsonl")
    whole = weft(*words)
    lines = Path("out.jsonl").read_text().splitlines(keepends=True)
    Path("out.jsonl").write_text("".join([*lines[3:], *lines[:1]]))
    result = weft(*words)
    assert (result.code, result.out) == (0, whole.out), "the figures are those of all answers"
    assert "3 of 5 answers are in" in result.err
    assert Path("out.jsonl").read_text() == "".join(lines)
