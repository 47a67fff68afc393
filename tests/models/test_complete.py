"""A base of which the files lack tensors is refused: what is missing, what has no place, what is transposed."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file

from weft.errors import UserError
from weft.models import load_base


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("up_proj", "", r"lacks 2 of its tensors: model\.layers\.0\.mlp\.up_proj\.weight, model\.layers\.1\.mlp\.up_p"),
        ("up_proj", "up_project", r"up_proj\.weight; its files hold 2 tensors \(model\.layers\.0\.mlp\.up_project"),
        ("down_proj", "T", r"down_proj\.weight is \(64, 32\), its config.json says \(32, 64\)\. It is transposed"),
    ],
)
def test_a_base_that_is_not_whole(tiny_llama_dir: Path, tmp_path: Path, old: str, new: str, message: str) -> None:
    folder = tmp_path / "base"
    shutil.copytree(tiny_llama_dir, folder)
    tensors = {}
    for key, tensor in load_file(folder / "model.safetensors").items():
        if old not in key:
            tensors[key] = tensor
        elif new == "T":
            tensors[key] = tensor.t().contiguous()
        elif new:
            tensors[key.replace(old, new)] = tensor
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    with pytest.raises(UserError, match=message):
        load_base(str(folder))
