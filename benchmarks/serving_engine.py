"""What serving many adapters costs, as ratios inside one run: against the base, against one adapter after the other.

For each shape, rows of equal length are written in one batch: by the base alone, by eight adapters of eight methods
(each row its own), and by the same adapters one after the other, each with its own rows, as a server does that holds
one adapter at a time (the time of loading them is left out). The kinds take turns, so that a busy machine hurts all
alike. Then sixteen rows share a prompt of 500 tokens: the time to their first tokens, beside that of one row.

    python benchmarks/serving_engine.py --output benchmarks/results/serving_engine_<hardware>_<date>.md
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch

from speed_setting import SHAPES, build_model
from weft.api import Adapters
from weft.assets import model_path
from weft.generation import Engine, Limits, Request
from weft.methods import METHODS
from weft.models import describe

# Eight methods, each with its defaults; what they need to be told stands here.
NAMES = ("lora", "adalora", "ia3", "bitfit", "prompt_tuning", "p_tuning", "prefix_tuning", "bottleneck")
SETTINGS: dict[str, dict[str, Any]] = {
    name: {"num_virtual_tokens": 8} for name in ("prompt_tuning", "p_tuning", "prefix_tuning")
}
SETTINGS["bitfit"] = {"add_missing": True}


def opened(shape: str, extra: Sequence[str]) -> Adapters:
    """The base with one adapter of each method, away from where it began."""
    if shape in SHAPES:
        model = build_model(SHAPES[shape]).float()
    else:
        from transformers import AutoModelForCausalLM

        model = AutoModelForCausalLM.from_pretrained(model_path(shape), trust_remote_code=False).float().eval()
    adapters = Adapters(model, describe(model))
    generator = torch.Generator().manual_seed(0)
    for name in (*NAMES, *extra):
        adapter = adapters.add(name, METHODS[name](**SETTINGS.get(name, {})))
        with torch.no_grad():
            for parameter in adapter.parameters():
                parameter.add_(torch.randn(parameter.shape, generator=generator) * 0.01)
    return adapters


def requests(adapters: Adapters, names: Sequence[str | None], rows: int, prompt: int, new: int) -> list[Request]:
    """Rows with prompts of their own, for these adapters in turn."""
    generator = torch.Generator().manual_seed(1)
    size = len(adapters.model.get_input_embeddings().weight)  # type: ignore[operator]
    ids = torch.randint(5, size, (rows, prompt), generator=generator).tolist()
    return [Request(own, names[i % len(names)], new) for i, own in enumerate(ids)]


def timed(run: Callable[[], object]) -> float:
    """Wall-clock seconds."""
    begun = time.perf_counter()
    run()
    return time.perf_counter() - begun


def write_all(adapters: Adapters, asked: Sequence[Request], max_rows: int) -> Callable[[], object]:
    """One engine writes all."""
    return lambda: Engine(adapters, limits=Limits(max_rows=max_rows)).generate(asked)


def one_after_the_other(adapters: Adapters, asked: Sequence[Request], max_rows: int) -> Callable[[], object]:
    """Each adapter's rows by themselves."""

    def run() -> None:
        engine = Engine(adapters, limits=Limits(max_rows=max_rows))
        for name in dict.fromkeys(request.adapter for request in asked):
            engine.generate([request for request in asked if request.adapter == name])

    return run


def throughput(adapters: Adapters, shape: str, rows: int, rounds: int, new: int) -> list[str]:
    """The table of one shape and batch."""
    kinds: dict[str, tuple[Sequence[str | None], Any]] = {
        "base": ([None], write_all),
        "eight methods, one batch": (NAMES, write_all),
        "eight methods, one after the other": (NAMES, one_after_the_other),
    }
    extra = [name for name in adapters.names if name not in NAMES]
    for name in extra:
        kinds[f"seven methods and {name}"] = ([*NAMES[:-1], name], write_all)
    runs = {kind: how(adapters, requests(adapters, names, rows, 32, new), rows) for kind, (names, how) in kinds.items()}
    for run in runs.values():
        run()
    seconds: dict[str, list[float]] = {kind: [] for kind in runs}
    for _ in range(rounds):
        for kind, run in runs.items():
            seconds[kind].append(timed(run))
    base = seconds["base"]
    lines = []
    for kind, found in seconds.items():
        share = statistics.median(b / t for b, t in zip(base, found, strict=True))
        lines.append(
            f"| {shape} | {rows} | {kind} | {rows * new / statistics.median(found):,.0f} | {100 * share:.0f} % |"
        )
    return lines


def first_tokens(adapters: Adapters, shape: str, rounds: int) -> str:
    """The time until sixteen rows with one prompt of 500 tokens have their first tokens, over that of one row."""
    (one,) = requests(adapters, [None], 1, 500, 1)
    seconds: dict[int, list[float]] = {1: [], 16: []}
    for turn in range(2 * rounds + 1):
        # Each comes first every second time: memory that was just given back makes the next run faster or slower.
        for count in (1, 16) if turn % 2 else (16, 1):
            with Engine(adapters) as engine:
                seconds[count].append(timed(lambda e=engine, n=count: e.generate([one] * n)))
    alone, many = (statistics.median(found[1:]) for found in seconds.values())
    return f"| {shape} | {alone:.3f} s | {many / alone:.2f} |"


def main() -> None:
    """Print the tables, and write them to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shapes", default="tiny-llama,160m")
    parser.add_argument("--rows", default="16,64")
    parser.add_argument("--new", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    head = [
        "# Serving many adapters", "",
        f"`python benchmarks/serving_engine.py`, {datetime.date.today()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, float32. Prompts of 32 tokens, {options.new} new ones per row; medians of "
        f"{options.rounds} rounds, in which the kinds take turns.", "",
        "| base | rows | who writes | tokens/s | of the base's |", "|---|---|---|---|---|",
    ]  # fmt: skip
    tail = [
        "",
        "| base | one row of 500 tokens, to its first | sixteen such rows, over it |",
        "|---|---|---|",
    ]
    rows: list[str] = []
    for shape in options.shapes.split(","):
        adapters = opened(shape, ["llama_pro"])
        for count in map(int, options.rows.split(",")):
            rows += throughput(adapters, shape, count, options.rounds, options.new)
            print(*rows[-5:], sep="\n", flush=True)
        tail.append(first_tokens(adapters, shape, options.rounds))
        print(tail[-1], flush=True)
    text = "\n".join([*head, *rows, *tail]) + "\n"
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
