"""Are the default learning rates, which were chosen for generation, right for classification, and for its head?

    python benchmarks/classification_rates.py --output rows.json    # `--tasks RTE --bases tiny-llama` for a part of it
    python benchmarks/classification_rates.py --table rows.json

Multiples of the default rates, with the head at its own rate or at its method's, three seeds each, on sentiment (SST-2)
and entailment (RTE), on two bases with some pre-training. All jobs of one task and base train at once: jobs that share
a pass end as if alone. Short records only, for the bases are small.
"""

from __future__ import annotations

import argparse
import csv
import json
import os
import statistics
import tempfile
import time
from collections import defaultdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch

from weft.training import Job, make_config
from weft.training.run import train

SHARED = Path(os.environ.get("WEFT_SHARED_DATA", Path(__file__).parents[2] / "shared" / "data"))
BASES = {"stories260K": str(SHARED / "models" / "stories260K"), "tiny-llama": "tiny-llama"}
LETTERS = {"SST-2": 100, "RTE": 200}
RECORDS = {"train": 256, "dev": 160}
SEEDS = (0, 1, 2)
HEAD_RATE = 2e-3
# Multiples of the default rate: with the head at HEAD_RATE, with the head at the method's rate. prefix_tuning without a
# projection is p_tuning_v2: the two are one measurement.
GRID: dict[str, dict[str, tuple[tuple[float, ...], tuple[float, ...]]]] = {
    "SST-2": {
        "prompt_tuning": ((0.3, 1, 3), (1,)),
        "p_tuning": ((0.3, 1, 3), ()),
        "p_tuning_v2": ((0.3, 1, 3), (1,)),
        "bitfit": ((0.1, 0.3, 1), (1,)),
        "full": ((1,), ()),
        "lora": ((1,), ()),
    },
    "RTE": {
        "prompt_tuning": ((0.3, 1, 3), (1,)),
        "p_tuning": ((0.3, 1, 3), ()),
        "p_tuning_v2": ((0.3, 1, 3), (1,)),
        "bitfit": ((0.3, 1), ()),
        "lora": ((1,), ()),
    },
}


def write_records(task: str, split: str, path: Path) -> None:
    """The first short records, in the columns of the data set."""
    with (SHARED / "nlu" / task / f"{split}.tsv").open(encoding="utf-8", newline="") as file:
        rows = list(csv.reader(file, delimiter="\t", quoting=csv.QUOTE_NONE))
    head, rows = (rows[:1], rows[1:]) if task == "RTE" else ([], rows)
    short = [row for row in rows if sum(map(len, row)) <= LETTERS[task]][: RECORDS[split]]
    path.write_text("".join("\t".join(row) + "\n" for row in head + short), encoding="utf-8")


def rate_of(job: Job, parameter: str) -> float:
    """The rate that a job's name asks for: METHOD-MULTIPLE-HEAD-SEED."""
    adapter = job.adapter
    _, multiple, head, _ = adapter.name.rsplit("-", 3)
    if head == "own" and parameter.startswith("head."):
        return HEAD_RATE
    return adapter.config.learning_rate(adapter.hidden_size) * float(multiple)


def measure(task: str, model: str) -> list[dict[str, Any]]:
    """Train all jobs at once; a row of figures for each."""
    rows: list[dict[str, Any]] = []
    losses: dict[str, list[float]] = defaultdict(list)
    jobs = [
        {"name": f"{method}-{multiple:g}-{head}-{seed}", "method": method, "seed": seed}
        for method, grid in GRID[task].items()
        for head, multiples in zip(("own", "method"), grid, strict=True)
        for multiple in multiples
        for seed in SEEDS
    ]

    def heard(event: Any) -> None:
        if event["event"] == "step":
            losses[event["job"]].append(event["loss"])
        elif event["event"] == "eval" and event["step"]:
            method, multiple, head, seed = event["job"].rsplit("-", 3)
            last = losses[event["job"]][-len(losses[event["job"]]) // 3 :]
            row = {"task": task, "base": model, "method": method, "multiple": float(multiple), "head": head}
            row |= {"seed": int(seed), "train_loss": statistics.mean(last), "eval_loss": event["eval_loss"]}
            rows.append(row | {key: event[f"eval_{key}"] for key in ("accuracy", "majority")})

    with tempfile.TemporaryDirectory() as folder:
        for split in RECORDS:
            write_records(task, split, Path(folder) / f"{split}.tsv")
        config = make_config(
            {
                "model": BASES[model],
                "task": "sequence_classification",
                "data": f"{folder}/train.tsv",
                "eval_data": f"{folder}/dev.tsv",
                "output_dir": f"{folder}/run",
                "batch_size": 16,
                "max_length": 96,
                "truncate": True,
                "logging_steps": 1,
                "verify_packing": False,
                "threads": 1,
                "jobs": jobs,
            },
            source="benchmarks/classification_rates.py",
        )
        begun = time.process_time()
        # No setting gives a head a rate of its own. At the job, so that no method changes what is asked for.
        with patch.object(Job, "_default_rate", rate_of):
            train(config, on_event=heard)
    print(f"{task}, {model}: {len(jobs)} jobs in {time.process_time() - begun:.0f} CPU seconds", flush=True)
    return rows


def table(rows: list[dict[str, Any]]) -> str:
    """Means over the seeds, with the standard deviation of the accuracy, as Markdown."""
    groups: dict[tuple[str, ...], list[dict[str, Any]]] = defaultdict(list)
    for row in rows:
        keys = (row["task"], row["base"], row["method"], f"{row['multiple']:g}", row["head"])
        groups[keys].append(row)
    lines = ["| task | base | method | rate × | head's rate | training loss | eval loss | accuracy (majority) |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for keys, found in groups.items():
        train_loss, loss, right = ([row[key] for row in found] for key in ("train_loss", "eval_loss", "accuracy"))
        cells = [*keys, f"{statistics.mean(train_loss):.3f}", f"{statistics.mean(loss):.3f}"]
        cells.append(f"{statistics.mean(right):.1%} ± {statistics.stdev(right):.1%} ({found[0]['majority']:.1%})")
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tasks", nargs="*", default=list(LETTERS))
    parser.add_argument("--bases", nargs="*", default=list(BASES))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--table", type=Path, nargs="*", help="only show the rows in these files")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    if arguments.table:
        rows = [row for path in arguments.table for row in json.loads(path.read_text())]
    else:
        rows = [row for task in arguments.tasks for base in arguments.bases for row in measure(task, base)]
    if arguments.output:
        arguments.output.write_text(json.dumps(rows, indent=1) + "\n")
    print(table(rows))


if __name__ == "__main__":
    main()
