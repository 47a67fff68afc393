"""The Python interface: names and laziness."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import weft


def test_all_is_sorted_and_importable() -> None:
    assert weft.__all__ == [
        "Adapters", "BitFitConfig", "BottleneckConfig", "LoraConfig", "Message", "Part", "PrefixTuningConfig",
        "PromptTuningConfig", "Renderer", "Request", "RunConfig", "Sampling", "Target", "UserError", "describe",
        "generate", "load_base", "load_config", "load_extension", "make_config", "open_target", "register_callback",
        "register_format", "register_method", "register_objective", "train",
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
