"""How fast and how lean is Weft beside transformers.Trainer + PEFT, on the same real records, on this machine?

    python benchmarks/train_speed.py [--shape 1.26b] [--steps 4] [--rounds 2] [--out benchmarks/results/FILE.md]

LoRA (r 16) on all linear layers of a Llama shape with random bfloat16 weights; Alpaca records, batch 8, at most 512
tokens. ``defaults``: Trainer + PEFT as they come, batches shuffled. ``expert``: the same as an expert tunes them,
length-grouped batches and bfloat16 adapters. ``weft``: the shuffled batches of ``defaults``. ``weft-5`` trains five
methods at once, each on batches of its own; ``weft-alone`` the same five one after the other. ``gemm`` is the machine's
own bfloat16 matrix product. Every contestant runs in a process of its own, all in turn, once per round; one step warms
up and is not timed. Needs the shared data (WEFT_SHARED_DATA) and the ``bench`` extra.
"""

from __future__ import annotations

import argparse
import datetime
import json
import platform
import statistics
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path
from typing import Any

CONTESTANTS = ("gemm", "defaults", "expert", "weft", "weft-5", "weft-alone")
PACKAGES = ("torch", "transformers", "peft", "accelerate")
Runs = dict[str, list[dict[str, Any]]]


def run_one(contestant: str, args: argparse.Namespace, seed: int) -> dict[str, Any] | None:
    """A contestant's figures; None, with its last words on the screen, if it failed or had nothing to run on."""
    script = Path(__file__).with_name("speed_contestants.py")
    command = [sys.executable, str(script), contestant, "--shape", args.shape, "--steps", str(args.steps)]
    command += ["--seed", str(seed), "--threads", str(args.threads)]
    done = subprocess.run(command, capture_output=True, text=True)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        print(f"{contestant}: no result\n" + done.stderr[-2000:], file=sys.stderr)
        return None
    return json.loads(lines[-1].removeprefix("RESULT "))


def summary(name: str, result: dict[str, Any]) -> str:
    """For the screen."""
    if name == "gemm":
        return ", ".join(f"{shape} {rate:.0f}" for shape, rate in result["rates"].items()) + " GFLOP/s"
    rate, cores = result["tokens"] / result["seconds"], result["cpu_seconds"] / result["seconds"]
    return f"{rate:.1f} tok/s, {cores:.2f} cores busy, {result['peak_bytes'] / 1e9:.2f} GB"


def speeds(runs: list[dict[str, Any]]) -> list[float]:
    """Useful tokens per second of each round."""
    return [run["tokens"] / run["seconds"] for run in runs]


def gemm_rate(runs: Runs) -> float | None:
    """GFLOP/s: per shape the best of all rounds, then the median over shapes."""
    found = runs.get("gemm")
    if not found:
        return None
    return statistics.median(max(run["rates"][shape] for run in found) for shape in found[0]["rates"])


def table(runs: Runs) -> list[str]:
    """One row per contestant: median over rounds; memory is the highest peak."""
    gemm, base = gemm_rate(runs), runs.get("defaults")
    lines = [
        "| contestant | useful tok/s (each round) | GFLOP/s at 4N | of the machine's GEMM | CPU s per 1,000 tokens "
        "| peak memory GB | speed / defaults | memory / defaults |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for name, found in runs.items():
        if name == "gemm" or not found:
            continue
        rate, peak = statistics.median(speeds(found)), max(run["peak_bytes"] for run in found)
        flops = 4 * found[0]["parameters"] * rate / 1e9
        cpu = statistics.median(1e3 * run["cpu_seconds"] / run["tokens"] for run in found)
        faster = f"{rate / statistics.median(speeds(base)):.2f}" if base else "–"
        leaner = f"{peak / max(run['peak_bytes'] for run in base):.2f}" if base else "–"
        each = ", ".join(f"{speed:.0f}" for speed in speeds(found))
        share = f"{100 * flops / gemm:.0f} %" if gemm else "–"
        cells = [name, f"{rate:.1f} ({each})", f"{flops:.0f}", share, f"{cpu:.2f}", f"{peak / 1e9:.2f}", faster, leaner]
        lines.append("| " + " | ".join(cells) + " |")
    return lines


def loss_table(runs: Runs) -> list[str]:
    """Losses of the first round: the warm-up batch is the same for all, the later ones for all but ``expert``."""
    rows = {name: found[0]["losses"] for name, found in runs.items() if name != "gemm" and found}
    if not rows:
        return []
    steps = max(len(losses) for losses in rows.values())
    lines = ["| loss of step | " + " | ".join(str(i + 1) for i in range(steps)) + " |", "|---" * (steps + 1) + "|"]
    for name, losses in rows.items():
        lines.append(f"| {name} | " + " | ".join(f"{loss:.4f}" for loss in losses) + " |")
    return lines


def processor() -> str:
    """Model name and what of it matters here."""
    text = Path("/proc/cpuinfo").read_text()
    name = next((line.split(":")[1].strip() for line in text.splitlines() if line.startswith("model name")), "unknown")
    return name + (" with AMX bf16" if "amx_bf16" in text else "")


def report(runs: Runs, args: argparse.Namespace) -> str:
    """The result page."""
    versions = ", ".join(f"{name} {version(name)}" for name in PACKAGES)
    command = f"python benchmarks/train_speed.py --shape {args.shape} --steps {args.steps} --rounds {args.rounds}"
    command += f" --threads {args.threads} --contestants {' '.join(args.contestants)}"
    command += f" --out {args.out}" if args.out else ""
    lines = [f"# Training speed and memory, {args.shape} Llama shape, {args.threads} cores", "", f"    {command}", ""]
    lines += [f"{datetime.date.today()}, {processor()}; {versions}; Python {platform.python_version()}.", ""]
    lines += [
        "LoRA r 16 on all linear layers, bf16, batch 8, real Alpaca records (Llama-2 tokenizer, at most 512 tokens, "
        f"loss on the answer); {args.steps} timed optimizer steps per round after one warm-up; pads do not count.",
        "",
        *table(runs),
        "",
    ]
    if (gemm := gemm_rate(runs)) is not None:
        every = [rate for run in runs["gemm"] for rate in run["rates"].values()]
        lines += [
            f"The machine's own bf16 matrix product: {gemm:.0f} GFLOP/s (median over shapes of the best; the "
            f"calls lie in {min(every):.0f}–{max(every):.0f}).",
            "",
        ]
    return "\n".join([*lines, *loss_table(runs), ""])


def main() -> None:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shape", choices=("tiny", "160m", "1.26b"), default="1.26b")
    parser.add_argument("--contestants", nargs="+", choices=CONTESTANTS, default=["gemm", "defaults", "expert", "weft"])
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--out", help="write the result here, as markdown")
    args = parser.parse_args()
    runs: Runs = {name: [] for name in args.contestants}
    for seed in range(args.rounds):
        for name in args.contestants:
            result = run_one(name, args, seed)
            if result is None:
                continue
            runs[name].append(result)
            print(f"round {seed + 1}, {name}: {summary(name, result)}", flush=True)
    text = report(runs, args)
    print(text)
    if args.out and all(runs.values()):
        Path(args.out).write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
