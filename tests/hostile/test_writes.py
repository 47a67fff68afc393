"""A disk that refuses a write: exit code 2, one sentence, and nothing that was good before is lost. A part of the
writes in every run of the tests, every one with each error in the slow ones (``python -m tests.hostile.writes`` prints
a table)."""

from __future__ import annotations

import ast
import errno
import os
import subprocess
import sys
from pathlib import Path

import pytest
from tests.hostile.writes import COMMANDS, MODES, Bench, points
from tests.kit.disk import NUMBERS, Disk, refusing
from tests.kit.elsewhere import rendered_here

import weft
from weft.cli.main import main
from weft.errors import UserError
from weft.export import rendering
from weft.files.run_folder import RunStore

SOURCE = Path(weft.__file__).parent
# Files that may write by themselves: the one place, a cache without which all goes on, appended bytes with a message of
# their own; the last three draw or render into memory.
WRITERS = {"files/whole.py", "measured.py", "data/spill.py", "base/pages.py", "evaluate/demo.py",
           "evaluate/report/pictures.py", "export/rendering.py"}  # fmt: skip
CALLS = {"save_file", "mkdir", "makedirs", "copyfile", "copytree", "savefig",
         "TemporaryFile", "NamedTemporaryFile", "TemporaryDirectory", "mkdtemp", "mkstemp", "symlink"}  # fmt: skip
# These stand in ``with writing(…)``.
GUARDED = {"save_pretrained", "os.truncate", "rmtree"}


