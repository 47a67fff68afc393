"""Adapters' folders that cannot be right, on the command line: one message, exit code 2, no traceback."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

WEIGHTS = "adapter_model.safetensors"


def disagree(folder: Path) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "lora_alpha": 99}))


def flip(folder: Path) -> None:
    data = bytearray((folder / WEIGHTS).read_bytes())
    data[-3] ^= 16
    (folder / WEIGHTS).write_bytes(data)


def sick(folder: Path) -> None:
    """As of a tool that knows nothing of weft.json."""
    tensors = load_file(folder / WEIGHTS)
    key = max(tensors)
    tensors[key][0, 1] = float("nan")
    save_file(tensors, folder / WEIGHTS)
    (folder / "weft.json").unlink()


def whole_numbers(folder: Path) -> None:
    tensors = load_file(folder / WEIGHTS)
    save_file({key: t.to(torch.int8) for key, t in tensors.items()}, folder / WEIGHTS)
    (folder / "weft.json").unlink()


WRONG: dict[str, tuple[Callable[[Path], None], str]] = {
    "disagree": (disagree, r"disagree:\s+lora_alpha: 16.0 in weft.json, 99 in adapter_config.json"),
    "flipped": (flip, r"SHA-256 in weft.json: 1 changed \('base_model.model.*lora_\w.weight'\)"),
    "NaN": (sick, r"tensor 'base_model.*' holds 1 of \d+ numbers that are NaN or infinite, the first at \[0, 1\]"),
    "integers": (whole_numbers, r"tensor 'base_model.*' is int8"),
}


@pytest.mark.parametrize("verb", ["generate", "merge", "combine"])
@pytest.mark.parametrize("what", WRONG)
def test_an_adapter_that_cannot_be_right(
    weft: Callable[..., Any], run_dir: Path, tiny_llama_dir: Path, what: str, verb: str
) -> None:
    change, words = WRONG[what]
    folder = Path("it")
    shutil.copytree(run_dir / "adapters" / "lora", folder)
    change(folder)
    more: list[object] = ["--prompt", "Hi"] if verb == "generate" else ["--output", "out"]
    place = ["--adapter", folder] if verb == "merge" else [folder]
    result = weft(verb, *place, *more, "--model", tiny_llama_dir)
    assert result.code == 2
    assert re.search(words, " ".join(result.err.split()))
    assert "Traceback" not in result.err
    assert not Path("out").exists()
