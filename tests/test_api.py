"""The Python interface: names and laziness."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch

import weft


def test_all_is_sorted_and_importable() -> None:
    assert weft.__all__ == [
        "AdaLoraConfig", "Adapters", "BitFitConfig", "BottleneckConfig", "Constraint", "Engine", "FreezeConfig",
        "FullConfig", "HardPromptConfig", "IA3Config", "LNTuningConfig", "Limits", "LlamaProConfig", "LoraConfig",
        "Message",
        "PTuningConfig", "PTuningV2Config", "Part", "PrefixTuningConfig", "PromptTuningConfig", "Renderer",
        "Request", "RunConfig", "Sampling", "Target", "TrainableTokensConfig", "UserError", "VeraConfig",
        "describe", "generate", "load_base", "load_config", "load_extension", "make_config", "open_target",
        "read_metrics", "register_callback", "register_format", "register_method", "register_objective",
        "register_reward", "train",
    ]  # fmt: skip


def test_import_is_light() -> None:
    code = "import sys, weft; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_train_and_generate_from_python(tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    settings = {"model": str(tiny_llama_dir), "data": str(tiny_data), "method": "lora", "steps": 1}
    result = weft.train(weft.make_config({**settings, "output_dir": str(tmp_path / "run")}))
    assert result.completed
    opened = weft.open_target(tmp_path / "run")
    request = weft.Request(opened.prompt_ids("one"), "lora", 3)
    (done,) = weft.generate(opened.adapters, [request], stop_ids=opened.stop_ids)
    assert len(done.ids) <= 3
    opened.close()


def test_the_rows_of_the_head_come_from_the_stream(tiny_llama_dir: Path) -> None:
    """An adapter on the head was left out in silence where nobody said whose rows these are."""
    base = weft.load_base(str(tiny_llama_dir), dtype="float32")
    adapters = weft.Adapters(base.model, base.architecture)
    adapters.add("x", weft.LoraConfig(r=4, target_modules=["lm_head"], init_lora_weights=False))
    with torch.no_grad():
        stream = adapters.stream([weft.Part("x", [[5, 6, 7]]), weft.Part(None, [[5, 6, 7]])])
        hidden = adapters.forward(stream)
        logits = adapters.logits(hidden, stream)
        assert torch.equal(logits, adapters.logits(hidden)), "these hidden states have just come from forward"
        assert torch.equal(logits, adapters.logits(hidden, [("x", 3), (None, 3)]))
    assert not torch.equal(logits[:3], logits[3:])
    with pytest.raises(weft.UserError, match="adapter 'x' changes the head"):
        adapters.logits(hidden.clone())
    adapters.remove("x")
    torch.testing.assert_close(adapters.logits(hidden[3:]), logits[3:])  # another number of rows: another sum
    adapters.close()
