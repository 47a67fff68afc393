"""Runs the tests of ``make test`` with the Python that runs this, and writes down with which versions.

    .venv-oldest/bin/python tools/versions.py oldest [--date 2026-11-29] [arguments of pytest]

The result is ``benchmarks/results/versions_<what>_<date>.md``; the exit code is pytest's.
"""

from __future__ import annotations

import argparse
import collections
import datetime
import importlib.metadata
import os
import platform
import re
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
COMMAND = ["-m", "pytest", "-n", "2", "--dist", "loadfile", "-m", "not slow", "-rfEs"]


def run(arguments: list[str]) -> tuple[int, str]:
    """pytest's exit code and what it printed, which is shown as well."""
    with subprocess.Popen(
        [sys.executable, *COMMAND, *arguments], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        assert process.stdout is not None
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
    return process.returncode, "".join(lines)


def skips(output: str) -> collections.Counter[str]:
    """Why how many tests were skipped."""
    found: collections.Counter[str] = collections.Counter()
    for count, reason in re.findall(r"^SKIPPED \[(\d+)\] \S+: (.*)$", output, flags=re.MULTILINE):
        found[reason] += int(count)
    return found


def page(what: str, date: str, code: int, output: str, minutes: float, arguments: list[str]) -> str:
    """The result file."""
    versions = sorted({(d.metadata["Name"], d.version) for d in importlib.metadata.distributions()}, key=str)
    totals = re.findall(r"^=*\s*(\d+ (?:passed|failed|skipped|errors?).*?)\s*=*$", output, flags=re.MULTILINE)
    failed = re.findall(r"^(?:FAILED|ERROR) (\S+)", output, flags=re.MULTILINE)
    command = " ".join(f"'{part}'" if " " in part else part for part in [*COMMAND, *arguments])
    lines = [
        f"# The tests with the {what} versions, {date}", "",
        f"    make test-{what}", "",
        f"which runs, in an environment of its own, `python {command}`: {'green' if code == 0 else 'red'}, "
        f"{totals[-1] if totals else 'no total'}; {minutes:.0f} minutes on a busy machine of {os.cpu_count()} cores, "
        f"Python {platform.python_version()}.", "",
    ]  # fmt: skip
    lines += [f"- failed: `{name}`" for name in failed]
    lines += [f"- {count} skipped: {reason}" for reason, count in skips(output).most_common()]
    lines += ["", "| package | version |", "|---|---|", *(f"| {name} | {version} |" for name, version in versions)]
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("what")
    parser.add_argument("--date", default=str(datetime.date.today()))
    arguments, more = parser.parse_known_args()
    start = time.monotonic()
    code, output = run(more)
    text = page(arguments.what, arguments.date, code, output, (time.monotonic() - start) / 60, more)
    path = ROOT / "benchmarks" / "results" / f"versions_{arguments.what}_{arguments.date}.md"
    path.write_text(text, encoding="utf-8")
    print(f"written: {path.relative_to(ROOT)}")
    return code


if __name__ == "__main__":
    sys.exit(main())
