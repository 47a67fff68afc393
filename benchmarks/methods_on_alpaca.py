"""Every method with its defaults on a really pre-trained base and real instructions: the last table of docs/methods.md.

    python benchmarks/methods_on_alpaca.py --output benchmarks/results/methods_alpaca.json

stories260K (260,032 parameters, width 64, TinyStories) learns from 2,000 records of Alpaca, all methods in one pass;
records with a question of over 300 letters are left out, which would fill the base's 512 positions with its 512 words.
Too small a base to answer anything, so the figure is the loss per token on 100 held-out records; *forgets* is the rise
of the loss on C4, text of the kind that neither the base nor the instructions come from.
"""

from __future__ import annotations

import argparse
import json
import platform
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch

from methods import jobs_of
from weft.data import load_samples
from weft.methods import METHODS
from weft.objectives.passes import evaluate_loss
from weft.training import make_config
from weft.training.run import Setup, train

SHARED = Path(__file__).parents[2] / "shared" / "data"
STEPS, BATCH_SIZE, DOCUMENTS = 240, 8, 40


def write_records(path: Path, count: int = 2000, letters: int = 300) -> None:
    """The first ``count`` records with a short question and an answer."""
    records = json.loads((SHARED / "sft" / "alpaca_en.json").read_text(encoding="utf-8"))
    short = [r for r in records if r["output"].strip() and len(r["instruction"] + r["input"]) <= letters]
    path.write_text(json.dumps(short[:count]), encoding="utf-8")


def measure(methods: list[str], steps: int) -> list[dict[str, Any]]:
    """A row per method, the plain base first."""
    found: dict[str | None, dict[str, Any]] = {}

    def ask(setup: Setup, names: list[str | None]) -> None:
        texts = load_samples(SHARED / "text" / "c4.jsonl", setup.renderer, format="text", limit=DOCUMENTS)
        held = setup.jobs[0].eval_samples
        for name in names:
            losses = {"eval_loss": evaluate_loss(setup.adapters, name, held)}
            found[name] = losses | {"text_loss": evaluate_loss(setup.adapters, name, texts)}

    def after(setup: Setup) -> None:
        ask(setup, [job.name for job in setup.jobs])
        for job in setup.jobs:
            found[job.name] |= {"parameters": job.adapter.num_trainable(), "learning_rate": job.rate}

    with tempfile.TemporaryDirectory() as folder:
        write_records(Path(folder) / "alpaca.json")
        config = make_config(
            {
                "model": str(SHARED / "models" / "stories260K"),
                "data": f"{folder}/alpaca.json",
                "eval_size": 100,
                "max_length": 448,
                "truncate": True,
                "output_dir": f"{folder}/run",
                "steps": steps,
                "batch_size": BATCH_SIZE,
                "warmup_ratio": 0.05,
                "threads": 1,
                "jobs": jobs_of(methods),
            },
            source="benchmarks/methods_on_alpaca.py",
        )
        begun = time.monotonic()
        train(config, on_ready=lambda setup: ask(setup, [None]), on_trained=after)
    print(f"{steps} steps of {len(methods)} jobs in {time.monotonic() - begun:.0f} s")
    return [{"job": name, **figures} for name, figures in found.items()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="default: all")
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    rows = measure(arguments.methods or sorted(METHODS.keys() - {"trainable_tokens"}), arguments.steps)
    for row in rows:
        print(f"  {row['job'] or 'base':16} eval loss {row['eval_loss']:.3f}  C4 {row['text_loss']:.3f}")
    if arguments.output:
        result = {"steps": arguments.steps, "batch_size": BATCH_SIZE, "torch": torch.__version__, "rows": rows}
        result |= {"date": date.today().isoformat(), "cpu": platform.processor() or platform.machine()}
        arguments.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
