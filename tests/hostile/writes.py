"""Every write of every command that writes, refused: what a person sees, and what is left.

python -m tests.hostile.writes [--output FILE]
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import io
import json
import os
import platform
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from unittest import mock

from tests.kit.disk import NUMBERS, Disk, refusing

TRAIN = ("steps=3", "save_steps=1", "logging_steps=1", "eval_size=2", "batch_size=2", "method=lora", "r=2",
         "on_bad_record=report", "threads=1", "--quiet")  # fmt: skip
# What a run may change: lines come to the metrics, old checkpoints go, its settings say that it was resumed, and the
# report of bad records then names the data from the root.
_MAY_CHANGE = ("metrics.jsonl", "checkpoints", "run.json", "bad_records.jsonl")
_TIMING = {"tokens_per_second", "eta_seconds", "memory_gb", "time", "timestamp"}
MODES = {"lasting": (True, False), "once": (False, False), "nothing can be removed": (True, True)}


@dataclass(frozen=True)
class Command:
    """A command that writes.

    Attributes:
        words: what is typed, in the folder of the state.
        needs: parts of the state that it begins with.
        train: whether it can go on.
    """

    words: tuple[str, ...]
    needs: tuple[str, ...] = ()
    train: bool = False


COMMANDS = {
    "train": Command(("train", "model=base", "data=data.jsonl", "output_dir=new", *TRAIN), train=True),
    "train, report elsewhere, samples in a file": Command(
        ("train", "model=base", "data=data.jsonl", "output_dir=new", "bad_records_file=far/bad.jsonl", *TRAIN),
        train=True,
    ),
    "train, two methods in one": Command(
        ("train", "model=base", "data=data.jsonl", "output_dir=new", *TRAIN[:-1], "method=lora+prefix_tuning",
         "num_virtual_tokens=2", "--quiet"), train=True,
    ),
    "train --resume": Command(("train", "half", "--resume", "--quiet"), ("half",), train=True),
    "train --resume of a finished run": Command(("train", "run", "--resume", "--quiet"), ("run",), train=True),
    "train shape=tiny": Command(
        ("train", "model=base", "shape=tiny", "data=data.jsonl", "output_dir=new", *TRAIN), train=True
    ),
    "merge": Command(("merge", "--adapter", "run", "--output", "far/merged"), ("run",)),
    "combine": Command(("combine", "run", "other", "--output", "far/both"), ("run", "other")),
    "generate --output": Command(
        ("generate", "run", "--prompt", "What?", "--max-new-tokens", "2", "--output", "answers.jsonl", "--overwrite"),
        ("run", "answers.jsonl"),
    ),
    "preview --html": Command(
        ("preview", "model=base", "data=data.jsonl", "on_bad_record=skip", "--html", "page.html"), ("page.html",)
    ),
    "convert": Command(("convert", "pickled", "far/converted"), ("pickled",)),
}  # fmt: skip


@dataclass
class Run:
    """What a command has left behind."""

    code: int
    out: str
    err: str


def weft(words: tuple[str, ...], disk: Disk) -> Run:
    """Run a command in this process, over a disk."""
    from weft.cli.main import main

    out, err, before = io.StringIO(), io.StringIO(), dict(os.environ)
    with refusing(disk), contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        code = main(words)
    os.environ.clear()
    os.environ.update(before)
    return Run(code, out.getvalue(), err.getvalue())


class Bench:
    """A folder with a state to begin with, and commands that are refused their n-th write in copies of it."""

    def __init__(self, folder: Path, base: Path) -> None:
        self.kept, self.work, self.temporary = folder / "kept", folder / "work", folder / "temporary"
        self.temporary.mkdir(parents=True)
        self.kept.mkdir()
        self.cache = folder / "cache"
        self._make(base)

    def _make(self, base: Path) -> None:
        import torch
        from safetensors.torch import load_file

        shutil.copytree(base, self.kept / "base")
        rows = [{"instruction": f"What comes after {i}?", "output": str(i + 1)} for i in range(8)]
        lines = [json.dumps(row) for row in (*rows, {"instruction": 3})]
        (self.kept / "data.jsonl").write_text("\n".join(lines) + "\n")
        (self.kept / "answers.jsonl").write_text("earlier answers\n")
        (self.kept / "page.html").write_text("an earlier page\n")
        with self._inside(self.kept):
            for name in ("run", "other"):
                words = ("train", "model=base", "data=data.jsonl", f"output_dir={name}", *TRAIN)
                done = weft(words, Disk())
                assert done.code == 0, done.err
        shutil.copytree(self.kept / "run", self.kept / "half")
        shutil.rmtree(self.kept / "half" / "adapters" / "lora")
        for folder in (self.kept / "half" / "checkpoints").glob("step-00000003"):
            shutil.rmtree(folder)
        shutil.copytree(self.kept / "base", self.kept / "pickled")
        weights = self.kept / "pickled" / "model.safetensors"
        torch.save(load_file(weights), self.kept / "pickled" / "pytorch_model.bin")
        weights.unlink()

    @contextlib.contextmanager
    def _inside(self, folder: Path) -> Iterator[None]:
        before = Path.cwd()
        environment = {"WEFT_CACHE_DIR": str(self.cache), "TMPDIR": str(self.temporary)}
        store = mock.patch("weft.data.store.SampleStore.__init__.__defaults__", (0,))
        os.chdir(folder)
        try:
            with mock.patch.dict(os.environ, environment), mock.patch.object(tempfile, "tempdir", None), store:
                tempfile.gettempdir()  # it tries the folder, which is no write of the command
                yield
        finally:
            os.chdir(before)

    def run(self, command: Command, disk: Disk) -> Run:
        """Run the command in a fresh copy of the state."""
        for folder in (self.work, self.temporary):  # what an earlier command could not remove is not this one's
            shutil.rmtree(folder, ignore_errors=True)
            folder.mkdir()
        for name in ("base", "data.jsonl", *command.needs):
            (shutil.copytree if (self.kept / name).is_dir() else shutil.copyfile)(self.kept / name, self.work / name)
        with self._inside(self.work):
            return weft(command.words, disk)

    def count(self, command: Command) -> list[str]:
        """All writes of the command, which is not refused any."""
        self.run(command, Disk())  # the proof of the base is kept from here on
        disk = Disk()
        done = self.run(command, disk)
        assert done.code == 0, done.err
        return disk.calls

    def whole(self, command: Command) -> dict[str, object]:
        """What the command leaves when nothing is refused."""
        assert self.run(command, Disk()).code == 0
        return result(self.work)

    def faults(self, command: Command, disk: Disk, whole: dict[str, object], *, again: bool = True) -> list[str]:
        """What is not as promised when the disk refuses; empty if all is. ``again``: go on, on a mended disk."""
        before = {name: data for name, data in content(self.kept).items() if name.split("/")[0] in command.needs}
        done = self.run(command, disk)
        wrong = list(self._seen(done, disk))
        now = content(self.work)
        for name, data in before.items():
            if now.get(name) != data and not (command.train and any(part in name for part in _MAY_CHANGE)):
                same_as_whole = now.get(name) == whole.get(name)
                if done.code != 0 and not (same_as_whole and disk.refused[0] == "fsync"):
                    wrong.append(f"{name} is no longer what it was")
        remains = [name for name in (*now, *content(self.temporary)) if is_remain(name)]
        if any(call.startswith("replace") for call in disk.refused[1:]):
            # No name could be given back. The run goes on from the checkpoint under its second name (``_resumed``).
            remains = [name for name in remains if not ("checkpoints/step-" in name and ".replaced" in name)]
        if remains and not disk.removals:
            wrong.append(f"there remains {remains}")
        if done.code == 0:
            if result(self.work) != whole:
                wrong.append("it ended well, with another result")
        elif command.train:
            wrong += self._resumed(command, done, whole, again)
        elif again and disk.removals:
            with self._inside(self.work):
                code = weft(command.words, Disk()).code
            # Refused at the very end, the whole result may be there, and then it is left alone.
            if result(self.work) != whole:
                wrong.append(f"once more, on a mended disk: exit code {code}, or another result")
        return wrong

    def _seen(self, done: Run, disk: Disk) -> Iterator[str]:
        if not disk.refused:
            yield "nothing was refused"
        if done.code not in ((2,) if disk.lasting else (0, 2)):
            yield f"exit code {done.code}"
        told = done.err.partition("error: ")[2]
        if done.code != 0:
            if not told or "Traceback" in done.err or "defect" in told:
                yield f"the message is {done.err[-300:]!r}"
            names = {"new", "run", "half", "far", "answers.jsonl", "page.html", str(self.temporary)}
            if not any(name in told for name in names) or ".unfinished" in told or ".replaced" in told:
                yield f"the message names no file of the user's: {told[:300]!r}"

    def _resumed(self, command: Command, done: Run, whole: dict[str, object], again: bool) -> Iterator[str]:
        """Whether the run goes on from where the message says, to the same end."""
        from weft.files.run_folder import RunStore

        folder = next(self.work / word for word in command.words if word in ("half", "run")) if command.needs else (
            self.work / "new")  # fmt: skip
        step = RunStore(folder).last_step()
        began = (folder / "run.json").is_file()
        told = (f"up to step {step} is saved" if step is not None else "at step 0") if began else ""
        if told not in done.err and str(self.temporary) not in done.err:
            yield f"the message does not say {told!r}: {done.err[-300:]!r}"
        if again:
            words = (*command.words, *(() if command.needs else ("--resume",)))
            with self._inside(self.work):
                after = weft(words, Disk())
            if after.code != 0:
                yield f"--resume ends with exit code {after.code}: {after.err[-300:]}"
            elif result(self.work) != whole:
                yield "--resume does not end as the unbroken run"


def content(folder: Path) -> dict[str, bytes]:
    """The bytes of every file below a folder; a folder without files counts as a file."""
    found = {}
    for path in sorted(folder.rglob("*")):
        if path.is_file():
            found[str(path.relative_to(folder))] = path.read_bytes()
        elif is_remain(path.name):
            found[str(path.relative_to(folder))] = b""
    return found


def is_remain(name: str) -> bool:
    """Whether a name is one of those that nobody is to see."""
    return any(mark in name for mark in (".unfinished", ".replaced", ".partial", "tmp"))


def result(folder: Path) -> dict[str, object]:
    """All that a command leaves, but for times and for what was there before."""
    found: dict[str, object] = {}
    for name, data in content(folder).items():
        if name.endswith("metrics.jsonl"):
            rows = [json.loads(line) for line in data.decode().splitlines()]
            found[name] = [{k: v for k, v in row.items() if k not in _TIMING} for row in rows]
        elif name.endswith(".answers.jsonl.run"):
            found[name] = {**json.loads(data), "replaces": None}  # what was there before
        elif "/checkpoints/" not in name or name.endswith(".safetensors"):
            found[name] = data if not name.endswith("run.json") else b""
    return found


def points(count: int, share: int) -> list[int]:
    """Every ``share``-th of ``count`` writes, the first and the last."""
    return sorted({*range(1, count + 1, share), count})


def make_base(folder: Path) -> Path:
    """A Llama of two layers, in a folder."""
    import torch
    from tests.conftest import make_tokenizer
    from transformers import LlamaConfig, LlamaForCausalLM

    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4,
        max_position_embeddings=256, initializer_range=0.1, eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id, dtype="float32",
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", default="")
    parser.add_argument("--share", type=int, default=1, help="every so many writes only")
    parser.add_argument("--output", type=Path)
    given = parser.parse_args()
    os.environ.update(HF_HUB_OFFLINE="1", TOKENIZERS_PARALLELISM="false")
    import torch
    import transformers

    begun, lines, total, bad = time.monotonic(), [], 0, 0
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(Path(folder), make_base(Path(folder) / "base"))
        for name, command in COMMANDS.items():
            if given.only and given.only not in name:
                continue
            calls, whole = bench.count(command), bench.whole(command)
            cells = []
            for mode, (lasting, removals) in MODES.items():
                wrong, tried = 0, points(len(calls), given.share * (1 if mode == "lasting" else 3))
                for turn, at in enumerate(tried):
                    number = NUMBERS[(turn + list(MODES).index(mode)) % len(NUMBERS)]
                    number = errno.ENOSPC if mode == "lasting" else number
                    faults = bench.faults(command, Disk(at, number, lasting, removals), whole, again=turn % 3 == 0)
                    wrong += bool(faults)
                    for fault in faults:
                        print(
                            f"{name}, {mode}, {errno.errorcode[number]} at {at} ({calls[at - 1]}): {fault}", flush=True
                        )
                total, bad = total + len(tried), bad + wrong
                cells.append(f"{len(tried) - wrong} of {len(tried)}")
            lines.append(f"| {name} | {len(calls)} | {' | '.join(cells)} |")
            print(lines[-1], flush=True)
    versions = f"Python {platform.python_version()}, torch {torch.__version__}, transformers {transformers.__version__}"
    summary = f"{total} refusals, {total - bad} as promised, {bad} not; {time.monotonic() - begun:.0f} s"
    print(summary)
    if given.output:
        given.output.write_text(HEAD.format(versions=versions, summary=summary) + "\n".join(lines) + "\n")
    sys.exit(bool(bad))


HEAD = """# Refused writes

`python -m tests.hostile.writes --output benchmarks/results/write_failures_2-core_2026-11-29.md`: every command that
writes, with its n-th write refused (`tests/kit/disk.py`). *Lasting*, for every n: from then on all writes fail with
ENOSPC. *Once*, for every third n: this one alone, with ENOSPC, EIO, EDQUOT, EROFS, EACCES in turn. *Nothing can be
removed*, for every third n: all writes fail from then on, and so do removals. Every n with every error in every way is
`pytest -m slow tests/hostile/test_writes.py`.

Promised are exit code 2 (or 0 and the whole result, where a library finds another way after a single refusal), one
sentence that names the file, no traceback, no temporary name that remains (unless removals are refused), and what was
there before to the bit; of a run also that the message names the step of its newest intact checkpoint. Every third run
goes on (`--resume`) and must end as the unbroken one.

{versions}, two shared cores. {summary}.

| command | writes | lasting | once | nothing can be removed |
|---|---|---|---|---|
"""

if __name__ == "__main__":
    main()
