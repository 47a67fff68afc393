"""Pickled weights: refused by every verb but ``weft convert``, which reads tensors and nothing else."""

from __future__ import annotations

import json
import os
import shutil
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from weft.errors import UserError
from weft.models import load_base
from weft.models.convert import convert_folder


class Evil:
    """What runs when it is unpickled in the usual way."""

    def __reduce__(self) -> Any:
        return os.system, ("touch ran",)


@pytest.fixture
def pickled(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """The tiny Llama with its weights as torch.save writes them."""
    folder = tmp_path / "pickled"
    shutil.copytree(tiny_llama_dir, folder)
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    (folder / "modeling_evil.py").write_text("raise SystemExit")
    return folder


def test_a_converted_model_is_the_same(pickled: Path, tiny_llama_dir: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="weft convert"):
        load_base(str(pickled), device="cpu")
    found = convert_folder(pickled, tmp_path / "new")
    assert (found.files, found.tensors) == (("pytorch_model.bin",), 20)
    assert not list((tmp_path / "new").glob("*.py"))
    before, after = load_file(tiny_llama_dir / "model.safetensors"), load_file(tmp_path / "new" / "model.safetensors")
    assert before.keys() == after.keys()
    assert all(torch.equal(before[key], after[key]) for key in before)
    assert load_base(str(tmp_path / "new"), device="cpu").model is not None


def test_several_files(pickled: Path, tmp_path: Path) -> None:
    tensors = torch.load(pickled / "pytorch_model.bin", weights_only=True)
    (pickled / "pytorch_model.bin").unlink()
    where = {}
    for number, key in enumerate(tensors):
        where[key] = f"pytorch_model-{number % 2 + 1:05d}-of-00002.bin"
    for name in set(where.values()):
        torch.save({key: t for key, t in tensors.items() if where[key] == name}, pickled / name)
    (pickled / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": where}))
    assert convert_folder(pickled, tmp_path / "new").tensors == len(tensors)
    assert load_base(str(tmp_path / "new"), device="cpu").model is not None


def test_code_is_refused_and_nothing_is_left(pickled: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    torch.save({"weight": torch.zeros(2), "evil": Evil()}, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match="more than tensors"):
        convert_folder(pickled, tmp_path / "new")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pickled"]


@pytest.mark.parametrize(
    ("content", "expected"),
    [
        ([torch.zeros(2)], "holds list"),
        ({"a": 3}, "'a' is int"),
        ({}, "holds dict"),
        ({"a": torch.zeros(1).expand(10**12)}, "larger than the file"),
    ],
)
def test_what_is_not_tensors_by_name_is_refused(pickled: Path, tmp_path: Path, content: Any, expected: str) -> None:
    torch.save(content, pickled / "pytorch_model.bin")
    with pytest.raises(UserError, match=expected):
        convert_folder(pickled, tmp_path / "new")


def test_a_packed_archive_is_refused(pickled: Path, tmp_path: Path) -> None:
    with zipfile.ZipFile(pickled / "pytorch_model.bin", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", b"\x80\x02}.")
        archive.writestr("archive/data/0", bytes(10_000_000))
    with pytest.raises(UserError, match="unpacks to more"):
        convert_folder(pickled, tmp_path / "new")


def test_an_adapter(tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    folder.mkdir()
    (folder / "adapter_config.json").write_text("{}")
    torch.save({"base_model.model.a.lora_A.weight": torch.ones(2, 2)}, folder / "adapter_model.bin")
    convert_folder(folder, tmp_path / "new")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]


def test_a_folder_in_the_way_is_left_alone(pickled: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is there already"):
        convert_folder(pickled, pickled)
    with pytest.raises(UserError, match="nothing to convert"):
        convert_folder(tmp_path, tmp_path / "new")
