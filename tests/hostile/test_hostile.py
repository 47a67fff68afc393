"""Nobody's file runs code, hangs or crashes us. A part of the corpus in every run of the tests, all of it with -m slow
(``make hostile`` prints it as a table)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from tests.hostile.corpus import CASES
from tests.hostile.crew import run_cases
from tests.hostile.judge import ROOT, Watch, faults
from tests.hostile.kit import CANARY, Place, make_good

# Of each kind so many; those that are about time take it, and are left to the whole corpus.
SOME = 1
SLOW = ("templates", "patterns", "data")
FEW = ("data: bz2 bomb", "data: a line of 30 MB", "data: a FIFO", "patterns: target_modules (.*)*#",
       "templates in weft.json of an adapter: tower", "templates in an adapter's tokenizer: str.format")  # fmt: skip


def some() -> list[int]:
    """Numbers of the cases for every run: the first of each kind, and those that are named."""
    seen: dict[str, int] = {}
    chosen = []
    for number, case in enumerate(CASES):
        seen[case.kind] = seen.get(case.kind, 0) + 1
        if (seen[case.kind] <= SOME and not case.kind.startswith(SLOW)) or case.id in FEW:
            chosen.append(number)
    return chosen


def wrong(numbers: list[int], folder: Path, workers: int) -> list[str]:
    """What of these cases is not as promised."""
    found = []
    for number, outcome in run_cases(numbers, folder, workers):
        # In the suite the machine is shared with other tests: what hangs is ended all the same.
        found += [f"{CASES[number].id}: {fault}" for fault in faults(outcome, codes=CASES[number].codes, seconds=10.0)]
    return found


def test_the_corpus_is_large_and_each_case_has_a_name() -> None:
    names = [case.id for case in CASES]
    assert len(names) >= 200
    assert len(set(names)) == len(names)
    assert len({case.kind for case in CASES}) >= 30
    assert set(FEW) <= set(names)


def test_some_of_the_corpus(tmp_path: Path) -> None:
    assert wrong(some(), tmp_path, 1) == []


@pytest.mark.slow
def test_all_of_the_corpus(tmp_path: Path) -> None:
    assert wrong(list(range(len(CASES))), tmp_path, 2) == []


@pytest.fixture(scope="module")
def good(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return make_good(tmp_path_factory.mktemp("good") / "good")


@pytest.mark.parametrize(
    ("name", "verb"),
    [
        ("code in config.json: auto_map, unknown type", "chat"),
        *(
            pytest.param(f"code in {place}", verb, marks=pytest.mark.slow)
            for place, verb in (
                ("config.json: auto_map, unknown type", "generate"),
                ("tokenizer_config.json of a adapter: auto_map, no class", "chat"),
                ("tokenizer_config.json of a adapter: auto_map, no class", "generate"),
            )
        ),
    ],
)
def test_yes_on_stdin_runs_nothing(name: str, verb: str, good: Any, tmp_path: Path) -> None:
    """transformers asks on stdin whether to run a stranger's Python; ``printf 'y\\n' | weft chat ./m`` said yes."""
    case = next(case for case in CASES if case.id == name)
    folder = case.build(Place(tmp_path, good))[1]
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    result = subprocess.run(
        [sys.executable, "-m", "weft.cli.main", verb, str(folder), *(["--prompt", "a"] if verb == "generate" else [])],
        input="y\n" * 9, capture_output=True, text=True, cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1"}, timeout=300,
    )  # fmt: skip
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("error: ")
    assert "Traceback" not in result.stderr
    assert "[y/N]" not in result.stdout + result.stderr
    assert not list(tmp_path.rglob(f"{CANARY}.txt"))
    assert not list(tmp_path.rglob(f"{CANARY}.sh"))


PROBE = """
import json, sys
from pathlib import Path
from tests.hostile.judge import Watch
watch, counts = Watch(), []
for number, code in enumerate(json.loads(sys.argv[2])):
    folder = Path(sys.argv[1]) / str(number)
    (folder / "out").mkdir(parents=True)
    (folder / "a.json").write_text("{}")
    with watch.over(folder):
        exec(code)
    counts.append(len(watch.events))
print(json.dumps(counts))
"""
# What is done, and how many events the hook sees at least; 0: none.
DEEDS = [
    ("open('/etc/hostname')", 1),
    ("open(folder / 'canary.txt', 'w')", 1),
    ("open(folder / 'out' / 'a.txt', 'w')", 0),
    ("open(folder / 'a.json')", 0),
    ("exec(compile('1', str(folder / 'm.py'), 'exec'))", 2),
    ("import os; os.system('true')", 1),
    ("import subprocess; subprocess.run(['true'])", 1),
    ("import socket; socket.socket().connect_ex(('127.0.0.1', 9))", 1),
    ("import pickle; pickle.loads(pickle.dumps(print))", 1),
    ("import json; json.loads('1')", 0),
]


@pytest.fixture(scope="module")
def seen(tmp_path_factory: pytest.TempPathFactory) -> list[int]:
    """How many events the hook saw of each deed. It cannot be taken off again, so it is tried in a process of its
    own."""
    assert Watch
    paths = os.pathsep.join([str(ROOT / "src"), str(ROOT)])
    codes = json.dumps([code for code, _ in DEEDS])
    result = subprocess.run(
        [sys.executable, "-c", PROBE, str(tmp_path_factory.mktemp("probe")), codes],
        capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": paths}, timeout=300,
    )  # fmt: skip
    assert result.returncode == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.parametrize("number", range(len(DEEDS)), ids=[code for code, _ in DEEDS])
def test_the_hook_sees(number: int, seen: list[int]) -> None:
    events = DEEDS[number][1]
    assert seen[number] >= events if events else seen[number] == 0
