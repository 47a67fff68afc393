"""The memory and the time that loading a base takes: as it is, in NF4, FP4 and int8, beside reading its files.

Each way is a process of its own. Memory is what no file backs: the files are mapped.

    python benchmarks/loading_quantised.py --output benchmarks/results/loading_<hardware>_<date>.md
"""

from __future__ import annotations

import argparse
import datetime
import json
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import torch

WAYS = ("none", "int8", "nf4", "fp4")


def make(folder: Path, layers: int, width: int) -> None:
    """Write a Llama of random weights in bfloat16, in several files."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.set_default_dtype(torch.bfloat16)
    config = LlamaConfig(
        vocab_size=1000, hidden_size=width, intermediate_size=11 * width // 4, num_hidden_layers=layers,
        num_attention_heads=16,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder, max_shard_size="500MB")


def anonymous() -> int:
    """The bytes of this process that no file backs."""
    told = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(told.split()[1]) << 10


def load(folder: str, way: str) -> dict[str, float]:
    """Load it in this process."""
    from weft.models import load_base

    kind: Any = None if way == "none" else way
    load_base("tiny-llama", quantization=kind, device="cpu")  # the libraries
    before, most, over = anonymous(), [0], threading.Event()

    def watch() -> None:
        while not over.is_set():
            most[0] = max(most[0], anonymous())
            time.sleep(0.001)

    thread = threading.Thread(target=watch)
    thread.start()
    begun = time.perf_counter()
    tokenizer: Any = object()
    base = load_base(folder, quantization=kind, device="cpu", tokenizer=tokenizer)
    seconds, after = time.perf_counter() - begun, anonymous()
    over.set()
    thread.join()
    kept = sum(p.nbytes for p in base.model.parameters())
    return {"seconds": seconds, "most": most[0] - before, "after": after - before, "parameters": kept}


def main() -> None:
    """Print the table, and write it to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--width", type=int, default=1024)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--load", nargs=2)
    options = parser.parse_args()
    if options.load:
        print(json.dumps(load(*options.load)))
        return
    with tempfile.TemporaryDirectory() as place:
        make(Path(place), options.layers, options.width)
        begun = time.perf_counter()
        size = sum(len(path.read_bytes()) for path in Path(place).glob("*.safetensors"))
        read = time.perf_counter() - begun
        lines = [
            "# Loading a base", "",
            f"`python benchmarks/loading_quantised.py --layers {options.layers} --width {options.width}`, "
            f"{datetime.date.today()}, {torch.get_num_threads()} threads, torch {torch.__version__}. Its files are "
            f"{size / 1e6:.0f} MB, and reading them takes {read:.2f} s. With the proof of the base.", "",
            "| kept in | parameters, MB | memory at most, MB | afterwards, MB | seconds | of reading |",
            "|---|---|---|---|---|---|",
        ]  # fmt: skip
        for way in WAYS:
            told = subprocess.run([sys.executable, __file__, "--load", place, way], stdout=subprocess.PIPE, check=True)
            found = json.loads(told.stdout.splitlines()[-1])
            megabytes = " | ".join(f"{found[key] / 1e6:.0f}" for key in ("parameters", "most", "after"))
            lines.append(f"| {way} | {megabytes} | {found['seconds']:.2f} | {found['seconds'] / read:.1f} |")
            print(lines[-1], flush=True)
    if options.output:
        options.output.write_text("\n".join(lines) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
