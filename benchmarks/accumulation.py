"""What does packing a step save where gradients are accumulated?

    python benchmarks/accumulation.py [--data DIR] [--tokenizer NAME] [--steps 8]

Counts the passes of an epoch of Stanford Alpaca and LIMA with and without packs, and trains LoRA over a random Llama
(hidden 512, 8 layers, fp32) by the same steps both ways, in turns. The first losses must agree: packing changes none.
"""

from __future__ import annotations

import argparse
import os
import platform
import statistics
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from weft.api import Adapters
from weft.data import Renderer, Sample, load_samples
from weft.models import describe
from weft.models.load import load_tokenizer
from weft.training import Job, JobConfig
from weft.training.batches import Batches
from weft.training.step import train_step

SHARED = Path(os.environ.get("WEFT_SHARED_DATA") or Path(__file__).parents[2] / "shared/data")
FILES = {"Alpaca": "sft/alpaca_en.json", "LIMA": "sft/lima.json"}
SHAPES = ((1, 16), (2, 8), (4, 4), (4, 8))


class Unpacked(Batches):
    """Every batch of ``batch_size`` records is a pass."""

    def _packed(self, batches: list[list[int]]) -> list[list[int]]:
        return batches


def config_of(batch_size: int, accumulation: int) -> JobConfig:
    settings = {"batch_size": batch_size, "gradient_accumulation_steps": accumulation, "epochs": 1}
    return JobConfig(name="one", method="lora", **settings)


def passes(samples: Sequence[Sample], config: JobConfig) -> tuple[int, int, Batches]:
    """Passes of an epoch without packs and with."""
    batches = Batches(config, samples)
    packed = [pack for step in range(batches.steps_in(0)) for pack in batches[step]]
    assert sorted(i for pack in packed for i in pack) == list(range(len(samples)))
    assert max(map(batches.tokens, packed)) <= batches.capacity == max(map(batches.tokens, batches.unpacked(0)))
    return len(batches.unpacked(0)), len(packed), batches


def seconds_per_step(model: Any, samples: Sequence[Sample], config: JobConfig, steps: int) -> tuple[float, float]:
    """Medians over the steps (the first left out), without packs and with, in turns over the same steps."""
    adapters = Adapters(model, describe(model))
    jobs = {kind: Job(config, adapters.add(kind.__name__, config.method_config(), seed=0), samples) for kind in
            (Unpacked, Batches)}  # fmt: skip
    for kind, job in jobs.items():
        job.name, job.batches = kind.__name__, kind(config, samples)
    times: dict[type[Batches], list[float]] = {kind: [] for kind in jobs}
    losses: dict[type[Batches], list[float]] = {kind: [] for kind in jobs}
    for _ in range(steps + 1):
        for kind, job in jobs.items():
            begun = time.perf_counter()
            losses[kind].append(train_step(adapters, [job])[job.name].loss)
            times[kind].append(time.perf_counter() - begun)
    adapters.close()
    assert all(abs(a - b) < 1e-4 * a for a, b in zip(*losses.values(), strict=True)), losses
    without, packed = (statistics.median(found[1:]) for found in times.values())
    return without, packed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder with sft/alpaca_en.json and sft/lima.json")
    parser.add_argument("--tokenizer", default=str(SHARED / "tokenizers/llama2"))
    parser.add_argument("--steps", type=int, default=8, help="timed steps of each kind (0: only count passes)")
    args = parser.parse_args()
    tokenizer = load_tokenizer(args.tokenizer)
    renderer = Renderer(tokenizer, max_length=2048, truncation="right")
    print(f"{platform.machine()}, {torch.get_num_threads()} threads, load {os.getloadavg()[0]:.1f}")
    print("| | batch_size × accumulation | passes without packs | with | tokens a pass, at most | at worst if padded | "
          "a step without packs | with | ratio |\n|---|---|---|---|---|---|---|---|---|")  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(0)
        shape = LlamaConfig(vocab_size=len(tokenizer), hidden_size=512, intermediate_size=1376, num_hidden_layers=8,
                            num_attention_heads=8, tie_word_embeddings=True)  # fmt: skip
        model = LlamaForCausalLM(shape).eval()
    for name, file in FILES.items():
        samples = load_samples(args.data / file, renderer, empty_answers="skip")
        for batch_size, accumulation in SHAPES:
            config = config_of(batch_size, accumulation)
            before, after, batches = passes(samples, config)
            timed = ""
            if args.steps:
                without, packed = seconds_per_step(model, samples, config, args.steps)
                timed = f"{without:.2f} s | {packed:.2f} s | {without / packed:.2f}"
            worst = batch_size * max(batches.lengths)
            counts = f"{before:,} | {after:,} | {batches.capacity:,} | {worst:,}"
            print(f"| {name} | {batch_size} × {accumulation} | {counts} | {timed} |", flush=True)
    return 0


if __name__ == "__main__":
    sys.exit(main())