@pytest.fixture(scope="module")
def bench(tiny_llama_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    return Bench(tmp_path_factory.mktemp("bench"), tiny_llama_dir)


# They write as "train" does, and a little more.
LIKE_TRAIN = ("train, report elsewhere, samples in a file", "train, two methods in one", "train shape=tiny")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in LIKE_TRAIN)) for name in COMMANDS]
)
def test_some_writes_refused(bench: Bench, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A write of each kind, the errors in turn."""
    # The process without Weft reads only, and costs seconds for each merge; test_every_write_refused starts it.
    monkeypatch.setattr("weft.export.folder.fresh_ids", rendered_here)
    command = COMMANDS[name]
    calls = bench.count(command)
    whole = bench.whole(command)
    kinds = {call.split()[0]: at for at, call in enumerate(calls, 1)}
    some = sorted({*kinds.values(), *points(len(calls), max(1, len(calls) // 4))})
    found = []
    for turn, at in enumerate(some):
        disk = Disk(at, NUMBERS[turn % len(NUMBERS)], lasting=turn % 2 == 0, removals=turn % 4 == 2)
        found += [f"{calls[at - 1]}: {fault}" for fault in bench.faults(command, disk, whole, again=turn % 3 == 0)]
    assert found == []


@pytest.mark.slow
@pytest.mark.parametrize("number", NUMBERS, ids=errno.errorcode.get)
@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("name", COMMANDS)
def test_every_write_refused(bench: Bench, name: str, mode: str, number: int) -> None:
    command, (lasting, removals) = COMMANDS[name], MODES[mode]
    calls, whole = bench.count(command), bench.whole(command)
    found = []
    for at in range(1, len(calls) + 1):
        faults = bench.faults(command, Disk(at, number, lasting=lasting, removals=removals), whole)
        found += [f"{calls[at - 1]}: {fault}" for fault in faults]
    assert found == []


def writers(tree: ast.AST) -> list[int]:
    """The lines that write by themselves."""
    guarded = {
        id(inner)
        for node in ast.walk(tree)
        if isinstance(node, ast.With)
        and any(ast.unparse(item.context_expr).startswith("writing") for item in node.items)
        for inner in ast.walk(node)
    }
    found = []
    for node in ast.walk(tree):
        if not isinstance(node, ast.Call):
            continue
        name = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
        method = isinstance(node.func, ast.Attribute) and name in ("write_text", "write_bytes")
        modes = [set(str(arg.value)) for arg in node.args[:2] if isinstance(arg, ast.Constant)]
        opens = name == "open" and any(mode & set("wax+") and mode <= set("rwaxbt+") for mode in modes)
        ignored = any(word.arg == "ignore_errors" for word in node.keywords)
        guards = bool({name, ast.unparse(node.func)} & GUARDED)
        if name in CALLS or method or ((guards or opens) and id(node) not in guarded and not ignored):
            found.append(node.lineno)
    return found


def test_writing_has_one_place() -> None:
    found = {str(path.relative_to(SOURCE)): writers(ast.parse(path.read_text())) for path in SOURCE.rglob("*.py")}
    assert {path: lines for path, lines in found.items() if lines and path not in WRITERS} == {}


@pytest.mark.parametrize(
    "line", ["path.write_text('')", "open(p, 'w')", "p.open('ab')", "save_file({}, p)", "model.save_pretrained(p)"]
)
def test_the_check_sees(line: str) -> None:
    assert writers(ast.parse(line))


def train(base: Path, data: Path, run: Path, *more: str) -> list[str]:
    return ["train", f"model={base}", f"data={data}", f"output_dir={run}", "method=lora", "r=2", "steps=4",
            "batch_size=2", "save_steps=1", "threads=1", "--quiet", *more]  # fmt: skip


def test_a_limit_of_the_system(tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    """No library is touched: the kernel itself refuses what goes beyond ``ulimit -f`` (Python ignores SIGXFSZ)."""
    run = tmp_path / "run"
    words = train(tiny_llama_dir, tiny_data, run, "steps=2")
    assert main(words) == 0
    adapter = next((run / "adapters" / "lora").glob("*.safetensors")).stat().st_size
    before = {path: path.read_bytes() for path in (run / "adapters").rglob("*") if path.is_file()}
    merged = tmp_path / "merged"
    code = (
        "import resource, sys, weft.cli.main as main\n"
        f"resource.setrlimit(resource.RLIMIT_FSIZE, ({adapter // 2}, {adapter // 2}))\n"
        f"print(main.main({['merge', '--adapter', str(run), '--output', str(merged)]!r}))\n"
        f"print(main.main(['train', {str(run)!r}, '--resume', '--quiet']))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert [line for line in done.stdout.splitlines() if line.isdigit()] == ["2", "2"], done.stderr
    first, second = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert f"{merged}" in first
    assert "a file may not become so large" in first
    assert f"{run}" in second
    assert "All up to step 2 is saved" in second
    assert "Traceback" not in done.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]
    assert {path: path.read_bytes() for path in (run / "adapters").rglob("*") if path.is_file()} == before
    assert main(["train", str(run), "--resume", "--quiet"]) == 0


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
@pytest.mark.parametrize("at", [1, 2, 3])
def test_no_room_for_the_question_to_another_process(at: int, tmp_path: Path) -> None:
    """The proof of a merge asks a fresh process by files without a name; what is full is the folder they lie in."""
    asked = rendering.fresh_ids(tmp_path, [[weft.Message("user", "x")]])
    with refusing(disk := Disk(at)), pytest.raises(UserError, match="another folder for temporary files"), asked:
        pass
    assert disk.refused


def test_a_device_that_is_full(tiny_llama_dir: Path, tiny_data: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["preview", f"model={tiny_llama_dir}", f"data={tiny_data}"]
    assert main([*words, "--html", "/dev/full"]) == 2
    assert capsys.readouterr().err.startswith("error: --html /dev/full cannot be written, because the disk is full")
    with open("/dev/full", "w") as full:
        told = subprocess.run([sys.executable, "-m", "weft.cli.main", *words], stdout=full, stderr=subprocess.PIPE,
                              text=True, timeout=300)  # fmt: skip
    assert told.returncode == 2
    assert told.stderr == "error: the output: No space left on device.\n"
    assert os.stat("/dev/full").st_rdev


@pytest.mark.parametrize("room", ["none", "two", "all"])
def test_room_is_looked_for_before_the_first_step(
    room: str,
    tiny_llama_dir: Path,
    tiny_data: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    import shutil
    from types import SimpleNamespace

    run = tmp_path / "run"
    assert main(train(tiny_llama_dir, tiny_data, tmp_path / "first")) == 0
    checkpoint = RunStore(tmp_path / "first").checkpoint_bytes()[-1]
    free = {"none": checkpoint, "two": 2 * checkpoint + 300_000, "all": 100 * checkpoint}[room]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=free))
    capsys.readouterr()
    code = main(train(tiny_llama_dir, tiny_data, run, "save_total_limit=20"))
    told = capsys.readouterr().err
    assert code == (2 if room == "none" else 0), told
    assert run.exists() == (room != "none")
    assert ("two checkpoints of" in told) == (room == "none")
    assert ("the run may end when the disk is full" in told) == (room == "two")
    if room == "none":
        assert main(train(tiny_llama_dir, tiny_data, run, "check_disk_space=false")) == 0


def test_the_size_of_a_checkpoint_is_foreseen(tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Within the room that is held for its JSON."""
    from weft.training.config import make_config
    from weft.training.room import TEXTS
    from weft.training.run import Setup
    from weft.training.run import train as run_training

    foreseen: list[int] = []

    def ready(setup: Setup) -> None:
        foreseen.append(sum(job.checkpoint_bytes() for job in setup.jobs))

    settings = {"model": str(tiny_llama_dir), "data": str(tiny_data), "output_dir": str(tmp_path / "run"), "steps": 2,
                "eval_steps": 1,
                "eval_size": 4, "jobs": [{"method": "lora", "early_stopping_patience": 2, "name": "a"},
                                         {"method": "lora", "optimizer": "sgd", "name": "b"},
                                         {"method": "bottleneck", "name": "c"}]}  # fmt: skip
    run_training(make_config(settings, source="test"), on_ready=ready)
    (written,) = RunStore(tmp_path / "run").checkpoint_bytes()
    assert foreseen[0] <= written <= foreseen[0] + 3 * TEXTS
