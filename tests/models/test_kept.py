"""What was proved of a base is kept, and holds only while everything that the proof looked at is as it was."""

from __future__ import annotations

import functools
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.models.test_proof import LONGROPE, SIZES, TEXTS, make
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    Gemma2Config,
    MixtralConfig,
    Phi3Config,
    RecurrentGemmaConfig,
    T5Config,
    T5ForConditionalGeneration,
)

from weft.core.architecture import Architecture
from weft.errors import UserError
from weft.models import describe, finding, kept, load, proof, truth

KINDS: dict[str, Callable[[], Any]] = {
    **{kind: functools.partial(kit.make_model, kind) for kind in ("llama", "bloom", "gpt2", "falcon")},
    "gemma2": lambda: make(Gemma2Config(**SIZES, head_dim=8)),
    "mixtral": lambda: make(MixtralConfig(**SIZES, num_local_experts=4)),
    "recurrent_gemma": lambda: make(RecurrentGemmaConfig(**{**SIZES, "num_hidden_layers": 3}, lru_width=32)),
    "bert": lambda: BertForSequenceClassification(BertConfig(**_without_heads())).eval(),
    "t5": lambda: T5ForConditionalGeneration(
        T5Config(vocab_size=97, d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, decoder_start_token_id=0)
    ).eval(),
}


def _without_heads() -> dict[str, Any]:
    return {key: value for key, value in SIZES.items() if key != "num_key_value_heads"}


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("WEFT_CACHE_DIR", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def proofs(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """One entry for each proof that is made."""
    made: list[str] = []
    real = proof._proved

    def counted(model: Any, shape: Architecture) -> Architecture:
        made.append(model.config.model_type)
        return real(model, shape)

    monkeypatch.setattr(proof, "_proved", counted)
    return made


def same(a: Architecture, b: Architecture) -> bool:
    """Fields are equal; of what is installed, what it does."""
    plain = [name for name in a.__dataclass_fields__ if not name.startswith(("install", "tables"))]
    installs = [getattr(s.install_attention, "func", s.install_attention) for s in (a, b)]
    return (
        all(getattr(a, name) == getattr(b, name) for name in plain)
        and installs[0] is installs[1]
        and finding.finding_of(a) == finding.finding_of(b)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_kept_is_what_was_proved(kind: str, tmp_path: Path, proofs: list[str]) -> None:
    made = KINDS[kind]()
    made.save_pretrained(folder := tmp_path / "model")
    model, again = (type(made).from_pretrained(folder, trust_remote_code=False).eval() for _ in range(2))
    proved, recalled = describe(model, folder), describe(again, folder)
    assert len(proofs) == 1
    assert same(proved, recalled)
    if not (proved.bidirectional or proved.memory_linears):
        ours = proof.our_output(again, recalled, TEXTS)
        assert all(torch.equal(a, b) for a, b in zip(ours, proof.our_output(model, proved, TEXTS), strict=True))


def test_tables_of_each_sequence_are_kept(tmp_path: Path, proofs: list[str]) -> None:
    model = make(Phi3Config(**SIZES, original_max_position_embeddings=16, rope_parameters=LONGROPE))
    model.save_pretrained(folder := tmp_path / "model")
    proved, recalled = describe(model, folder), describe(model, folder)
    assert len(proofs) == 1
    assert proved.install_tables is not None
    assert same(proved, recalled)
    for text, found in zip(TEXTS, proof.our_output(model, recalled, TEXTS), strict=True):
        alone = model(torch.tensor([text])).logits[0]
        limit = truth.UNITS * torch.finfo(torch.float32).eps * float(alone.detach().abs().max())
        kit.measured("tables recalled", float((alone - found).detach().abs().max()), limit, derived=True)


def rewritten(folder: Path) -> None:
    path = folder / "model.safetensors"
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)


def other_config(folder: Path) -> None:
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"rms_norm_eps": 1e-3}))


def copied_over(folder: Path) -> None:
    """Another file of the same size and time."""
    path = folder / "model.safetensors"
    before = path.stat()
    shutil.copy(path, folder / "other")
    os.replace(folder / "other", path)
    os.utime(path, ns=(before.st_atime_ns, before.st_mtime_ns))


