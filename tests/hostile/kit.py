"""Good folders for the cases to spoil: a model, an adapter, a run, data. Made once, copied for each case."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

CANARY = "weft_canary"
# What a stranger's Python would do: leave a trace that the hook sees.
CODE = f"open('{CANARY}.txt', 'w').write('ran')\nimport os\nos.system('touch {CANARY}.sh')\n"


@dataclass(frozen=True)
class Good:
    """Where the good folders are."""

    root: Path

    @property
    def model(self) -> Path:
        return self.root / "model"

    @property
    def run(self) -> Path:
        return self.root / "run"

    @property
    def data(self) -> Path:
        return self.root / "data.jsonl"


def make_good(root: Path) -> Good:
    """Train two steps on a copy of the embedded model."""
    from weft.assets import model_path
    from weft.cli.main import main

    good = Good(root)
    if (root / "done").exists():
        return good
    root.mkdir(parents=True, exist_ok=True)
    shutil.copytree(model_path("tiny-llama"), good.model)
    rows = [{"instruction": f"Count to {i}.", "output": " ".join(map(str, range(i)))} for i in range(1, 13)]
    good.data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    words = ["train", "--model", good.model, "--data", good.data, "--method", "lora", "steps=2", "save_steps=1", "-q"]
    assert main([str(word) for word in (*words, "--output-dir", good.run)]) == 0
    (root / "done").touch()
    return good


class Place:
    """One case's folder, with copies of what is good; large files are linked, which is the same and costs nothing."""

    def __init__(self, folder: Path, good: Good) -> None:
        self.folder, self.good = folder, good

    def model(self) -> Path:
        return self._copy(self.good.model, "model")

    def run(self) -> Path:
        """The run; it still names the good model as its base."""
        return self._copy(self.good.run, "run")

    def adapter(self) -> Path:
        return self._copy(self.good.run / "adapters" / "lora", "adapter")

    def unfinished(self) -> Path:
        """The run as it was before its adapter was written: answers come from the newest checkpoint."""
        folder = self.run()
        shutil.rmtree(folder / "adapters")
        (folder / "adapters").mkdir()
        return folder

    def data(self, name: str, content: bytes) -> Path:
        path = self.folder / name
        path.write_bytes(content)
        return path

    def _copy(self, source: Path, name: str) -> Path:
        target = self.folder / name
        shutil.copytree(source, target, copy_function=_link)
        return target


def _link(source: str, target: str) -> str:
    if os.path.getsize(source) > 1 << 20:
        os.link(source, target)
        return target
    return str(shutil.copyfile(source, target))


@dataclass(frozen=True)
class Case:
    """One hostile file or folder: ``build`` makes it and gives the words of the command line that meet it."""

    kind: str
    name: str
    build: Callable[[Place], list[Any]]
    codes: tuple[int, ...] = (2,)  # `weft preview` tells of bad records as findings, which is code 1

    @property
    def id(self) -> str:
        return f"{self.kind}: {self.name}"


def edit(path: Path, changes: Mapping[str, Any]) -> None:
    """Other entries in a JSON file; ``...`` takes one out, dots go deeper."""
    values = json.loads(path.read_text())
    for key, value in changes.items():
        place, parts = values, key.split(".")
        for part in parts[:-1]:
            place = place.setdefault(part, {})
        if value is ...:
            place.pop(parts[-1], None)
        else:
            place[parts[-1]] = value
    path.write_text(json.dumps(values))


def ask(target: Path) -> list[Any]:
    """The shortest command that reads a folder whole."""
    return ["generate", target, "--prompt", "Count to 3.", "--max-new-tokens", "1"]


def train(model: Path | str, data: Path, *more: Any) -> list[Any]:
    """A run of one step."""
    given = ["--model", model, "--data", data, "--method", "lora", "--output-dir", "new"]
    return ["train", *given, "steps=1", "-q", *more]
