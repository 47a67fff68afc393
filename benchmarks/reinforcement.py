"""GRPO, RLOO and PPO on sums that can be checked: exact match before and after, with several seeds.

    python benchmarks/reinforcement.py --seeds 3 --output benchmarks/results/FILE.md

LoRA over the embedded Llama learns the embedded sums until it is right about half of the time. From there each
objective goes on with answers of its own, rewarded by the right answer, or (``ppo, reward model``) by a reward adapter
that was trained on pairs of right and wrong answers. Exact match is that of the likeliest answers to held-out sums.
"""

from __future__ import annotations

import argparse
import json
import platform
import random
import statistics
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

import weft
from weft.assets import instructions_path

CHECKED = ["exact_answer"]
COMMON: dict[str, Any] = {"model": "tiny-llama", "method": "lora", "progress": False, "overwrite_output_dir": True}
WRITING = {"max_completion_length": 8}
# By name: the objective, its settings, and those of the job.
OBJECTIVES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "grpo": ("grpo", {"num_generations": 8}, {"steps": 150}),
    "rloo": ("rloo", {"num_generations": 8}, {"steps": 150}),
    "ppo": ("ppo", {"num_generations": 4}, {"steps": 400}),
    "ppo, reward model": (
        "ppo", {"num_generations": 4, "value_learning_rate": 3e-3}, {"steps": 400, "learning_rate": 5e-4}
    ),
}  # fmt: skip


def sums(split: str) -> list[dict[str, str]]:
    """The sums of the embedded task."""
    rows = [json.loads(line) for line in instructions_path(split).read_text(encoding="utf-8").splitlines()]
    return [{key: row[key] for key in ("instruction", "output")} for row in rows if row["task"] == "arithmetic"]


def written(rows: list[dict[str, str]], path: Path) -> str:
    """The path of a file with these rows."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def pairs(rows: list[dict[str, str]]) -> list[dict[str, str]]:
    """Each right answer beside every wrong one up to 20, in random order."""
    found = [
        {"prompt": row["instruction"], "chosen": row["output"], "rejected": str(wrong)}
        for row in rows
        for wrong in range(21)
        if wrong != int(row["output"])
    ]
    random.Random(0).shuffle(found)
    return found


def last(folder: str, key: str, first: bool = False) -> float:
    """A figure of the last (or first) evaluation of a run."""
    told = [row[key] for row in weft.read_metrics(folder) if row["event"] == "eval" and key in row]
    return float(told[0 if first else -1])


def one_seed(seed: int, folder: Path, names: list[str]) -> dict[str, dict[str, float]]:
    """Exact match before and after, KL and seconds of each objective."""
    train, held = written(sums("train"), folder / "train.jsonl"), written(sums("eval"), folder / "eval.jsonl")
    start = str(folder / "sft")
    weft.train(**COMMON, data=train, output_dir=start, steps=80, batch_size=16, learning_rate=3e-3, seed=seed)
    judge, found = str(folder / "judge"), {}
    for name in names:
        objective, settings, job = OBJECTIVES[name]
        rewards: list[Any] = [*CHECKED]
        begun = time.perf_counter()
        if name == "ppo, reward model":
            weft.train(
                **COMMON, data=written(pairs(sums("train")), folder / "pairs.jsonl"), output_dir=judge, steps=1200,
                batch_size=32, learning_rate=2e-3, r=16, objective="reward", seed=seed, eval_size=200,
            )  # fmt: skip
            rewards = [{"adapter": f"{judge}/adapters/lora"}, {"reward": "exact_answer", "weight": 0}]
        trained = time.perf_counter()
        output = str(folder / objective)
        weft.train(**{
            **COMMON, "data": train, "eval_data": held, "output_dir": output, "batch_size": 32, "seed": seed,
            "learning_rate": 1e-3, "start_from": f"{start}/adapters/lora", "objective": objective,
            "objective_settings": {"rewards": rewards, **WRITING, **settings}, "logging_steps": 25, **job,
        })  # fmt: skip
        kl = [row["kl"] for row in weft.read_metrics(output) if row["event"] == "step" and "kl" in row][-1]
        key = "eval_rewards/exact_answer"
        found[name] = {
            "before": last(output, key, first=True), "after": last(output, key), "kl": kl,
            "seconds": time.perf_counter() - trained, "judge_seconds": trained - begun,
        }  # fmt: skip
        if name == "ppo, reward model":
            found[name]["judge_accuracy"] = last(judge, "eval_accuracy")
        print(seed, name, {k: round(v, 3) for k, v in found[name].items()}, flush=True)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("names", nargs="*", help=f"default: {', '.join(OBJECTIVES)}")
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    names = options.names or list(OBJECTIVES)
    found = []
    for seed in range(options.seeds):
        with tempfile.TemporaryDirectory() as folder:
            found.append(one_seed(seed, Path(folder), names))
    lines = [
        "# Sums, by reinforcement", "",
        f"{date.today()}, {platform.machine()}, {torch.get_num_threads()} threads. "
        f"`python benchmarks/reinforcement.py --seeds {options.seeds}`", "",
        "| objective | exact match before, by seed | after | gain, mean | KL per token | seconds |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    for name in names:
        rows = [one[name] for one in found]
        gain = statistics.mean(row["after"] - row["before"] for row in rows)
        before, after = (", ".join(f"{100 * row[key]:.1f}" for row in rows) for key in ("before", "after"))
        kl, seconds = (statistics.mean(row[key] for row in rows) for key in ("kl", "seconds"))
        lines.append(f"| {name} | {before} | {after} | {100 * gain:+.1f} | {kl:.2f} | {seconds:.0f} |")
    judged = [one["ppo, reward model"] for one in found if "ppo, reward model" in one]
    if judged:
        accuracy = ", ".join(f"{100 * row['judge_accuracy']:.1f}" for row in judged)
        spent = statistics.mean(row["judge_seconds"] for row in judged)
        lines += ["", f"The reward models are right about {accuracy} % of 200 held-out pairs ({spent:.0f} s each)."]
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    torch.set_num_threads(2)
    main()
