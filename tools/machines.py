"""Runs the numeric tests as other machines would: other numbers of threads, other kernels.

    make test-machines
    python tools/machines.py --only avx2 tests/ops tests/core

Writes ``benchmarks/results/machines_<date>.md``: whether each setting is green, and every limit that was missed by less
than a factor of ten. Such a limit must be derived from what it bounds; the place says how.
"""

from __future__ import annotations

import argparse
import datetime
import json
import os
import platform
import re
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
NUMERIC = ["tests/contracts", "tests/core", "tests/layouts", "tests/combine", "tests/ops", "tests/methods",
           "tests/models", "tests/generation", "tests/training", "tests/cli/test_merge.py",
           "tests/test_libraries.py"]  # fmt: skip
# MKL has kernels of its own, which torch's variable does not reach. Threads that outnumber the cores must not spin.
SETTINGS = {
    "1 thread": {"WEFT_TEST_THREADS": "1"},
    "2 threads": {"WEFT_TEST_THREADS": "2", "OMP_WAIT_POLICY": "PASSIVE"},
    "4 threads": {"WEFT_TEST_THREADS": "4", "OMP_WAIT_POLICY": "PASSIVE"},
    "avx2": {"ATEN_CPU_CAPABILITY": "avx2", "MKL_CBWR": "AVX2", "ONEDNN_MAX_CPU_ISA": "AVX2"},
    "default": {"ATEN_CPU_CAPABILITY": "default", "MKL_CBWR": "COMPATIBLE", "ONEDNN_MAX_CPU_ISA": "SSE41"},
}


def run(setting: str, tests: list[str], processes: int) -> tuple[str, dict[tuple[str, str], float]]:
    """pytest's last line, and per test and comparison the largest share of its limit."""
    with tempfile.TemporaryDirectory() as folder:
        near = Path(folder) / "near.jsonl"
        parallel = ["-n", str(processes), "--dist", "loadfile"] if processes > 1 else []
        command = [sys.executable, "-m", "pytest", "-p", "tests.near", "--near", str(near), "-o",
                   "enable_assertion_pass_hook=true", "-p", "no:cacheprovider", "-m", "not slow",
                   *parallel, *tests]  # fmt: skip
        environment = {**os.environ, **SETTINGS[setting], "PYTHONDONTWRITEBYTECODE": "1",
                       "PYTHONPYCACHEPREFIX": str(Path(folder) / "cache")}  # fmt: skip
        done = subprocess.run(command, cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True, check=False)
        failed = re.findall(r"^(?:FAILED|ERROR) .*", done.stdout, flags=re.MULTILINE)
        print(f"{setting}: {done.stdout.splitlines()[-1]}", *failed, sep="\n", flush=True)
        shares: dict[tuple[str, str], float] = {}
        for line in near.read_text(encoding="utf-8").splitlines() if near.exists() else ():
            one = json.loads(line)
            if one["limit"] > 0 and one["found"] > 0:
                key = (one["test"], one["what"])
                shares[key] = max(shares.get(key, 0.0), one["found"] / one["limit"])
    return "; ".join([done.stdout.splitlines()[-1].strip("= "), *failed]), shares


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=SETTINGS, action="append")
    parser.add_argument("--date", default=str(datetime.date.today()))
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--output", type=Path)
    parser.add_argument("tests", nargs="*", default=NUMERIC)
    arguments = parser.parse_args()
    import torch

    command = " ".join(["python tools/machines.py", *sys.argv[1:]])
    lines = [f"# The numeric tests on other machines, {arguments.date}", "", f"    {command}", "",
             f"{platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}, Python "
             f"{platform.python_version()}; {' '.join(arguments.tests)}", "",
             "| setting | variables | result |", "|---|---|---|"]  # fmt: skip
    largest: dict[tuple[str, str], tuple[float, str]] = {}
    red = False
    for setting in arguments.only or SETTINGS:
        result, shares = run(setting, arguments.tests, arguments.processes)
        red = red or "failed" in result or "error" in result
        variables = " ".join(f"{key}={value}" for key, value in SETTINGS[setting].items())
        lines.append(f"| {setting} | `{variables}` | {result} |")
        for key, share in shares.items():
            largest[key] = max(largest.get(key, (0.0, "")), (share, setting))
    close = sorted(((share, *key, setting) for key, (share, setting) in largest.items() if share > 0.1), reverse=True)
    lines += ["", f"{len(largest)} limits of numbers that were not zero; nearer than a factor of ten: {len(close)}.",
              "", "| share of the limit | setting | test | what |", "|---|---|---|---|"]  # fmt: skip
    lines += [f"| {share:.2f} | {setting} | `{test}` | `{what}` |" for share, test, what, setting in close]
    path = arguments.output or ROOT / "benchmarks" / "results" / f"machines_{arguments.date}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return int(red)


if __name__ == "__main__":
    sys.exit(main())
