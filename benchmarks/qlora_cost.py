"""What a base in NF4 costs beside the same in bf16: seconds of a step of LoRA, alone and with four jobs in a pass.

    python benchmarks/qlora_cost.py --shape 1.26b --tokens 1024,2048 --output benchmarks/results/FILE.md

Both bases are in one process, and steps go by turns. ``--tokens`` are those of a job's step, in one sequence. LoRA has
rank 16 on all linears; ``gradient_checkpointing`` is ``cheap`` for both.
"""

from __future__ import annotations

import argparse
import datetime
import random
import statistics
import sys
import time
from pathlib import Path
from typing import Any

import torch

from speed_setting import ALPHA, LEARNING_RATE, RANK, SHAPES
from streaming import MORE, placed
from weft.api import Adapters
from weft.data import Sample
from weft.models import load_base
from weft.training import Job, JobConfig
from weft.training.loop import freed_memory_kept
from weft.training.step import train_step


def jobs_over(base: Any, count: int, tokens: int, steps: int) -> tuple[Adapters, list[Job]]:
    """So many jobs of LoRA over a base, each with a sequence a step."""
    adapters, jobs = Adapters(base.model, base.architecture, checkpointing="cheap"), []
    rng = random.Random(0)
    for number in range(count):
        config = JobConfig(
            name=f"lora{number}", method="lora", steps=steps, batch_size=1, learning_rate=LEARNING_RATE,
            method_settings={"r": RANK, "lora_alpha": ALPHA, "target_modules": "all-linear"},
        )  # fmt: skip
        adapter = adapters.add(config.name, config.method_config())
        samples = []
        for step in range(steps):
            ids = [rng.randrange(5, base.token_rows) for _ in range(tokens)]
            samples.append(Sample(ids, [0.0] + [1.0] * (tokens - 1), f"text {step}"))
        jobs.append(Job(config, adapter, samples, []))
    return adapters, jobs


def seconds(bases: dict[str, Any], count: int, tokens: int, rounds: int) -> dict[str, list[float]]:
    """Seconds of a step over each base, by turns, after a first one."""
    runs = {kind: jobs_over(base, count, tokens, rounds + 1) for kind, base in bases.items()}
    found: dict[str, list[float]] = {kind: [] for kind in bases}
    for _ in range(rounds + 1):
        for kind, (adapters, jobs) in runs.items():
            begun = time.perf_counter()
            train_step(adapters, jobs)
            found[kind].append(time.perf_counter() - begun)
    for adapters, _ in runs.values():
        adapters.close()
    return {kind: times[1:] for kind, times in found.items()}


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", default="1.26b", choices=[*SHAPES, *MORE])
    parser.add_argument("--folder", type=Path, help="where the model goes; default: temporary")
    parser.add_argument("--tokens", default="1024,2048", help="tokens of a job's step")
    parser.add_argument("--jobs", default="1,4")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--keep", action="store_true", help="do not delete the model")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = [
        f"# What NF4 costs: LoRA at the {options.shape} shape", "",
        f"`python {' '.join(sys.argv)}`, {datetime.date.today()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}, {torch.backends.cpu.get_cpu_capability()}. "
        f"Medians of {options.rounds} steps, by turns.",
        "", "| jobs | tokens of a job | bf16, s | NF4, s | NF4 / bf16, by round | median |",
        "|---|---|---|---|---|---|",
    ]  # fmt: skip
    print("\n".join(rows), flush=True)
    with placed(options, room=1.1), freed_memory_kept("cpu"):
        bases = {
            str(kind): load_base(str(options.folder), device="cpu", dtype="bfloat16", quantization=kind)
            for kind in (None, "nf4")
        }
        for tokens in map(int, options.tokens.split(",")):
            for count in map(int, options.jobs.split(",")):
                plain, packed = seconds(bases, count, tokens, options.rounds).values()
                ratios = [one / other for one, other in zip(packed, plain, strict=True)]
                rows.append(
                    f"| {count} | {tokens:,} | {statistics.median(plain):.2f} | {statistics.median(packed):.2f} | "
                    f"{', '.join(f'{ratio:.2f}' for ratio in ratios)} | {statistics.median(ratios):.2f} |"
                )
                print(rows[-1], flush=True)
                if options.output:
                    options.output.write_text("\n".join(rows) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
