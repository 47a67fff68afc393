"""What the command line says of a base with experts, and a run that adapts them."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.conftest import _save, make_tokenizer
from tests.kit.experts import make_moe

SENTENCE = (
    "lora: method lora leaves mlp.experts.gate_up_proj and mlp.experts.down_proj as they are, {share:.1%} of the "
    "base's parameters: experts that are held as parameters are no linear modules. To adapt them too, set "
    "target_parameters: [mlp.experts.gate_up_proj, mlp.experts.down_proj]."
)
BOTH = "target_parameters=[mlp.experts.gate_up_proj, mlp.experts.down_proj]"


@pytest.fixture(scope="module")
def tiny_moe_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Qwen3-MoE of two layers and four experts."""
    tokenizer = make_tokenizer()
    special = {"eos_token_id": tokenizer.eos_token_id, "bos_token_id": None, "pad_token_id": tokenizer.pad_token_id}
    more = {"vocab_size": len(tokenizer), "max_position_embeddings": 256, **special}
    return _save(
        tmp_path_factory.mktemp("models") / "tiny-moe", make_moe("qwen3_moe", torch.float32, **more), tokenizer
    )


@pytest.fixture(scope="module")
def sentence(tiny_moe_dir: Path) -> str:
    from safetensors.torch import load_file

    sizes = {key: tensor.numel() for key, tensor in load_file(tiny_moe_dir / "model.safetensors").items()}
    return SENTENCE.format(share=sum(n for key, n in sizes.items() if ".experts." in key) / sum(sizes.values()))


def test_preview_says_what_is_not_reached(
    weft: Callable[..., Any], tiny_moe_dir: Path, tiny_data: Path, sentence: str, tmp_path: Path
) -> None:
    words = ["preview", "--model", tiny_moe_dir, "--data", tiny_data, "method=lora"]
    page = tmp_path / "page.html"
    run = weft(*words, "--samples", 0, "--html", page)
    assert sentence in " ".join(run.out.split())
    assert "leaves mlp.experts.gate_up_proj" in page.read_text()
    value = json.loads(weft(*words, "--json").out)
    assert value["data"][0]["not_reached"]["lora"]["names"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    assert json.loads(weft(*words, BOTH, "--json").out)["data"][0]["not_reached"] == {}


def test_train_says_it_before_the_first_step(
    weft: Callable[..., Any], tiny_moe_dir: Path, tiny_data: Path, sentence: str
) -> None:
    words = ["train", "--model", tiny_moe_dir, "--data", tiny_data, "--method", "lora", "steps=1"]
    run = weft(*words, "--output-dir", "one")
    assert run.code == 0, run.err
    assert sentence in run.out.partition("\n\n")[0]  # above the table of results
    (job,) = json.loads(weft(*words, "--output-dir", "two", "--json").out)["jobs"]
    assert job["not_reached"]["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def test_experts_are_trained_saved_and_merged(weft: Callable[..., Any], tiny_moe_dir: Path, tiny_data: Path) -> None:
    words = ["train", "--model", tiny_moe_dir, "--data", tiny_data, "--method", "lora", "--output-dir", "run"]
    run = weft(*words, BOTH, "target_modules=[]", "steps=3", "learning_rate=1e-2")
    assert run.code == 0, run.err
    assert "leaves" not in run.out
    entries = json.loads(Path("run/adapters/lora/adapter_config.json").read_text())
    assert entries["target_modules"] == []
    assert entries["target_parameters"] == ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]
    merged = weft("merge", "--adapter", "run", "--output", "merged")
    assert merged.code == 0, merged.err
    assert "same likeliest token at 100 %" in merged.out
    assert weft("generate", "run", "--prompt", "hello", "--max-new-tokens", 2).code == 0


def test_a_wrong_name_ends_before_anything_is_written(
    weft: Callable[..., Any], tiny_moe_dir: Path, tiny_data: Path
) -> None:
    words = ["train", "--model", tiny_moe_dir, "--data", tiny_data, "--method", "lora", "--output-dir", "run"]
    run = weft(*words, "target_parameters=[experts.gate_up_prog]")
    assert run.code == 2
    assert "Did you mean 'experts.gate_up_proj'?" in run.err
    assert not Path("run").exists()
