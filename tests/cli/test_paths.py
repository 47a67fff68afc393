"""``~`` is the home in every path that a person gives, and a run goes on from any folder."""

from __future__ import annotations

import importlib
import inspect
import re
import typing
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import weft as package
from weft.cli.main import VERBS
from weft.data.sources import with_paths
from weft.paths import from_root, local_path, with_home

SOURCE = Path(package.__file__).parent


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tiny_data: Path) -> Path:
    home = tmp_path / "home"
    home.mkdir()
    (home / "data.jsonl").write_text(Path(tiny_data).read_text())
    monkeypatch.setenv("HOME", str(home))
    return home


def test_one_function() -> None:
    assert with_home("a~b") == "a~b"
    assert local_path("~") == Path.home()
    elsewhere = [path for path in SOURCE.rglob("*.py") if path.name != "paths.py" and "expanduser" in path.read_text()]
    assert elsewhere == []


def test_every_path_of_the_command_line_goes_through_it() -> None:
    seen = 0
    for verb in VERBS:
        function = getattr(importlib.import_module(f"weft.cli.{verb}"), verb)
        for name, hint in typing.get_type_hints(inspect.unwrap(function), include_extras=True).items():
            inner = typing.get_args(hint)
            if inner and inner[0] in (Path, Path | None):
                seen += 1
                assert inner[1].parser is local_path, name
    assert seen >= 6


def test_the_home_everywhere(weft: Callable[..., Any], home: Path, tiny_llama_dir: Path) -> None:
    (home / "base").symlink_to(tiny_llama_dir)
    (home / "mine.jinja").write_text("{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}")
    Path("run.yaml").write_text(
        "model: ~/base\nsteps: 1\noutput_dir: ~/run\ndata: ~/data.jsonl\nchat_template: ~/mine.jinja\n"
        "jobs:\n- {name: a, method: lora, data: [{path: ~/data.jsonl, limit: 4}]}\n- {name: b, method: ia3,"
        " data: 0.5*~/data.jsonl + 0.5*~/more.jsonl}\n"
    )
    (home / "more.jsonl").write_text((home / "data.jsonl").read_text())
    assert weft("train", "run.yaml").code == 0
    asked = ["--prompt", "one", "--max-new-tokens", 2]
    assert weft("generate", "~/run", "--adapter", "a", "--output", "~/answers.jsonl", *asked).code == 0
    assert weft("merge", "--adapter", "~/run/adapters/a", "--output", "~/merged").code == 0
    assert weft("combine", "~/run/adapters/a", "--output", "~/both").code == 0
    assert weft("preview", "~/run/../../work/run.yaml", "--html", "~/page.html").code in (0, 1)
    assert not list(Path().glob("~*"))
    assert {"run", "answers.jsonl", "merged", "both", "page.html"} <= {path.name for path in home.iterdir()}


@pytest.mark.parametrize(
    ("data", "changed"),
    [
        ("a.jsonl", "/x/a.jsonl"),
        ("0.7*a.jsonl + 0.3*b c.jsonl", "0.7*/x/a.jsonl + 0.3*/x/b c.jsonl"),
        (["a.jsonl", {"path": "b.jsonl", "limit": 3}], ["/x/a.jsonl", {"path": "/x/b.jsonl", "limit": 3}]),
    ],
)
def test_paths_in_data_change_and_nothing_else(data: Any, changed: Any) -> None:
    assert with_paths(data, lambda path: f"/x/{path}") == changed
    assert with_paths(data, lambda path: path) == data


def test_from_the_root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("here.jsonl").touch()
    assert from_root("here.jsonl") == str(tmp_path / "here.jsonl")
    assert from_root("part-*.jsonl") == str(tmp_path / "part-*.jsonl")
    assert from_root("owner/name") == "owner/name"
    assert from_root("x" * 5000) == "x" * 5000
    assert re.fullmatch(r"/.*", from_root("./here.jsonl"))
