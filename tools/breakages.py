"""Breaks Weft in ten ways, each in a copy, and shows which tests go red.

    python tools/breakages.py [--only NUMBER] [--tree FOLDER] [--output FILE]

A breakage is a text that stands once in the source, and what it is replaced by; the text is looked for in all files,
so that moving a file changes nothing here. The tests are those that should see it. The exit code is 0 if every breakage
is caught, and all these tests are green without one.
"""

from __future__ import annotations

import os

# As tests/conftest.py, before torch is imported.
os.environ.update(OMP_NUM_THREADS="1", HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false", WEFT_CACHE_DIR="")

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent


@dataclass(frozen=True)
class Breakage:
    """What is broken: ``old`` becomes ``new``; ``tests`` are pytest's arguments."""

    what: str
    old: str
    new: str
    tests: tuple[str, ...]


BREAKAGES = (
    Breakage(
        "the mask is not shifted: a row learns its own token",
        "rows.append(batch.before(places[place]))",
        "rows.append(places[place])",
        ("tests/contracts/test_routing.py::test_a_sample_alone_has_the_loss_of_plain_cross_entropy",),
    ),
    Breakage(
        "a job's loss is divided by the tokens of another",
        "                divisor=weight[j.name],",
        "                divisor=max(weight.values()),",
        ("tests/contracts/test_isolation.py::test_leak_1_the_mean_is_each_jobs_own",),
    ),
    Breakage(
        "the state of the random numbers is not in the checkpoint",
        '"dropout", self.progress.step, micro)',
        '"dropout", self.__dict__.setdefault("_drawn", []).append(0) or len(self.__dict__["_drawn"]), micro)',
        ("tests/training/test_resume.py::test_asked_to_stop_anywhere[4]",),
    ),
    Breakage(
        "a merge takes alpha for alpha / r",
        "merged.add_low_rank(self.lora_A, self.lora_B, self.scaling)\n\n\ndef _make_layer",
        "merged.add_low_rank(self.lora_A, self.lora_B, self.scaling * len(self.lora_A))\n\n\ndef _make_layer",
        ("tests/contracts/test_merge.py::test_in_the_bases_own_dtype[lora]",),
    ),
    Breakage(
        "a bad row is left out without a word",
        '        if self.on_bad_record == "error":\n            raise self.error()\n        kinds =',
        "        kinds =",
        ("tests/data/test_problems.py::test_error_lists_each_at_its_place",),
    ),
    Breakage(
        "a save forgets a module",
        "for path, layer in zip(self.paths, self.layers, strict=True)",
        "for path, layer in list(zip(self.paths, self.layers, strict=True))[1:]",
        ("tests/contracts/test_routing.py::test_saved_is_what_was_trained_and_loads_exactly[lora-llama]",),
    ),
    Breakage(
        "an adapter of NaN is accepted",
        "if not bool(finite.all()):",
        "if False:",
        ("tests/files/test_adapter_folder.py::test_sick_tensors_are_named",),
    ),
    Breakage(
        "positions behind a prefix begin one too early",
        "_lay_part(laid, part, adapter, first_position + prefix, shares(part))",
        "_lay_part(laid, part, adapter, first_position + prefix - bool(prefix), shares(part))",
        ("tests/contracts/test_peft.py::test_peft_to_ours[llama-prefix_tuning-plain]",),
    ),
    Breakage(
        "a chat template may read what Python keeps private",
        "class _Environment(ImmutableSandboxedEnvironment):\n",
        "class _Environment(ImmutableSandboxedEnvironment):\n    is_safe_attribute = lambda *given: True\n",
        ("tests/data/test_sandbox.py::test_nothing_leads_out",),
    ),
    Breakage(
        "all jobs draw dropout from one generator",
        "generator.manual_seed(stable_seed(segment.seed, site))",
        "generator = torch.default_generator",
        ("tests/contracts/test_isolation.py::test_leak_3_a_neighbours_dropout_does_not_change_mine",),
    ),
)


def copy_of(tree: Path, folder: Path) -> Path:
    """Sources and tests, without results and data."""
    for name in ("src", "tests", "tools", "benchmarks"):
        shutil.copytree(tree / name, folder / name, ignore=shutil.ignore_patterns("__pycache__", "results"))
    shutil.copy(tree / "pyproject.toml", folder)
    return folder


def apply(breakage: Breakage, tree: Path) -> str:
    """Break the copy; returns the file.

    Raises:
        ValueError: the text is not in exactly one place.
    """
    found = [p for p in sorted((tree / "src").rglob("*.py")) if breakage.old in p.read_text(encoding="utf-8")]
    if len(found) != 1 or (text := found[0].read_text(encoding="utf-8")).count(breakage.old) != 1:
        raise ValueError(f"{breakage.what}: the text to replace is not in exactly one place ({len(found)} files)")
    found[0].write_text(text.replace(breakage.old, breakage.new), encoding="utf-8")
    return str(found[0].relative_to(tree / "src"))


class _Results:
    """A plugin of pytest that notes how many tests ran, and which are red."""

    def __init__(self) -> None:
        self.ran: set[str] = set()
        self.red: list[str] = []

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        self.ran.add(report.nodeid)
        if report.failed and report.nodeid not in self.red:
            self.red.append(report.nodeid)


def run(tree: Path, tests: Sequence[str]) -> tuple[list[str], int]:
    """The tests that are red, and how many ran, in a copy of this process, which has the libraries loaded.

    Raises:
        RuntimeError: pytest could not run them (a test of that name is not there).
    """
    told = tree / "results.json"
    told.unlink(missing_ok=True)
    child = os.fork()
    if child == 0:
        results = _Results()
        with open(tree / "output.txt", "w") as out:
            os.dup2(out.fileno(), 1)
            os.dup2(out.fileno(), 2)
        os.chdir(tree)
        sys.path[:0] = [str(tree / "src"), str(tree)]
        os.environ["PYTHONPATH"] = os.pathsep.join(sys.path[:2])
        sys.dont_write_bytecode = True
        code = pytest.main(["-m", "not slow", "-p", "no:cacheprovider", "--tb=line", *tests], plugins=[results])
        if code in (pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED):
            told.write_text(json.dumps([results.red, len(results.ran)]), encoding="utf-8")
        os._exit(0)
    os.waitpid(child, 0)
    if not told.exists():
        raise RuntimeError((tree / "output.txt").read_text(encoding="utf-8")[-2000:])
    red, count = json.loads(told.read_text(encoding="utf-8"))
    return red, count


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, action="append", help="the number of a breakage")
    parser.add_argument("--tree", type=Path, default=ROOT)
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    import peft  # noqa: F401 - loaded once, for all tests

    rows = ["| | broken | in | caught | red tests |", "|---|---|---|---|---|"]
    missed = 0
    with tempfile.TemporaryDirectory() as temporary:
        whole = copy_of(arguments.tree, Path(temporary) / "whole")
        chosen = [(n, b) for n, b in enumerate(BREAKAGES, 1) if not arguments.only or n in arguments.only]
        red, count = run(whole, list(dict.fromkeys(test for _, breakage in chosen for test in breakage.tests)))
        print(f"without a breakage: {len(red)} of {count} tests are red", *red, sep="\n", flush=True)
        missed += len(red)
        for number, breakage in chosen:
            broken = Path(temporary) / "broken"
            shutil.rmtree(broken, ignore_errors=True)
            shutil.copytree(whole, broken)
            where = apply(breakage, broken)
            red, count = run(broken, breakage.tests)
            missed += not red
            names = ", ".join(f"`{name}`" for name in red[:2]) + " …" * (len(red) > 2)
            caught = f"caught by {len(red)} of {count}" if red else "NOT CAUGHT"
            rows.append(f"| {number} | {breakage.what} | `{where}` | {caught} | {names} |")
            print(rows[-1], flush=True)
    if arguments.output:
        arguments.output.write_text("\n".join(rows) + "\n", encoding="utf-8")
    return min(missed, 1)


if __name__ == "__main__":
    sys.exit(main())
