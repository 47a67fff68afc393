"""The judge of ``benchmarks/architectures.py``: it covers all types, passes what is right, and sees what is not."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from benchmarks import architecture_configs as configs
from benchmarks.architecture_judge import COLUMNS, NAMED, Judge
from benchmarks.architecture_report import report
from benchmarks.architecture_truth import relative, write_model
from tests.conftest import make_tokenizer
from torch import Tensor, nn

from weft.errors import UserError
from weft.methods import METHODS
from weft.methods.lora import LoraConfig


def judge(tmp_path: Path, name: str) -> Judge:
    write_model(name, tmp_path, make_tokenizer())
    return Judge(name, tmp_path)


def outcomes(found: dict[str, Any]) -> dict[str, str]:
    return {column: cell.outcome for column, cell in found.items()}


def test_every_type_has_a_configuration() -> None:
    names = configs.names()
    assert {name.split(":")[0] for name in names} == set(configs.types())
    assert set(configs.EXCEPTIONS) <= set(configs.types()) or not _newest()
    assert {"llama:longrope", "gpt2:inverse", "falcon:rw"} <= set(names)


def _newest() -> bool:
    """Whether this transformers is one that the table was made for: an older one lacks types."""
    from importlib.metadata import version

    return tuple(int(part) for part in version("transformers").split(".")[:2]) >= (5, 24)


@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2:caps", "mixtral"])
def test_configurations_are_tiny_and_windows_shorter_than_the_texts(name: str) -> None:
    from transformers import AutoModelForCausalLM

    config = configs.make_config(name)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    assert sum(p.numel() for p in model.parameters()) < 300_000
    assert (getattr(config, "sliding_window", None) or 0) < max(configs.LENGTHS)


def test_no_weight_is_neutral(tmp_path: Path) -> None:
    """A path that drops a gain, a bias or a sink must give other logits."""
    model = judge(tmp_path, "gemma2").truth.model
    for name, parameter in model.named_parameters():
        assert parameter.std() > 0.03, name


def test_what_is_right_passes(tmp_path: Path) -> None:
    found = outcomes(judge(tmp_path, "llama").judge(["lora", "ln_tuning", "prefix_tuning", "hard_prompt"]))
    assert set(found.values()) == {"stream"}, found


def _no_scale(model: nn.Module, body: Any, form: Any, hidden: Tensor) -> Tensor:
    return model.get_output_embeddings()(hidden)  # type: ignore[operator]


def _begun(self: LoraConfig, name: str, context: Any) -> Any:
    adapter = _BUILD(self, name, context)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.01)
    return adapter


def _untrained(self: LoraConfig, name: str, context: Any) -> Any:
    adapter = _BUILD(self, name, context)
    parameter = next(iter(adapter.parameters()))
    parameter.register_hook(torch.zeros_like)
    return adapter


_BUILD = LoraConfig.build
FAULTS: dict[str, tuple[str, Any, str, Any, str, str]] = {
    "scale ignored": ("granite:multipliers", "weft.core.adapters", "head_logits", _no_scale, "base", "mixed batch"),
    "not the identity": ("llama", LoraConfig, "build", _begun, "lora", "not the identity at init"),
    "untrained tensor": ("llama", LoraConfig, "build", _untrained, "lora", "no gradient at 1 trained"),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_planted_faults_are_seen(fault: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, where, what, instead, column, words = FAULTS[fault]
    if isinstance(where, str):
        monkeypatch.setattr(f"{where}.{what}", instead)
    else:
        monkeypatch.setattr(where, what, instead)
    found = outcomes(judge(tmp_path, name).judge([] if column == "base" else [column]))
    # What proves itself at load or at attach may refuse it; it must not be told to be right.
    assert words in found[column] or found[column].startswith("refused"), found
    assert found[column].startswith(("WRONG", "refused"))


def test_a_refusal_must_name_what_it_refuses(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    one = judge(tmp_path, "llama")

    def refuse(self: LoraConfig, name: str, context: Any) -> Any:
        raise UserError(sentence)

    monkeypatch.setattr(LoraConfig, "build", refuse)
    sentence = "this cannot be."
    assert outcomes(one.judge(["lora"]))["lora"].startswith("CRASH: a refusal that names neither")
    sentence = "this llama model cannot be."
    assert outcomes(one.judge(["lora"]))["lora"] == f"refused: {sentence}"


def test_columns_are_all_methods() -> None:
    assert {"base", NAMED, *METHODS} <= set(COLUMNS)


def test_the_report_counts_and_shows_what_is_wrong() -> None:
    def cell(outcome: str) -> dict[str, Any]:
        return {"outcome": outcome, "notes": []}

    found = {
        "llama": {"base": cell("stream"), "lora": cell("stream")},
        "mamba2": {"base": cell("padded"), "lora": cell("WRONG: merged by 0.3")},
        "bert": {"base": cell("refused: bert is an encoder."), "lora": cell("refused: bert is an encoder.")},
        "musicgen": {"not_made": "no"},
    }
    text, bad = report(json.loads(json.dumps(found)), ["lora"], "command", 60.0)
    assert bad == 1
    assert "**4 types, 4 configurations; 3 types, 3 configurations made tiny.**" in text
    assert "| stream | 1 | 1 | 2 |" in text
    assert "- `mamba2` lora: WRONG: merged by 0.3" in text
    assert "| mamba2 | padded | **WRONG** |" in text
    assert "- `bert` all: bert is an encoder." in text


def test_differences_are_shares_of_the_largest_number() -> None:
    assert relative(torch.tensor([4.0, -8.0]), torch.tensor([4.0, -6.0])) == 0.25
    assert relative(torch.zeros(2), torch.zeros(3)) == float("inf")
    assert relative(torch.ones(2), torch.tensor([1.0, float("nan")])) == float("inf")
