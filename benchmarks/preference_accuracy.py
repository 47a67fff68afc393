"""DPO and reward models on real pairs and on the embedded sums: how often the better of two answers is found.

    python benchmarks/preference_accuracy.py --pairs dpo_en.json --base stories260K --output benchmarks/results/FILE.md

Real pairs: five folds, so that every pair is held out once; a base of 512 positions sees the end of a prompt and the
beginning of each answer. Sums: over an embedded base that learned to write, pairs of a right and a wrong answer to sums
that it never saw. Beside each accuracy stand its standard error and what length alone gets right.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import tempfile
from collections.abc import Sequence
from datetime import date
from pathlib import Path
from typing import Any

import torch

import weft
from reinforcement import pairs, sums, written

FOLDS = 5
COMMON: dict[str, Any] = {"progress": False, "overwrite_output_dir": True, "logging_steps": 50}


def real_pairs(path: Path, prompt: int, answer: int) -> list[dict[str, str]]:
    """The pairs of a file of conversations, cut to so many characters, in random order."""
    found = []
    for row in json.loads(path.read_text(encoding="utf-8")):
        question = row["conversations"][-1]["value"][-prompt:]
        chosen, rejected = (row[key]["value"][:answer] for key in ("chosen", "rejected"))
        if chosen != rejected:
            found.append({"prompt": question, "chosen": chosen, "rejected": rejected})
    random.Random(0).shuffle(found)
    return found


def accuracy(folder: Path, jobs: Sequence[dict[str, Any]], **settings: Any) -> dict[str, tuple[float, float]]:
    """By job: how often it was right at the end of a run, and how often length is."""
    weft.train(**{**COMMON, "output_dir": str(folder), "jobs": list(jobs), **settings})
    last = {row["job"]: row for row in weft.read_metrics(folder) if row["event"] == "eval" and "eval_accuracy" in row}
    return {name: (float(row["eval_accuracy"]), float(row["eval_length_baseline"])) for name, row in last.items()}


def on_real_pairs(options: argparse.Namespace, folder: Path) -> list[tuple[str, str, float, int, float]]:
    """(data, job, accuracy, pairs, length) over all folds."""
    rows = real_pairs(options.pairs, options.prompt, options.answer)
    jobs = [
        {"name": "dpo", "method": options.method, "objective": "dpo", "learning_rate": options.rates[0]},
        {"name": "reward", "method": options.method, "objective": "reward", "learning_rate": options.rates[1]},
    ]
    right: dict[str, list[float]] = {}
    for fold in range(FOLDS):
        held = rows[fold::FOLDS]
        rest = [row for number, row in enumerate(rows) if number % FOLDS != fold]
        found = accuracy(
            folder / f"fold{fold}", jobs, model=options.base, data=written(rest, folder / "train.jsonl"),
            eval_data=written(held, folder / "held.jsonl"), epochs=options.epochs, batch_size=8, max_length=512,
            truncation="right",
        )  # fmt: skip
        for name, (share, length) in found.items():
            right.setdefault(name, [0.0, 0.0])
            right[name][0] += share * len(held)
            right[name][1] += length * len(held)
        print(fold, found, flush=True)
    return [
        (options.pairs.stem, name, count / len(rows), len(rows), length / len(rows))
        for name, (count, length) in right.items()
    ]


def on_sums(folder: Path) -> list[tuple[str, str, float, int, float]]:
    """The same of sums that neither the base nor a judge ever saw."""
    base = {"model": "tiny-llama", "method": "lora", "r": 16}
    start = str(folder / "sft")
    weft.train(**COMMON, **base, data=written(sums("train"), folder / "sums.jsonl"), output_dir=start, steps=200,
               batch_size=16, learning_rate=3e-3)  # fmt: skip
    held = pairs(sums("eval"))[:400]
    own = {"data": written(pairs(sums("train")), folder / "train.jsonl"), "batch_size": 32,
           "eval_data": written(held, folder / "held.jsonl")}  # fmt: skip
    found = []
    for name, job in (
        ("dpo", {"objective": "dpo", "start_from": f"{start}/adapters/lora", "learning_rate": 1e-3, "steps": 200}),
        ("reward", {"objective": "reward", "r": 16, "learning_rate": 2e-3, "steps": 1200}),
    ):
        settings = {"model": "tiny-llama", **own, "steps": job.pop("steps")}
        (share, length), = accuracy(folder / "sums", [{"name": name, "method": "lora", **job}], **settings).values()
        print(name, share, flush=True)
        found.append(("sums", name, share, len(held), length))
    return found


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pairs", type=Path, help="real pairs; without them only sums")
    parser.add_argument("--base", help="of real pairs")
    parser.add_argument("--prompt", type=int, default=150, help="characters of a prompt that are kept, at its end")
    parser.add_argument("--answer", type=int, default=600, help="characters of an answer that are kept")
    parser.add_argument("--method", default="full", help="of real pairs")
    parser.add_argument("--rates", type=float, nargs=2, default=[1e-4, 1e-3], help="of DPO and the reward model")
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--without-sums", action="store_true")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    found = []
    with tempfile.TemporaryDirectory() as folder:
        if options.pairs:
            found += on_real_pairs(options, Path(folder))
        if not options.without_sums:
            found += on_sums(Path(folder))
    lines = [
        "# How often the better answer is found", "",
        f"`python benchmarks/preference_accuracy.py --method {options.method} --rates {options.rates[0]:g} "
        f"{options.rates[1]:g} --epochs {options.epochs}`, {date.today()}, {platform.machine()}, "
        f"{torch.get_num_threads()} threads.", "",
        "| pairs | learned | held out | right, % | length alone, % |", "|---|---|---|---|---|",
    ]  # fmt: skip
    for data, name, share, count, length in found:
        error = math.sqrt(share * (1 - share) / count)
        lines.append(f"| {data} | {name} | {count} | {100 * share:.1f} ± {100 * error:.1f} | {100 * length:.1f} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
