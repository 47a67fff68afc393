"""Consoles that are not UTF-8: what they cannot show is replaced, JSON and files stay UTF-8."""

from __future__ import annotations

import io
import json
import sys
from pathlib import Path

import pytest

from weft.cli.main import main

WORDS = ("one", "two", "three", "four")
RECORDS = [{"instruction": f"Tom 🤗 says {word}", "output": f"你好, é {word}"} for word in WORDS]


class Console:
    """The standard streams of a process whose console has an encoding of its own."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, encoding: str, stdin: bytes = b"") -> None:
        self.out, self.err = io.BytesIO(), io.BytesIO()
        for name, raw in (("stdout", self.out), ("stderr", self.err), ("stdin", io.BytesIO(stdin))):
            monkeypatch.setattr(sys, name, io.TextIOWrapper(raw, encoding=encoding))

    def run(self, *words: object) -> bytes:
        """What a command writes on stdout; it must succeed."""
        code = main([str(word) for word in words])
        sys.stdout.flush()
        sys.stderr.flush()
        assert code == 0, self.err.getvalue()
        return self.out.getvalue()


@pytest.fixture(params=["gbk", "latin-1", "ascii"])
def encoding(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    monkeypatch.chdir(tmp_path)
    Path("data.json").write_text(json.dumps(RECORDS, ensure_ascii=False), encoding="utf-8")
    return str(request.param)


def test_what_a_console_lacks_is_replaced(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "tiny-llama", "--prompt", "Tom 🤗", "--prompt", "你", "--max-new-tokens", 2]
    shown = Console(monkeypatch, encoding).run(*words)
    assert b"Tom ?" in shown
    shown.decode(encoding)
    shown = Console(monkeypatch, encoding).run("preview", "--model", "tiny-llama", "--data", "data.json")
    shown.decode(encoding)
    words = ["train", "--model", "tiny-llama", "--data", "data.json", "--method", "lora", "steps=1", "output_dir=输出"]
    Console(monkeypatch, encoding).run(*words)
    assert Path("输出/adapters/lora").is_dir()


def test_json_is_utf_8_on_every_console(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    words = ["generate", "tiny-llama", "--prompt", "Tom 🤗 你", "--max-new-tokens", 2, "--json"]
    found = json.loads(Console(monkeypatch, encoding).run(*words).decode("utf-8"))
    assert found["results"][0]["prompt"] == "Tom 🤗 你"


def test_piped_lines_are_utf_8_on_every_console(encoding: str, monkeypatch: pytest.MonkeyPatch) -> None:
    console = Console(monkeypatch, encoding, "你 🤗\n".encode())
    shown = console.run("chat", "tiny-llama", "--max-new-tokens", 2, "--json")
    assert json.loads(shown.decode("utf-8"))["prompt"] == "你 🤗"
