"""A target with adapters that answer otherwise than the base, and tasks in files, for tests of the evaluation."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
import yaml

from weft.api import LoraConfig, PrefixTuningConfig
from weft.evaluate.tasks import Task, find_tasks
from weft.generation.open import open_target
from weft.generation.target import Target

CHOICES = {
    "name": "animals", "kind": "multiple_choice", "prompt": "{{ q }}", "choices": "choices", "reference": "{{ gold }}",
    "metrics": ["acc", "acc_norm"],
}  # fmt: skip
WRITING = {
    "name": "sums", "kind": "generation", "prompt": "{{ q }}", "reference": "{{ gold }}", "max_new_tokens": 6,
    "metrics": ["exact_match", "f1"],
}  # fmt: skip
TEXTS = {"name": "texts", "kind": "perplexity", "text": "{{ q }}", "metrics": ["bits_per_byte", "perplexity"]}


def rows(count: int = 6) -> list[dict[str, Any]]:
    words = ["a small dog", "a cat", "rain", "the sun"]
    return [{"q": f"Question {n}: what is it?", "choices": words, "gold": n % 4} for n in range(count)]


def task(
    folder: Path, settings: Mapping[str, Any], records: Sequence[Mapping[str, Any]] | None = None, **load: Any
) -> Task:
    """The task of these settings, from a YAML file with its data beside."""
    name = settings["name"]
    data = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in (rows() if records is None else records))
    (folder / f"{name}.jsonl").write_text(data, encoding="utf-8")
    path = folder / f"{name}.yaml"
    path.write_text(yaml.safe_dump({"data": f"{name}.jsonl", **settings}, allow_unicode=True), encoding="utf-8")
    (named,) = find_tasks([str(path)], fewshot_data=load.pop("fewshot_data", ()))
    return named.load(**load)


def opened(**scales: float) -> Target:
    """The embedded base with adapters of these names, whose parameters are drawn with these scales."""
    target = open_target("tiny-llama")
    for seed, (name, scale) in enumerate(scales.items()):
        config = PrefixTuningConfig(num_virtual_tokens=3) if name.startswith("prefix") else LoraConfig(r=4)
        adapter = target.adapters.add(name, config)
        generator = torch.Generator().manual_seed(seed)
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.copy_(scale * torch.randn(parameter.shape, generator=generator))
    return replace(target, names=tuple(scales))
