"""Every method on a base in bf16, NF4 and int8, with three seeds: exact match of held-out questions.

    python benchmarks/methods_quantised.py --output rows.json

All methods and seeds train at once over one base, as jobs of one pass, with their defaults; each format has a run of
its own. Only the base's format differs: data, order, initial values and questions are the same.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
from datetime import date
from pathlib import Path
from typing import Any

import torch

from methods import BATCH_SIZE, STEPS, jobs_of, measure
from weft.assets import EMBEDDED_MODELS
from weft.methods import METHODS

FORMATS: dict[str, dict[str, Any]] = {"bf16": {}, "nf4": {"quantization": "nf4"}, "int8": {"quantization": "int8"}}
# They train linears of the base, which a quantised base refuses; and two that learn no task.
LEFT_OUT = ("full", "freeze", "hard_prompt", "trainable_tokens")


def seeded(methods: list[str], seeds: int) -> list[dict[str, Any]]:
    """A job for each method and seed."""
    return [{**job, "name": f"{job['name']}-{seed}", "seed": seed} for seed in range(seeds) for job in jobs_of(methods)]


def table(found: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """A row for each method: in each format, the exact match with each seed."""
    rows: dict[str, dict[str, Any]] = {}
    for kind, jobs in found.items():
        for job in jobs:
            if job["job"] is not None:
                row = rows.setdefault(job["method"], {"method": job["method"]})
                row.setdefault(kind, []).append(job["exact_match"])
    return list(rows.values())


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("methods", nargs="*", help="default: all that a quantised base has")
    parser.add_argument("--model", default="tiny-llama", choices=list(EMBEDDED_MODELS))
    parser.add_argument("--formats", nargs="*", default=list(FORMATS))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--steps", type=int, default=STEPS)
    parser.add_argument("--output", type=Path, help="what is there for other formats stays")
    options = parser.parse_args()
    torch.set_num_threads(1)
    methods = options.methods or sorted(METHODS.keys() - set(LEFT_OUT))
    found = {
        kind: measure(options.model, seeded(methods, options.seeds), options.steps, dtype="bfloat16", **FORMATS[kind])
        for kind in options.formats
    }
    rows = {row["method"]: row for row in table(found)}
    if options.output and options.output.exists():
        for row in json.loads(options.output.read_text())["rows"]:
            rows[row["method"]] = row | rows.get(row["method"], {})
    for method, row in rows.items():
        shares = {kind: statistics.mean(row[kind]) for kind in FORMATS if kind in row}
        print(f"  {method:16}", "  ".join(f"{kind} {share:6.1%}" for kind, share in shares.items()))
    if options.output:
        result = {"model": options.model, "steps": options.steps, "batch_size": BATCH_SIZE, "seeds": options.seeds}
        result |= {"torch": torch.__version__, "date": date.today().isoformat(), "rows": list(rows.values())}
        result |= {"cpu": platform.processor() or platform.machine()}
        options.output.write_text(json.dumps(result, indent=1) + "\n")


if __name__ == "__main__":
    main()
