"""Settings that cannot work are refused before any weight is loaded, by key, value and allowed range."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from weft.errors import UserError
from weft.training import make_config, run


@pytest.mark.parametrize(
    ("job", "message"),
    [
        ({"method": "lora", "r": 999}, r"r is 999.*it can be 1 to \d+"),
        ({"method": "adalora", "init_r": 999}, r"init_r is 999.*it can be 1 to \d+"),
        ({"method": "adalora", "init_r": 4, "target_r": 2, "tinit": 5, "tfinal": 6}, r"tinit.*tfinal.*(\d+)"),
        ({"method": "adalora", "init_r": 4, "target_r": 2, "total_step": 50}, "total_step"),
        ({"method": "lora", "target_modules": ["input_layernorm"]}, "input_layernorm.*matches no linear"),
        ({"method": "llama_pro", "num_new_blocks": 9}, "num_new_blocks 9.*1 to 2"),
        ({"method": "freeze", "num_layers_trainable": 9}, "num_layers_trainable 9"),
        ({"method": "bottleneck", "leave_out": [7]}, r"leave_out.*0 to 1"),
        ({"method": "bitfit", "add_missing": False}, "add_missing is false"),
        ({"method": "ln_tuning", "target_modules": ["nrom"]}, "nrom"),
        ({"method": "prefix_tuning+llama_pro"}, "llama_pro"),
        ({"method": "full", "task": "seq2seq"}, "seq2seq"),
        ({"method": "lora", "init_lora_weights": "loftq"}, "loftq.*quantization is not set"),
        ({"method": "lora+bitfit", "init_lora_weights": "loftq"}, "loftq.*quantization is not set"),
    ],
)
def test_before_the_weights(
    job: dict[str, Any], message: str, tiny_llama_dir: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def load(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the weights are being loaded")

    monkeypatch.setattr("weft.training.settings.load_base", load)
    given = {"model": str(tiny_llama_dir), "data": str(tiny_data), "steps": 10, "jobs": [job]}
    with pytest.raises(UserError, match=message):
        run.prepare(make_config(given))


def test_a_prefix_on_a_model_without_a_cache(tmp_path: Path, tiny_llama_dir: Path, tiny_data: Path) -> None:
    """A state-space model has no keys to put anything before."""
    import shutil

    from transformers import MambaConfig

    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tiny_llama_dir / name, tmp_path)
    MambaConfig(vocab_size=400, hidden_size=32, num_hidden_layers=2, state_size=4).save_pretrained(tmp_path)
    for method in ("prefix_tuning", "p_tuning_v2"):
        given = {"model": str(tmp_path), "data": str(tiny_data), "method": method, "steps": 2}
        with pytest.raises(UserError) as caught:
            run.prepare(make_config(given))
        assert "cannot be loaded" not in str(caught.value)
        assert "lacks" not in str(caught.value), "it had no weights to load, and must not have looked for them"
