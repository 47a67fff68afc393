"""Results of made-up contestants, and runs with losses, for tests of reports."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from safetensors.torch import save_file

from weft.evaluate.results import Contestant, Item, Results, Score, TaskRecord
from weft.evaluate.statistics import mean

TEMPLATE = "{{ messages[0]['content'] }}</s>"
FACTS = {"template": TEMPLATE, "stops": "</s>"}
QUIZ = TaskRecord("quiz", "multiple_choice", "acc", facts={"sha256": "aa11", "num_fewshot": 0, "file": "quiz.jsonl"})
TEXT = TaskRecord(
    "wiki", "perplexity", "cross_entropy", higher_is_better=False, facts={"general": True, "sha256": "bb22"}
)


def quiz_items(name: str, right: Sequence[int], task: str = "quiz", metric: str = "acc") -> list[Item]:
    """One item for each verdict; the reference is ``A``."""
    return [
        Item(
            contestant=name,
            task=task,
            item=str(i),
            scores={metric: float(one)},
            output="A" if one else "B",
            reference="A",
            asked=f"Question {i}?",
            prompt_tokens=20,
            answer_tokens=3,
        )
        for i, one in enumerate(right)
    ]


def text_items(name: str, losses: Sequence[float], task: str = "wiki") -> list[Item]:
    """One document for each loss."""
    return [
        Item(contestant=name, task=task, item=str(i), scores={"cross_entropy": one}, prompt_tokens=100)
        for i, one in enumerate(losses)
    ]


def results(
    contestants: Sequence[Contestant],
    tasks: Sequence[TaskRecord],
    items: Sequence[Item],
    facts: Mapping[str, object] | None = None,
) -> Results:
    """Results with the scores that belong to the items."""
    scores = []
    for one in contestants:
        for task in tasks:
            own = [item for item in items if (item.contestant, item.task) == (one.name, task.name)]
            for metric in dict.fromkeys(key for item in own for key in item.scores):
                found = mean([item.scores[metric] for item in own])
                scores.append(
                    Score(
                        contestant=one.name,
                        task=task.name,
                        metric=metric,
                        value=found.value,
                        stderr=found.stderr,
                        n=found.n,
                    )
                )
    told = {"base": "tiny", **(facts or {})}
    return Results(contestants=contestants, tasks=tasks, items=items, scores=scores, facts=told)


def simple(changes: Mapping[str, Sequence[int]] | None = None, base: Sequence[int] = (1,) * 60 + (0,) * 40) -> Results:
    """The base and adapters on one task; ``changes``: of each adapter, the items that come out otherwise."""
    contestants = [Contestant("base", "base", FACTS)]
    items = quiz_items("base", base)
    for name, turned in (changes or {"lora": range(50, 80)}).items():
        contestants.append(Contestant(name, "adapter", {**FACTS, "method": "lora"}))
        items += quiz_items(name, [1 - one if i in turned else one for i, one in enumerate(base)])
    return results(contestants, [QUIZ], items)


def make_run(folder: Path, jobs: Sequence[str] = ("lora", "ia3"), eval_key: str = "eval_loss") -> Path:
    """A run's folder as training leaves it, without its tensors' meaning."""
    settings = [
        {"name": job, "method": job, "method_settings": {"r": 8}, "learning_rate": 1e-3, "steps": 20} for job in jobs
    ]
    folder.mkdir(parents=True)
    (folder / "run.json").write_text(json.dumps({"format": 2, "config": {"model": "tiny-llama", "jobs": settings}}))
    lines = []
    for job in jobs:
        for step in range(0, 21, 5):
            lines.append({"event": "eval", "job": job, "step": step, eval_key: 3.0 / (step + 1)})
            if step:
                lines.append({"event": "step", "job": job, "step": step, "loss": 3.2 / step, "tokens": 100 * step,
                              "tokens_per_second": 50.0, "memory_gb": 0.5})  # fmt: skip
        (folder / "adapters" / job).mkdir(parents=True)
        save_file({"a": torch.zeros(8, 4)}, folder / "adapters" / job / "adapter_model.safetensors")
        (folder / "checkpoints" / "step-00000020").mkdir(parents=True, exist_ok=True)
        save_file(
            {"parameter.a": torch.zeros(8, 4), "optimizer.a": torch.zeros(8, 4)},
            folder / "checkpoints" / "step-00000020" / f"{job}.safetensors",
        )
    (folder / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


def write(folder: Path, found: Results) -> Path:
    """The folder with these results in it."""
    folder.mkdir(parents=True)
    found.write(folder)
    return folder
