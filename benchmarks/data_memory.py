"""How much memory does data take, from its files to the first step, and does it grow with the data?

    python benchmarks/data_memory.py [--data DIR] [--tokenizer NAME] [--tokens 3e6 30e6] [--kinds sft documents]

Instructions (Stanford Alpaca), and plain texts (Wikipedia, C4) joined to windows of 2,048, are repeated with numbers
put before them until there are so many tokens. A process of its own reads, renders, joins and audits them as a run
does before its first step, hashes them (as every checkpoint does), and makes the batches of the first epoch. Memory is
the process's peak above what it held before, with the tokenizer loaded.
"""

from __future__ import annotations

import argparse
import itertools
import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

SHARED = Path(os.environ.get("WEFT_SHARED_DATA") or Path(__file__).parents[2] / "shared/data")
FILES = {"sft": ("sft/alpaca_en.json",), "documents": ("text/wiki.txt", "text/c4.jsonl")}
LENGTH = 2048


def rows(kind: str, folder: Path) -> Iterator[dict[str, str]]:
    """Records without end, no two alike."""
    if kind == "sft":
        found = [row for row in json.loads((folder / FILES[kind][0]).read_text(encoding="utf-8")) if row["output"]]
        field = "instruction"
    else:
        wiki, c4 = ((folder / name).read_text(encoding="utf-8").splitlines() for name in FILES[kind])
        found, field = [{"text": line} for line in wiki if line.strip()] + [json.loads(line) for line in c4], "text"
    for number in itertools.count():
        row = found[number % len(found)]
        yield row | {field: f"{number}. {row[field]}"}


def write(kind: str, folder: Path, path: Path, tokens: float, tokenizer: Any) -> int:
    """A file of about so many tokens; returns how many records it has."""
    counted = list(itertools.islice(rows(kind, folder), 300))
    lengths = [len(ids) for ids in tokenizer([" ".join(row.values()) for row in counted])["input_ids"]]
    each = len(" ".join(" ".join(row.values()) for row in counted)) / sum(lengths)  # characters per token
    left, count = tokens * each, 0
    with path.open("w", encoding="utf-8") as file:
        for row in rows(kind, folder):
            file.write(json.dumps(row) + "\n")
            left -= sum(map(len, row.values()))
            count += 1
            if left <= 0:
                return count
    raise AssertionError


def memory(name: str) -> float:
    """MB of this process: VmRSS is what it holds now, VmHWM the most since ``forget_peak``."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) for line in file if line.startswith(name)) * 1024 / 1e6


def forget_peak() -> None:
    """What was held before no longer counts (nor what the process held that started this one)."""
    with open("/proc/self/clear_refs", "w") as file:
        file.write("5")


def one(kind: str, path: str, tokenizer: str) -> dict[str, Any]:
    """Peak memory and seconds of every step, of this process."""
    from weft.data import Renderer
    from weft.data.auditing.audit import audit_before_training
    from weft.models.load import load_tokenizer, sketch_base
    from weft.training import JobConfig, make_config
    from weft.training.batches import Batches
    from weft.training.job import Job
    from weft.training.reader import Reader, data_files

    documents = "joined" if kind == "documents" else "separate"
    config = make_config({"model": "none", "method": "lora", "data": path, "eval_split": 0.01, "max_length": LENGTH,
                          "truncate": True, "documents": documents})  # fmt: skip
    options: Any = {"documents": documents} if kind == "documents" else {}
    renderer = Renderer(load_tokenizer(tokenizer), max_length=LENGTH, truncate=True, **options)
    architecture = sketch_base("tiny-llama").architecture
    renderer.tokenizer("to have everything loaded")
    forget_peak()
    before, steps = memory("VmRSS"), {}

    def step(name: str, make: Callable[[], Any]) -> Any:
        begun = time.perf_counter()
        made = make()
        steps[name] = (round(memory("VmHWM") - before, 1), round(time.perf_counter() - begun, 2))
        return made

    data = step(
        "read, render, join",
        lambda: Reader(config, renderer, architecture, data_files(config)).job(config.jobs[0]),
    )
    step("audit", lambda: audit_before_training(renderer, data.train, data.held, "warn"))

    class Plain:
        samples, eval_samples, eval_sizes = data.train, data.held, dict[str, int]()
        adapter = argparse.Namespace(head=None)

    step("hash", lambda: Job.fingerprint.func(Plain()))  # type: ignore[attr-defined]
    train = JobConfig(name="one", method="lora", batch_tokens=LENGTH, epochs=1)
    batches = step("batches", lambda: Batches(train, data.train, mixture=data.mixture))
    return {"samples": len(data.train) + len(data.held), "steps of an epoch": batches.total_steps, "steps": steps}


def show(found: list[dict[str, Any]]) -> None:
    names = list(found[0]["steps"])
    print("| kind | tokens | records | file | " + " | ".join(names) + " | bytes per token |")
    print("|---" * (len(names) + 5) + "|")
    for row in found:
        cells = [f"{mb:,.0f} MB, {seconds:.1f} s" for mb, seconds in row["steps"].values()]
        whole = max(mb for mb, _ in row["steps"].values())
        print(f"| {row['kind']} | {row['tokens'] / 1e6:g} M | {row['records']:,} | {row['file'] / 1e6:,.0f} MB | "
              f"{' | '.join(cells)} | {whole * 1e6 / row['tokens']:.1f} |")  # fmt: skip


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", type=Path, default=SHARED, help="folder with sft/ and text/")
    parser.add_argument("--tokenizer", default=str(SHARED / "tokenizers/llama2"))
    parser.add_argument("--tokens", type=float, nargs="+", default=[3e6, 30e6])
    parser.add_argument("--kinds", nargs="+", choices=list(FILES), default=list(FILES))
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--one", nargs=2, metavar=("KIND", "FILE"), help="measure one file, in this process")
    args = parser.parse_args()
    if args.one:
        print(json.dumps(one(*args.one, args.tokenizer)))
        return 0
    missing = [str(args.data / file) for kind in args.kinds for file in FILES[kind] if not (args.data / file).is_file()]
    if missing:
        print(f"not there: {', '.join(missing)}; name the folder with --data", file=sys.stderr)
        return 1
    from weft.models.load import load_tokenizer

    found, tokenizer = [], load_tokenizer(args.tokenizer)
    with tempfile.TemporaryDirectory() as folder:
        for kind, tokens in itertools.product(args.kinds, args.tokens):
            path = Path(folder) / "data.jsonl"
            records = write(kind, args.data, path, tokens, tokenizer)
            command = [sys.executable, __file__, "--tokenizer", args.tokenizer, "--one", kind, str(path)]
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                print(done.stderr, file=sys.stderr)
                return 1
            row = json.loads(done.stdout.splitlines()[-1])
            found.append({"kind": kind, "tokens": tokens, "records": records, "file": path.stat().st_size} | row)
    if args.json:
        print(json.dumps(found))
    else:
        print(f"{platform.machine()}, {os.cpu_count()} cores, load {os.getloadavg()[0]:.1f}, windows of {LENGTH}")
        show(found)
    return 0


if __name__ == "__main__":
    sys.exit(main())
