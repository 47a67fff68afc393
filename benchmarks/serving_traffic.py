"""Ten thousand requests of all methods through one engine, while adapters come and go: is each answered as alone?

python -m benchmarks.serving_traffic --count 10000 --output benchmarks/results/serving_traffic_<hardware>_<date>.md
"""

from __future__ import annotations

import argparse
import datetime
import time
from pathlib import Path

import torch
from tests import kit


def main() -> int:
    """Print the report and write it to a file; 1 if an answer was wrong."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    torch.set_num_threads(1)
    begun = time.perf_counter()
    report = kit.run_traffic(kit.open_with_all(kit.make_model("llama")), options.count, seed=options.seed, guests=16)
    text = (
        "# Mixed traffic, each answer against the same request alone\n\n"
        f"`python -m benchmarks.serving_traffic --count {options.count} --seed {options.seed}`, "
        f"{datetime.date.today()}, torch {torch.__version__}, a random Llama of width 32 in float32, "
        f"{time.perf_counter() - begun:.0f} s.\n\n"
        "| requests | adapters loaded meanwhile | under a name that had been another's | answers that differ |\n"
        "|---|---|---|---|\n"
        f"| {report.answers:,} | {report.loads:,} | {report.reloaded_names:,} | {len(report.wrong)} |\n"
    )
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")
    return int(bool(report.wrong))


if __name__ == "__main__":
    raise SystemExit(main())
