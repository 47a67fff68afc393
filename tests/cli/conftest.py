"""Running the command line inside the test's process."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import pytest
from tests.kit.elsewhere import rendered_here


@dataclass
class Run:
    """What a command left behind."""

    code: int
    out: str
    err: str


@pytest.fixture
def weft(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """``weft("train", …, stdin="…")`` in an empty working directory."""
    from weft.cli.main import main

    # A process without Weft costs seconds for each merge. `test_merged_elsewhere.py` starts it.
    monkeypatch.setattr("weft.export.folder.fresh_ids", rendered_here)
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def run(*words: object, stdin: str = "") -> Run:
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        before = dict(os.environ)
        capsys.readouterr()  # what the test itself has printed is not the command's
        try:
            code = main([str(word) for word in words])
        finally:
            os.environ.clear()
            os.environ.update(before)
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return run


@pytest.fixture(scope="session")
def run_dir(tiny_llama_dir: Path, tiny_data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run of two jobs, trained through the command line."""
    from weft.cli.main import main

    folder = tmp_path_factory.mktemp("runs") / "two"
    words = ["train", "--model", tiny_llama_dir, "--data", tiny_data, "--method", "lora", "--method", "prefix_tuning"]
    settings = ["num_virtual_tokens=4", "steps=4", "eval_size=4", "logging_steps=1", "--output-dir", folder, "--quiet"]
    assert main([str(word) for word in (*words, *settings)]) == 0
    return folder
