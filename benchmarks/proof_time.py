"""What the proof adds to loading a base: the embedded ones, and a Llama shape of 1.26 billion parameters in bf16.

Each base is loaded several times in one process, after the libraries are. The proof's time is that of ``describe`` less
that of ``sketch``, which only reads tables and names; both figures come from the same loads. "First": nothing is known
of the base; "later": it was proved before (``weft.models.kept``). transformers maps a file lazily, so a load by itself
hardly touches a weight; in the last column every weight is read once after the load, files in the page cache.
"""

from __future__ import annotations

import argparse
import datetime
import os
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


def timed(name: str, rounds: int) -> dict[str, float]:
    """Median seconds of a load with its proof and of the proof in it, and of a load whose weights are then read."""
    found: dict[str, list[float]] = {"load": [], "proof": [], "read": []}
    spent: list[float] = []

    def watched(model: Any, folder: Path | None = None) -> Any:
        begun = time.perf_counter()
        sketch(model)
        spent.append(time.perf_counter() - begun)
        begun = time.perf_counter()
        shape = describe(model, folder)
        found["proof"].append(time.perf_counter() - begun - spent[-1])
        return shape

    weft.models.load.describe = watched  # type: ignore[attr-defined]
    for _ in range(rounds):
        spent.clear()
        begun = time.perf_counter()
        base = weft.models.load.load_base(name)
        found["load"].append(time.perf_counter() - begun - sum(spent))
        for parameter in base.model.parameters():
            parameter.sum()
        found["read"].append(time.perf_counter() - begun - sum(spent) - found["proof"][-1])
    return {key: statistics.median(values) for key, values in found.items()}


def row(title: str, name: str, rounds: int) -> str:
    """One line of the table."""
    os.environ["WEFT_CACHE_DIR"] = ""
    timed(name, 1)
    first = timed(name, rounds)
    with tempfile.TemporaryDirectory() as cache:
        os.environ["WEFT_CACHE_DIR"] = cache
        timed(name, 1)
        later = timed(name, rounds)
    cells = [f"{t['proof']:.4f} s of {t['load']:.3f} s, {100 * t['proof'] / t['load']:.1f} %" for t in (first, later)]
    return f"| {title} | {' | '.join(cells)} | {later['read']:.2f} s, {100 * later['proof'] / later['read']:.1f} % |"


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
        f"{torch.__version__}, medians of {options.rounds}. Files are in the page cache; transformers maps them "
        "lazily, so a load by itself touches hardly a weight.", "",
        "| base | first load: the proof in it | later loads: the proof in them | a later load, all weights read |",
        "|---|---|---|---|",
    ]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        names = {name: name for name in ("tiny-llama", "tiny-bloom")}
        if options.shape != "none":
            from transformers import AutoTokenizer

            from weft.assets import model_path

            build_model(SHAPES[options.shape]).save_pretrained(folder)
            AutoTokenizer.from_pretrained(model_path("tiny-llama"), trust_remote_code=False).save_pretrained(folder)
            names[f"Llama, {options.shape}, bf16"] = folder
        for title, name in names.items():
            rows.append(row(title, name, options.rounds))
            print(rows[-1], flush=True)
    text = "\n".join(rows) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
