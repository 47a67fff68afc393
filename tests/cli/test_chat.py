"""``weft chat``: from a run's folder alone, from a PEFT folder, from a model; piped."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest


def test_a_run_answers_from_its_folder_alone(weft: Callable[..., Any], run_dir: Path) -> None:
    result = weft("chat", run_dir, "--max-new-tokens", 5, stdin="What comes after one?\n\nAnd 中文?\n")
    assert result.code == 0, result.err
    assert "lora answers (also there: prefix_tuning, base" in result.err
    assert re.search(r"^base \S+ \(llama, float32, cpu\); adapters: lora, prefix_tuning; chat template: ", result.err)
    assert "--seed does nothing without --temperature" in weft("chat", run_dir, "--seed", 1).err
    assert result.out.endswith("\n")


def test_the_adapter_answers_as_in_generate(weft: Callable[..., Any], run_dir: Path) -> None:
    for name in ("lora", "prefix_tuning", "base"):
        talked = weft("chat", run_dir, "--adapter", name, "--max-new-tokens", 8, stdin="What comes after two?\n")
        written = weft(
            "generate", run_dir, "--adapter", name, "--max-new-tokens", 8, "--prompt", "What comes after two?"
        )
        assert talked.code == written.code == 0
        assert talked.out.rstrip("\n�") == written.out.rstrip("\n�")


def test_commands(weft: Callable[..., Any], run_dir: Path) -> None:
    lines = [
        "/help",
        "/adapter prefix_tuning",
        "/adapter base",
        "/adapter",
        "/system Be brief.",
        "/reset",
        "/exit",
        "no",
    ]
    result = weft("chat", run_dir, "--max-new-tokens", 3, stdin="\n".join(lines))
    assert result.code == 0
    assert result.out == ""
    for part in ("/adapter NAME", "prefix_tuning answers", "base answers", "with this system message"):
        assert part in result.err


def test_turns_go_on_until_reset(weft: Callable[..., Any], run_dir: Path) -> None:
    plain = weft("chat", run_dir, "--max-new-tokens", 6, stdin="one\n").out
    again = weft("chat", run_dir, "--max-new-tokens", 6, stdin="one\n/reset\none\n").out
    assert again == plain + plain
    full = weft("chat", run_dir, "--max-new-tokens", 6, stdin="word " * 60 + "\n" + "word " * 60 + "\n")
    assert full.code == 2
    assert "/reset" in full.err
    assert "256 positions" in full.err


@pytest.mark.parametrize("line", ["/adaptr lora", "/adapter nobody"])
def test_a_wrong_command_in_a_pipe_is_noticed(weft: Callable[..., Any], run_dir: Path, line: str) -> None:
    result = weft("chat", run_dir, stdin=line + "\n")
    assert result.code == 2
    assert result.err.count("error: ") == 1


def test_a_peft_folder_and_a_plain_model(
    weft: Callable[..., Any], run_dir: Path, tiny_llama_dir: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "my adapter"
    shutil.copytree(run_dir / "adapters" / "lora", folder)
    (folder / "weft.json").unlink()
    result = weft("chat", folder, "--max-new-tokens", 5, stdin="What comes after one?\n")
    assert result.code == 0, result.err
    assert "my_adapter answers" in result.err
    assert result.out == weft("chat", run_dir, "--max-new-tokens", 5, stdin="What comes after one?\n").out
    plain = weft("chat", tiny_llama_dir, "--max-new-tokens", 5, stdin="What comes after one?\n")
    base = weft("chat", run_dir, "--adapter", "base", "--max-new-tokens", 5, stdin="What comes after one?\n")
    assert plain.out == base.out


def test_a_character_of_several_tokens_comes_whole(tiny_llama_dir: Path) -> None:
    from transformers import AutoTokenizer

    from weft.generation.text import TextStream

    tokenizer = AutoTokenizer.from_pretrained(tiny_llama_dir)
    text = "织机 — 🧵 ok  two spaces ."
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    stream = TextStream(tokenizer)
    pieces = [stream.push(token) for token in ids]
    assert "".join(pieces) + stream.flush() == text
    assert not any("�" in piece for piece in pieces)
    assert "" in pieces
    cut = TextStream(tokenizer)
    shown = "".join(cut.push(token) for token in tokenizer("a织", add_special_tokens=False)["input_ids"][:-1])
    assert shown + cut.flush() == "a"


def test_a_line_that_is_not_utf_8(weft: Callable[..., Any], run_dir: Path) -> None:
    result = weft("chat", run_dir, stdin="\udcff bad\n")
    assert result.code == 2, result.err
    assert "line 1 of stdin is not UTF-8" in result.err


def test_answers_as_json_lines(weft: Callable[..., Any], run_dir: Path) -> None:
    talked = weft("chat", run_dir, "--max-new-tokens", 5, stdin="What comes after one?\n")
    result = weft("chat", run_dir, "--json", "--max-new-tokens", 5, stdin="What comes after one?\nAnd then?\n")
    first, second = (json.loads(line) for line in result.out.splitlines())
    assert first["adapter"] == second["adapter"] == "lora"
    assert first["answer"] == talked.out.removesuffix("\n")
    assert first["finish_reason"] in ("stop", "length")
    assert second["prompt"] == "And then?"
