"""Every causal language model of transformers, tiny, through Weft and each method: is any answer silently wrong?

    python benchmarks/architectures.py --output benchmarks/results/architectures_2-core_2026-11-29.md
    python benchmarks/architectures.py --types llama mamba2 --methods lora ln_tuning      some of it, printed

A cell is ``stream`` or ``padded`` (proved equal there), ``refused`` (with a sentence that names what), ``WRONG`` or
``CRASH``; the last two must not be. What is compared is in ``architecture_judge``; the truth is transformers' untouched
model (``architecture_truth``); the configurations are in ``architecture_configs``. Each runs in a process of its own.
What is done is kept beside the output until all is done: the same command goes on where it stopped.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "src")]
# Before torch is imported: the processes share the cores.
os.environ["OMP_NUM_THREADS"] = "1"
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

from benchmarks import architecture_configs as configs  # noqa: E402

TIME_LIMIT = 180


def run_one(name: str, methods: list[str], folder: Path, tokenizer: Any, result: Path) -> None:
    """In a process of its own: judge one configuration and write its cells."""
    result.write_text(json.dumps(cells_of(name, methods, folder, tokenizer)), encoding="utf-8")


def cells_of(name: str, methods: list[str], folder: Path, tokenizer: Any) -> dict[str, Any]:
    """Outcomes by column; or ``not_made``, why there is no such tiny model in a folder."""
    from benchmarks.architecture_judge import Judge
    from benchmarks.architecture_truth import first_line, write_model

    if name in configs.NOT_TINY:
        return {"not_made": configs.NOT_TINY[name]}
    try:
        write_model(name, folder, tokenizer)
        judge = Judge(name, folder)
    except Exception as error:  # the configuration's, or transformers' own: nothing of Weft has run yet
        return {"not_made": f"{type(error).__name__}: {first_line(error)}"}
    return {column: cell.as_json() for column, cell in judge.judge(methods).items()}


def prepare() -> Any:
    """Import all that the processes need, once, before they are forked; returns the tokenizer."""
    import warnings

    warnings.filterwarnings("ignore")
    import benchmarks.architecture_judge  # noqa: F401
    import peft  # noqa: F401
    import torch
    import transformers
    from tests.conftest import make_tokenizer

    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    return make_tokenizer()


class Pool:
    """Runs configurations, some at once, each in a forked process that may take ``TIME_LIMIT`` seconds."""

    def __init__(self, methods: list[str], jobs: int, kept: Path) -> None:
        self.methods, self.jobs, self.kept = methods, jobs, kept
        self.tokenizer = prepare()
        self.fork = multiprocessing.get_context("fork")
        self.running: dict[str, tuple[Any, float]] = {}

    def run(self, names: list[str]) -> None:
        """Judge all of ``names``; a line per configuration goes to ``kept`` as it is done."""
        waiting, done, total = list(names), 0, len(names)
        with tempfile.TemporaryDirectory() as scratch:
            while waiting or self.running:
                while waiting and len(self.running) < self.jobs:
                    self.start(waiting.pop(0), Path(scratch))
                time.sleep(0.02)
                for name in [n for n, (process, began) in self.running.items() if self.ended(process, began)]:
                    done += 1
                    self.finish(name, Path(scratch), f"{done}/{total}")

    def start(self, name: str, scratch: Path) -> None:
        place = scratch / name.replace(":", "+")
        place.mkdir()
        target = (name, self.methods, place, self.tokenizer, place / "result")
        process = self.fork.Process(target=run_one, args=target, daemon=True)
        process.start()
        self.running[name] = (process, time.monotonic())

    @staticmethod
    def ended(process: Any, began: float) -> bool:
        if process.is_alive() and time.monotonic() - began > TIME_LIMIT:
            process.kill()
        return not process.is_alive()

    def finish(self, name: str, scratch: Path, count: str) -> None:
        process, began = self.running.pop(name)
        process.join()
        seconds = time.monotonic() - began
        result = scratch / name.replace(":", "+") / "result"
        if result.is_file():
            cells = json.loads(result.read_text(encoding="utf-8"))
        else:
            how = f"over {TIME_LIMIT} s" if seconds > TIME_LIMIT else f"exit code {process.exitcode}"
            cells = {"base": {"outcome": f"CRASH: the process ended: {how}", "notes": []}}
        with self.kept.open("a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, "methods": self.methods, "seconds": seconds, "cells": cells}) + "\n")
        outcomes = [cell["outcome"].split(":")[0] for key, cell in cells.items() if key != "not_made"]
        said = ", ".join(f"{outcomes.count(kind)} {kind}" for kind in dict.fromkeys(outcomes)) or "not made"
        print(f"[{count}] {name}: {said} ({seconds:.1f} s)", file=sys.stderr, flush=True)


def read_kept(path: Path, methods: list[str]) -> dict[str, dict[str, Any]]:
    """What an earlier run of the same methods has done."""
    if not path.is_file():
        return {}
    lines = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
    return {line["name"]: line for line in lines if line["methods"] == methods}


def main() -> int:
    """Exit code 1 if a cell is WRONG or CRASH."""
    parser = argparse.ArgumentParser(description="Is any base or adapter silently wrong?")
    parser.add_argument("--types", nargs="+", help="model types, or type:variant (default: all)")
    parser.add_argument("--methods", nargs="*", help="methods beside the plain base (default: all)")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--output", type=Path, help="the Markdown file (default: printed)")
    parser.add_argument("--keep", action="store_true", help="keep the file of raw results beside the output")
    given = parser.parse_args()

    from benchmarks.architecture_report import report

    known = configs.names()
    wanted = [n for n in known if not given.types or n in given.types or n.split(":")[0] in given.types]
    strange = [t for t in given.types or () if t not in known and t not in {n.split(":")[0] for n in known}]
    if strange or not wanted:
        parser.error(f"no configuration of {', '.join(strange)}")
    from benchmarks.architecture_judge import COLUMNS

    methods = COLUMNS[1:] if given.methods is None else given.methods
    if unknown := [m for m in methods if m not in COLUMNS[1:]]:
        parser.error(f"no method {', '.join(unknown)}; there are {', '.join(COLUMNS[1:])}")
    output = given.output or Path(tempfile.mkdtemp()) / "matrix.md"
    kept = output.with_suffix(".jsonl")
    done = read_kept(kept, methods)
    Pool(methods, given.jobs, kept).run([name for name in wanted if name not in done])
    done = read_kept(kept, methods)
    found = {name: done[name]["cells"] for name in wanted}
    command = f"python benchmarks/architectures.py {' '.join(sys.argv[1:])}".strip()
    text, bad = report(found, methods, command, sum(done[name].get("seconds", 0.0) for name in wanted))
    output.write_text(text, encoding="utf-8")
    if not given.output:
        print(text)
    if not given.keep:
        kept.unlink()
    print(f"{bad} cells are WRONG or CRASH", file=sys.stderr)
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
