"""How much faster do models that only run padded batches generate from a cache than by running the text again?

    python benchmarks/padded_cache.py [--kinds falcon codegen mamba] [--rows 8] [--new 128] [--out FILE.md]

Random models of 12 layers and width 256 in fp32, a LoRA adapter for every second row, greedy, both ways in turns. The
tokens of both ways must be the same. Prompts are equally long (one group in lock step) or all of another length (every
row a group of its own, the worst case).
"""

from __future__ import annotations

import argparse
import os
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers

from weft.api import Adapters
from weft.generation import Completion, Request, cache_proof, generate
from weft.methods import METHODS
from weft.models import describe

IDS = {"vocab_size": 1000, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
KINDS: dict[str, Callable[[], Any]] = {
    "falcon": lambda: transformers.FalconConfig(
        hidden_size=256, num_hidden_layers=12, num_attention_heads=8, new_decoder_architecture=False, **IDS
    ),
    "codegen": lambda: transformers.CodeGenConfig(
        n_embd=256, n_layer=12, n_head=8, n_positions=1024, rotary_dim=16, **IDS
    ),
    "mamba": lambda: transformers.MambaConfig(hidden_size=256, num_hidden_layers=12, state_size=16, **IDS),
}
# Tokens of the first prompt, and how much longer each further one is where they differ.
LENGTH, MORE = 32, 4


@contextmanager
def without_cache() -> Iterator[None]:
    plain = cache_proof.kind
    cache_proof.kind = lambda *_: cache_proof.Kind()
    try:
        yield
    finally:
        cache_proof.kind = plain


def timed(adapters: Adapters, asked: Sequence[Request]) -> tuple[float, float, list[Completion]]:
    """Wall-clock and CPU seconds, and what came out."""
    wall, cpu = time.perf_counter(), time.process_time()
    found = generate(adapters, asked, stop_ids=())
    return time.perf_counter() - wall, time.process_time() - cpu, found


def opened(kind: str) -> Adapters:
    torch.manual_seed(0)
    model = transformers.AutoModelForCausalLM.from_config(KINDS[kind]()).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn(parameter.shape) * 0.02)
    adapters = Adapters(model, describe(model), padded=True)
    for parameter in adapters.add("lora", METHODS["lora"]()).parameters():
        parameter.data.add_(torch.randn(parameter.shape) * 0.02)
    return adapters


def measure(kind: str, new: int, rounds: int, most: int) -> list[str]:
    adapters, lines = opened(kind), []
    wall, _, _ = timed(adapters, [Request([5, 6, 7], name, 1) for name in (None, "lora")])
    verdict = cache_proof.verdict(adapters, None)
    print(f"{kind}: first call with the proof {wall:.2f} s, {verdict}", flush=True)
    for rows, length, more in ((1, LENGTH, 0), (most, LENGTH, 0), (most, LENGTH, MORE)):
        asked = [
            Request(
                [3 + (7 * i + 11 * row) % 990 for i in range(length + more * row)], "lora" if row % 2 else None, new
            )
            for row in range(rows)
        ]
        best: dict[str, tuple[float, float]] = {}
        tokens: dict[str, list[list[int]]] = {}
        for _ in range(rounds):
            cached = timed(adapters, asked)
            with without_cache():
                again = timed(adapters, asked)
            for way, (seconds, cpu, found) in (("cached", cached), ("again", again)):
                best[way] = min(best.get(way, (seconds, cpu)), (seconds, cpu))
                tokens[way] = [completion.ids for completion in found]
        same = sum(a == b for a, b in zip(tokens["cached"], tokens["again"], strict=True))
        (wall, cpu), (wall_again, cpu_again) = best["cached"], best["again"]
        lengths = f"{length}" if not more else f"{length} to {length + more * (rows - 1)}"
        lines.append(
            f"| {kind} | {rows} | {lengths} | {wall:.2f} ({cpu:.2f}) | {wall_again:.2f} ({cpu_again:.2f}) | "
            f"{wall_again / wall:.1f} | {1000 * wall / rows / new:.1f} | {same} of {rows} |"
        )
        print(lines[-1], flush=True)
    adapters.close()
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--new", type=int, default=128, help="tokens that each row gets")
    parser.add_argument("--rows", type=int, default=8, help="prompts that are asked at once")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    lines = [line for kind in given.kinds for line in measure(kind, given.new, given.rounds, given.rows)]
    if given.out:
        given.out.write_text(report(lines, given), encoding="utf-8")


def report(lines: Sequence[str], given: argparse.Namespace) -> str:
    command = (
        f"OMP_NUM_THREADS={torch.get_num_threads()} python benchmarks/padded_cache.py --new {given.new} "
        f"--rows {given.rows}"
    )
    return "\n".join(
        [
            "# Padded models: a cache in lock step beside running the text again",
            "",
            f"    {command} --rounds {given.rounds} --kinds {' '.join(given.kinds)}",
            "",
            f"Random models of 12 layers, width 256, fp32, {given.new} new tokens a row, greedy; the better of "
            f"{given.rounds} rounds.",
            f"{os.cpu_count()} cores, {torch.get_num_threads()} thread(s), load {os.getloadavg()[0]:.1f} at the end; "
            f"Python {platform.python_version()},",
            f"torch {torch.__version__}, transformers {transformers.__version__}.",
            "",
            "| model | rows | tokens of a prompt | cached, s (CPU s) | again, s (CPU s) | ratio | cached, ms a token | "
            "same tokens |",
            "|---|---|---|---|---|---|---|---|",
            *lines,
            "",
        ]
    )


if __name__ == "__main__":
    main()