@pytest.mark.parametrize("change", [rewritten, other_config, copied_over])
def test_another_folder_is_proved_again(change: Any, tiny_llama_dir: Path, tmp_path: Path, proofs: list[str]) -> None:
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    for _ in range(2):
        load.load_base(str(folder))
    assert len(proofs) == 1
    change(folder)
    load.load_base(str(folder))
    assert len(proofs) == 2


def test_other_code_proves_again(
    tiny_llama_dir: Path, proofs: list[str], monkeypatch: pytest.MonkeyPatch, cache: Path
) -> None:
    load.load_base(str(tiny_llama_dir))
    monkeypatch.setattr(kept, "_own_code", lambda: "of tomorrow")
    for _ in range(2):
        load.load_base(str(tiny_llama_dir))
    assert len(proofs) == 2
    monkeypatch.setattr(torch.backends.cpu, "get_cpu_capability", lambda: "of another machine")
    load.load_base(str(tiny_llama_dir))
    assert len(proofs) == 3
    assert len(list((cache / "proofs").iterdir())) == 1


def test_a_dtype_is_another_base(tiny_llama_dir: Path, proofs: list[str], cache: Path) -> None:
    for dtype in ("float32", "bfloat16") * 2:
        load.load_base(str(tiny_llama_dir), dtype=dtype)
    assert len(proofs) == 2
    assert len(list((cache / "proofs").iterdir())) == 2


def nothing(path: Path) -> None:
    path.write_bytes(b"")


def deep(path: Path) -> None:
    path.write_text("[" * 100_000)


def of_another_kind(path: Path) -> None:
    """All that is asked for is there, and none of it is what it should be."""
    whole = json.loads(path.read_text())
    path.write_text(json.dumps(whole | {"finding": dict.fromkeys(whole["finding"], 7)}))


def of_another_model(path: Path) -> None:
    whole = json.loads(path.read_text())
    whole["finding"]["fused"] = {"model.layers.9.mlp": "_FusedMlp"}
    path.write_text(json.dumps(whole))


def a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


@pytest.mark.parametrize("damage", [nothing, deep, of_another_kind, of_another_model, a_folder])
def test_a_damaged_file_proves_again(damage: Any, tiny_llama_dir: Path, proofs: list[str], cache: Path) -> None:
    load.load_base(str(tiny_llama_dir))
    (path,) = (cache / "proofs").iterdir()
    damage(path)
    load.load_base(str(tiny_llama_dir))
    assert len(proofs) == 2
    assert [p for p in (cache / "proofs").iterdir() if p.suffix != ".json"] == []


@pytest.fixture
def _planted(monkeypatch: pytest.MonkeyPatch) -> None:
    """A base that gives NaN."""
    monkeypatch.setattr(proof, "check_finite", lambda *_: (_ for _ in ()).throw(UserError("planted")))


@pytest.mark.usefixtures("_planted")
def test_a_refusal_is_not_kept(tiny_llama_dir: Path, cache: Path) -> None:
    for _ in range(2):
        with pytest.raises(UserError, match="planted"):
            load.load_base(str(tiny_llama_dir), dtype="bfloat16")
    assert not cache.exists()


def test_nothing_is_kept_where_there_is_no_place(
    tiny_llama_dir: Path, tmp_path: Path, proofs: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "file").write_text("in the way")
    for place in ("", str(tmp_path / "file")):
        monkeypatch.setenv("WEFT_CACHE_DIR", place)
        load.load_base(str(tiny_llama_dir))
    assert len(proofs) == 2


def test_a_link_to_nothing_beside_the_weights_is_no_matter(
    tiny_llama_dir: Path, tmp_path: Path, proofs: list[str]
) -> None:
    folder = Path(shutil.copytree(tiny_llama_dir, tmp_path / "model"))
    (folder / "notes.json").symlink_to(folder / "gone.json")
    for _ in range(2):
        load.load_base(str(folder))
    assert len(proofs) == 1


def test_a_tiny_one_is_not_kept(proofs: list[str], cache: Path) -> None:
    load.load_base("tiny-llama", shape="tiny")
    assert not cache.exists()
