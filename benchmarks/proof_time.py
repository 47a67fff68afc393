"""What the proof adds to loading a base: the embedded ones, and a Llama shape of 1.26 billion parameters in bf16.

Each base is loaded several times in one process, after the libraries are. The proof's time is that of ``describe`` less
that of ``sketch``, which only reads tables and names; both figures come from the same loads.
"""

from __future__ import annotations

import argparse
import datetime
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

import torch

import weft.models.load
from speed_setting import SHAPES, build_model
from weft.models.facts import sketch
from weft.models.proof import describe


def timed(name: str, rounds: int) -> tuple[float, float]:
    """Median seconds of a whole load, proof included, and of the proof in it."""
    whole, proof = [], []

    def watched(model: Any) -> Any:
        begun = time.perf_counter()
        sketch(model)
        without = time.perf_counter() - begun
        begun = time.perf_counter()
        shape = describe(model)
        proof.append(time.perf_counter() - begun - without)
        extra.append(without)
        return shape

    weft.models.load.describe = watched  # type: ignore[attr-defined]
    for _ in range(rounds):
        extra: list[float] = []
        begun = time.perf_counter()
        weft.models.load.load_base(name)
        whole.append(time.perf_counter() - begun - sum(extra))
    return statistics.median(whole), statistics.median(proof)


def main() -> None:
    """Print the table, and write it to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--shape", default="1.26b", help="a shape of speed_setting.py; none: the embedded bases only")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    rows = [
        "# What the proof adds to loading a base", "",
        f"`python benchmarks/proof_time.py`, {datetime.date.today()}, {torch.get_num_threads()} threads, torch "
        f"{torch.__version__}, medians of {options.rounds}. Files are in the page cache.", "",
        "| base | load, proof included | the proof | share |", "|---|---|---|---|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        names = {name: name for name in ("tiny-llama", "tiny-bloom")}
        if options.shape != "none":
            from transformers import AutoTokenizer

            from weft.assets import model_path

            build_model(SHAPES[options.shape]).save_pretrained(folder)
            AutoTokenizer.from_pretrained(model_path("tiny-llama")).save_pretrained(folder)
            names[f"Llama, {options.shape}, bf16"] = folder
        for title, name in names.items():
            timed(name, 1)
            whole, proof = timed(name, options.rounds)
            rows.append(f"| {title} | {whole:.3f} s | {proof:.3f} s | {100 * proof / whole:.1f} % |")
            print(rows[-1], flush=True)
    text = "\n".join(rows) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
