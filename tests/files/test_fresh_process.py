"""What a run trained comes back to the last bit in a process that has never seen it: heads, whole modules, the rest."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tests import kit
from torch import Tensor

from weft.api import Adapters
from weft.data import Sample
from weft.files.adapter_folder import stored_tensors
from weft.files.tensors import digest
from weft.heads.classification import ClassificationTask
from weft.models import load_base
from weft.objectives.passes import logits_of
from weft.training import Job, JobConfig, Trainer

TEXTS = kit.texts(3, low=5)
TRAINED = {
    "classes": {"method": "lora"},
    "prompt": {"method": "prompt_tuning", "method_settings": {"num_virtual_tokens": 3}},
    "whole": {"method": "lora", "method_settings": {"modules_to_save": ["lm_head", "norm"], "use_dora": True}},
}
HEADS = {"classes": ClassificationTask(("up", "down")), "prompt": ClassificationTask(("one", "two", "three"))}


def state(adapters: Adapters, name: str) -> dict[str, str]:
    """The SHA-256 of each tensor in the adapter's file, and of its answers to some texts."""
    found = {key: digest(tensor) for key, tensor in stored_tensors(adapters[name]).items()}
    with torch.no_grad():
        for number, ids in enumerate(TEXTS):
            logits: Tensor = logits_of(adapters, name, [Sample(ids, [0.0] * len(ids), "a text")])
            found[f"answer {number}"] = digest(logits)
    return found


def loaded(base: str, folder: str) -> dict[str, dict[str, str]]:
    """The states of all adapters in a folder."""
    model = load_base(base)
    adapters = Adapters(model.model, model.architecture)
    for path in sorted(Path(folder).iterdir()):
        adapters.load(path.name, path)
    return {name: state(adapters, name) for name in adapters.names}


def test_heads_and_whole_modules_come_back_bitwise(tiny_llama_dir: Path, tmp_path: Path) -> None:
    base = load_base(str(tiny_llama_dir))
    adapters = Adapters(base.model, base.architecture)
    jobs = []
    for seed, (name, settings) in enumerate(TRAINED.items()):
        config = JobConfig(name=name, steps=3, batch_size=2, learning_rate=0.01, **settings)
        adapter = adapters.add(name, config.method_config(), seed=seed, head=HEADS.get(name))
        samples = kit.samples(6, seed=seed)
        if name in HEADS:
            samples = [
                Sample(s.input_ids, [0.0] * len(s.input_ids), s.source, label=i % 2) for i, s in enumerate(samples)
            ]
        jobs.append(Job(config, adapter, samples, []))
    ended = Trainer(adapters, jobs, on_event=lambda event: None).run().jobs
    assert {job["ended"] for job in ended.values()} == {"finished"}
    for name in adapters.names:
        adapters.save(name, tmp_path / "adapters" / name)
    heads = [key for name in HEADS for key in state(adapters, name) if key.endswith("score.weight")]
    assert len(heads) == 2
    assert any("lm_head" in key for key in state(adapters, "whole"))

    words = [sys.executable, __file__, str(tiny_llama_dir), str(tmp_path / "adapters")]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    fresh = subprocess.run(words, capture_output=True, text=True, check=True, env=environment)
    assert json.loads(fresh.stdout) == {name: state(adapters, name) for name in sorted(adapters.names)}


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps(loaded(sys.argv[1], sys.argv[2])))
