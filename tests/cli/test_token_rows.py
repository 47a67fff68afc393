"""A tokenizer that has more tokens than its model has rows: refused before training, by every verb, with the token."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft.models import load_base

TEMPLATE = "{% for m in messages %}<|new1|>{{ m.role }}: {{ m.content }}\n{% endfor %}"


@pytest.fixture(scope="module")
def larger(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, int]:
    """A base whose tokenizer has two tokens more than there are rows, and how many rows there are."""
    rows = load_base(str(tiny_llama_dir)).token_rows
    folder = tmp_path_factory.mktemp("base") / "larger"
    shutil.copytree(tiny_llama_dir, folder)
    file = folder / "tokenizer.json"
    stored = json.loads(file.read_text(encoding="utf-8"))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    known = max(entry["id"] for entry in stored["added_tokens"])
    assert known < rows
    stored["added_tokens"] += [{"id": rows + i, "content": f"<|new{i}|>", **flags} for i in range(2)]
    # The ids in between must be there, or the tokenizers library counts on from its own last one.
    vocabulary = stored["model"]["vocab"]
    size = len(vocabulary)
    assert size <= rows
    if isinstance(vocabulary, dict):
        vocabulary |= {f"<unused{i}>": i for i in range(size, rows)}
    file.write_text(json.dumps(stored), encoding="utf-8")
    return folder, rows


def test_what_the_template_writes(weft: Callable[..., Any], larger: tuple[Path, int], tiny_data: Path) -> None:
    base, rows = larger
    named = f"token '<|new1|>' (id {rows + 1}) has no row in the model's embeddings, which have {rows}"
    Path("new.jinja").write_text(TEMPLATE)
    for words in (
        ["train", "--method", "lora", "--data", tiny_data, "--model", base, "chat_template=new.jinja", "steps=1"],
        ["generate", base, "--prompt", "one", "--chat-template", "new.jinja", "--max-new-tokens", 2],
    ):
        result = weft(*words)
        assert result.code == 2
        assert named in result.err
    result = weft("preview", "--model", base, "--data", tiny_data, "chat_template=new.jinja")
    assert result.code == 1
    assert "error: no-row" in result.out
    assert named in result.out


def test_what_the_data_holds(weft: Callable[..., Any], larger: tuple[Path, int]) -> None:
    base, rows = larger
    Path("ids.jsonl").write_text(json.dumps({"input_ids": [1, 5, rows + 1], "labels": [-100, 5, rows + 1]}) + "\n")
    result = weft("train", "--method", "lora", "--data", "ids.jsonl", "--model", base, "steps=1")
    assert result.code == 2
    assert f"token '<|new1|>' (id {rows + 1}) has no row" in result.err


def test_the_end_of_every_text(weft: Callable[..., Any], larger: tuple[Path, int], tiny_data: Path) -> None:
    base = Path("ends").absolute()
    shutil.copytree(larger[0], base)
    file = base / "tokenizer_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "eos_token": "<|new0|>"}))
    for words in (
        ["train", "--method", "lora", "--data", tiny_data, "--model", base, "steps=1"],
        ["preview", "--data", tiny_data, "--model", base],
        ["generate", base, "--prompt", "one", "--max-new-tokens", 2],
    ):
        result = weft(*words)
        assert result.code == 2
        assert "eos_token of the tokenizer: token '<|new0|>'" in result.err
