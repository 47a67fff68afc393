"""``make hostile``: runs the whole corpus, prints what each kind cost, and writes it down.

python -m tests.hostile.report [--workers 2] [--only TEXT] [--output FILE]
"""

from __future__ import annotations

import argparse
import platform
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from tests.hostile.corpus import CASES
from tests.hostile.crew import run_cases
from tests.hostile.judge import Outcome, faults

HEAD = """# Hostile files

`make hostile`: every case goes through the command line, in a process under an audit hook that counts code that runs,
files opened outside the case's folder and connections. Asked for are none of these, exit code 2 with one sentence, and
at most 5 s and 500 MB above what the process held before. Time is the process's own, for the machine was shared;
libraries are loaded before.

{versions}, {workers} processes on two shared cores. {summary}.

"""


def table(outcomes: dict[int, Outcome]) -> list[str]:
    """A line of Markdown for each kind, and one for all."""
    kinds: dict[str, list[Outcome]] = defaultdict(list)
    for number, outcome in sorted(outcomes.items()):
        kinds[CASES[number].kind].append(outcome)
    kinds["all"] = list(outcomes.values())
    lines = ["| kind | cases | worst time | worst memory | exit codes | ran code, opened outside, connected |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for kind, found in kinds.items():
        codes = ", ".join(map(str, sorted({one.code for one in found})))
        seconds, memory = max(one.seconds for one in found), max(one.memory for one in found) / 1e6
        events = sum(bool(one.events) for one in found)
        lines.append(f"| {kind} | {len(found)} | {seconds:.2f} s | {memory:.0f} MB | {codes} | {events} |")
    return lines


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--only", default="")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    numbers = [i for i, case in enumerate(CASES) if options.only in case.id]
    outcomes: dict[int, Outcome] = {}
    begun = time.perf_counter()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as folder:
        for number, outcome in run_cases(numbers, Path(folder), options.workers):
            outcomes[number] = outcome
            found = faults(outcome, codes=CASES[number].codes)
            if found:
                wrong.append(f"{CASES[number].id}: {'; '.join(found)[:400]}")
                print("WRONG", wrong[-1], flush=True)
    lines = table(outcomes)
    print("\n".join(lines))
    summary = f"{len(outcomes)} cases, {time.perf_counter() - begun:.0f} s, {len(wrong)} wrong"
    print(summary)
    if options.output:
        import torch
        import transformers

        versions = f"Python {platform.python_version()}, torch {torch.__version__}"
        head = HEAD.format(versions=f"{versions}, transformers {transformers.__version__}", summary=summary,
                           workers=options.workers)  # fmt: skip
        options.output.write_text(head + "\n".join([*lines, *(f"- WRONG {line}" for line in wrong)]) + "\n")
    sys.exit(bool(wrong))


if __name__ == "__main__":
    main()
