"""``weft verify`` with a GGUF file on one side."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from tests import kit
from tests.conftest import make_tokenizer
from transformers import LlamaForCausalLM

from weft.assets import model_path
from weft.errors import UserError
from weft.export import compare, gguf_file
from weft.export.compare import verify_sides
from weft.export.gguf_file import FORMATS, write_gguf
from weft.export.gguf_model import gguf_model

gguf = pytest.importorskip("gguf")


def file_of(folder: Path, kind: str, path: Path) -> str:
    write_gguf(gguf_model(folder, kind), path)
    return str(path)


@pytest.mark.parametrize("kind", FORMATS)
def test_a_file_is_the_model_that_it_was_made_of(kind: str, tmp_path: Path) -> None:
    base = model_path("tiny-llama")
    file = file_of(base, kind, tmp_path / "model.gguf")
    # The file is A in every second case.
    sides = (str(base), file) if list(FORMATS).index(kind) % 2 else (file, str(base))
    verdict = verify_sides(*sides)
    assert verdict.equal, verdict.differences
    assert f"GGUF in {kind}" in " ".join(verdict.lines())


@pytest.mark.parametrize("fault", ["scale", "half", "template", "tokenizer"])
def test_a_planted_fault_is_named(fault: str, tmp_path: Path) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model_path("tiny-llama"), folder)
    file = file_of(folder, "q8_0", tmp_path / "model.gguf")
    if fault in ("scale", "half"):
        path = folder / "model.safetensors"
        tensors = load_file(path)
        name = "model.layers.1.mlp.down_proj.weight"
        if fault == "scale":
            tensors[name] = tensors[name] * 1.1
        else:
            tensors[name][: len(tensors[name]) // 2] = 0
        save_file(tensors, path, metadata={"format": "pt"})
    elif fault == "template":
        template = next(folder.glob("chat_template*"))
        template.write_text(template.read_text() + "Well:")
    else:
        path = folder / "tokenizer.json"
        text = json.loads(path.read_text())
        tokens = text["model"]["vocab"]
        one, other = (next(token for token, number in tokens.items() if number == n) for n in (300, 301))
        tokens[one], tokens[other] = tokens[other], tokens[one]
        path.write_text(json.dumps(text))
    verdict = verify_sides(str(folder), file)
    wanted = {"scale": "model.layers.1.mlp.down_proj.weight", "half": "model.layers.1.mlp.down_proj.weight",
              "template": "template", "tokenizer": "token"}  # fmt: skip
    assert not verdict.equal
    assert wanted[fault] in verdict.differences[0]


def test_rows_that_q8_0_cannot_divide(tmp_path: Path) -> None:
    """Such matrices are f16 in a file of q8_0."""
    config = kit.model_config("llama")
    config.intermediate_size, config.vocab_size = 40, len(tokenizer := make_tokenizer())
    torch.manual_seed(0)
    LlamaForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    file = file_of(tmp_path / "model", "q8_0", tmp_path / "model.gguf")
    verdict = verify_sides(str(tmp_path / "model"), file)
    assert verdict.equal, verdict.differences
    assert "GGUF in f16 and q8_0" in " ".join(verdict.lines())


def test_llama_cpp_is_asked_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = file_of(model_path("tiny-llama"), "f16", tmp_path / "model.gguf")
    monkeypatch.setattr(compare.llama_cpp, "installed", lambda: False)
    assert "with llama-cpp-python" in verify_sides("tiny-llama", file).notes[-1]
    for agreement, equal in ((1.0, True), (0.2, False)):
        proof = compare.llama_cpp.LlamaCppProof(9, 1e-6, agreement, "0")
        monkeypatch.setattr(compare.llama_cpp, "installed", lambda: True)
        monkeypatch.setattr(compare.llama_cpp, "compare", lambda *_, found=proof: found)
        verdict = verify_sides("tiny-llama", file)
        assert verdict.equal == equal
        assert any("in llama.cpp" in line for line in (verdict.notes if equal else verdict.differences))


def test_what_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def told(action: Callable[..., Any], *given: Any, **more: Any) -> str:
        with pytest.raises(UserError) as caught:
            action(*given, **more)
        return str(caught.value)

    junk, cut = tmp_path / "junk.gguf", tmp_path / "cut.gguf"
    junk.write_bytes(b"no such thing")
    file = file_of(model_path("tiny-llama"), "f16", tmp_path / "model.gguf")
    cut.write_bytes(Path(file).read_bytes()[:20_000])
    assert "there is no file" in told(verify_sides, "tiny-llama", str(tmp_path / "none.gguf"))
    assert "is no GGUF file" in told(verify_sides, "tiny-llama", str(junk))
    assert "cannot be read as GGUF" in told(verify_sides, "tiny-llama", str(cut))
    assert "B is a GGUF file" in told(verify_sides, "tiny-llama", file, quantization="nf4")
    with monkeypatch.context() as patch:
        patch.setitem(gguf_file.FORMATS, "q8_0", "Q4_0")
        patch.setattr(gguf_file, "check_file", lambda *_: None)
        coarse = file_of(model_path("tiny-llama"), "q8_0", tmp_path / "coarse.gguf")
    assert "keeps matrices as Q4_0" in told(verify_sides, "tiny-llama", coarse)
