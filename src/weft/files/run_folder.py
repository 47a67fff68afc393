"""The folder of a run. A checkpoint appears whole or not at all, and says of itself what it holds.

run.json                     the configuration, and fingerprints of base and data
metrics.jsonl                one line per logged event, with its time
tokenizer/                   so that the folder answers by itself
checkpoints/step-00000100/   state.json, <job>.safetensors, manifest.json (SHA-256 of each file)
adapters/<job>/              the finished adapters, in PEFT's layout
"""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import IO, Any

from torch import Tensor

from weft.errors import UserError
from weft.files.adapter_folder import read_tensors
from weft.files.metrics import Metrics
from weft.files.whole import append_line, make_folder, remove, sha256_of, sync, write_tensors, write_text, write_whole
from weft.files.writing import WriteError, writing
from weft.foreign import check_regular, expect, json_lines, read_json
from weft.paths import local_path

RUN_FILE = "run.json"
METRICS_FILE = "metrics.jsonl"
LOCK_FILE = ".lock"
# How often, and after how many seconds, a lock is asked for again.
_LOOKS, _LOOK = 3, 0.05
# A checkpoint's name ends so while another of the same step takes its place.
_REPLACED = ".replaced"


def run_of(folder: Path) -> Path | None:
    """The folder of the run that an adapter's folder belongs to; None if it lies elsewhere."""
    parent = folder.absolute().parent
    return parent.parent if parent.name == "adapters" and (parent.parent / RUN_FILE).is_file() else None


def read_metrics(run: str | Path, *, event: str | None = None, job: str | None = None) -> Metrics:
    """What the run in a folder has logged, a row per event; ``pandas.DataFrame`` makes a table of it as it is.

    Args:
        run: The folder, or its ``metrics.jsonl``.
        event: Only rows of this kind.
        job: Only rows of this job.

    Returns:
        Rows with ``time`` (in UTC; None where a run is from before there were times), ``event`` (``step``, ``eval``,
        ``forgetting``, ``left`` or ``warning``), ``job``, and what the event tells: ``step``, ``loss``, ``eval_loss``
        and so on.

    Raises:
        UserError: This is no run's folder, or a line is damaged.
    """
    path = local_path(run)
    path = path if path.name == METRICS_FILE and path.is_file() else path / METRICS_FILE
    if not path.is_file():
        if (path.parent / RUN_FILE).is_file():
            return Metrics()  # it has not logged anything yet
        raise UserError(f"{path.parent} holds no {METRICS_FILE}; give the folder of a run (its output_dir).")
    rows = ({"time": None, **row} | _time_of(row, f"{path}:{n}") for n, row in enumerate(json_lines(path), 1))
    wanted = {key: value for key, value in {"event": event, "job": job}.items() if value is not None}
    return Metrics(rows).where(**wanted)


def _time_of(row: Mapping[str, object], where: str) -> dict[str, datetime]:
    if "time" not in row:
        return {}
    text = expect(row["time"], str, f"{where}: time")
    try:
        return {"time": datetime.fromisoformat(text)}
    except ValueError as error:
        raise UserError(f"{where}: time: {error}.") from None


class RunStore:
    """Reads and writes one run's folder."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        self.checkpoints = self.folder / "checkpoints"
        self.adapters = self.folder / "adapters"
        self.tokenizer = self.folder / "tokenizer"
        self._locked: IO[str] | None = None

    def prepare(self, *, overwrite: bool, resume: bool) -> None:
        """Make the folder ready: new, emptied, or kept for going on.

        Raises:
            UserError: it holds a run (or anything else) and neither was asked for.
            WriteError: The machine refuses to write there.
        """
        occupied = self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir()))
        is_run = (self.folder / RUN_FILE).is_file()
        if occupied and not resume:
            if not overwrite:
                what = "a run" if is_run else "something"
                raise UserError(
                    f"{self.folder} already holds {what}. Take resume=true to go on with it, another output_dir, or "
                    "overwrite_output_dir=true to delete it."
                )
            if not is_run:
                raise UserError(f"{self.folder} is no run's folder, so it is not overwritten; take another output_dir.")
            self._lock()
            self.release()
            with writing(self.folder, name="output_dir "):
                shutil.rmtree(self.folder)
        for folder in (self.folder, self.checkpoints, self.adapters):
            make_folder(folder, "output_dir ")
        self._lock()

    def _lock(self) -> None:
        """Keep other processes from training here; the kernel lets go of it however this process ends.

        Raises:
            UserError: another process trains in this folder.
        """
        with writing(self.folder / LOCK_FILE):
            self._locked = open(self.folder / LOCK_FILE, "a")  # noqa: SIM115 - held until release
        for left in range(_LOOKS, -1, -1):
            try:
                fcntl.flock(self._locked, fcntl.LOCK_EX | fcntl.LOCK_NB)
                return
            except OSError:
                if left:  # it may be one who only looks (``in_use``)
                    time.sleep(_LOOK)
        self.release()
        raise UserError(
            f"another process is training in {self.folder}. Wait for it, stop it, or take another output_dir."
        )

    def in_use(self) -> bool:
        """Whether a process trains in this folder now."""
        try:
            with open(self.folder / LOCK_FILE) as file:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
        except FileNotFoundError:
            return False
        except OSError:
            return True
        return False

    def release(self) -> None:
        """Let others train in this folder again."""
        if self._locked is not None:
            self._locked.close()
            self._locked = None

    def write_run(self, run: Mapping[str, object]) -> None:
        """Write ``run.json``.

        Raises:
            WriteError: The machine refuses to write it.
        """
        write_whole(self.folder / RUN_FILE, _json(run))

    def read_run(self) -> dict[str, Any]:
        """Read ``run.json``.

        Raises:
            UserError: This is no run's folder.
        """
        return read_json(self.folder / RUN_FILE)

    def log(self, event: Mapping[str, object]) -> None:
        """Append one line to ``metrics.jsonl`` with its time, ISO 8601 in UTC.

        JSON has no word for what is not finite, so that becomes null.
        """
        event = {k: None if isinstance(v, float) and not math.isfinite(v) else v for k, v in event.items()}
        now = datetime.now(UTC).isoformat(timespec="milliseconds")
        append_line(self.folder / METRICS_FILE, json.dumps({"time": now, **event}, ensure_ascii=False))

    def save(
        self, step: int, state: Mapping[str, object], tensors: Mapping[str, Mapping[str, Tensor]], keep: int
    ) -> Path:
        """Commit a checkpoint with tensors of any shape, then drop the oldest beyond ``keep``.

        All files are on disk before the folder gets its name by one rename. So a crash at any moment leaves the earlier
        checkpoints, and perhaps a nameless folder that the next save removes.

        Raises:
            WriteError: The machine refuses to write it. The earlier checkpoints are as they were.
        """
        metrics = self.folder / METRICS_FILE
        size = 0
        if metrics.exists():
            sync(metrics)
            size = metrics.stat().st_size
        work = self.checkpoints / ".unfinished"
        final = self.checkpoints / f"step-{step:08d}"
        aside = final.with_name(final.name + _REPLACED)
        remove(work)
        try:
            _write(work, {**state, "metrics_bytes": size}, tensors)
            with writing(final):
                if final.exists():
                    # It stays a checkpoint under another name, because there may be no other.
                    if aside.exists():
                        shutil.rmtree(aside)
                    os.replace(final, aside)
                os.replace(work, final)
            sync(self.checkpoints)
        except Exception as error:
            with suppress(OSError):
                if aside.exists():
                    if final.exists():
                        os.replace(final, work)
                    os.replace(aside, final)
            remove(work)
            if isinstance(error, WriteError) and error.path.is_relative_to(work):
                raise error.at(final / error.path.relative_to(work)) from error.__cause__
            raise
        # What is newer was passed over as damaged when the run went back; it must not count among those that are kept.
        committed = [path for path in self._committed() if not path.name.endswith(_REPLACED)]
        upto = committed.index(final) + 1
        replaced = self.checkpoints.glob(f"step-*{_REPLACED}")
        for old in (*committed[: max(0, upto - keep)], *committed[upto:], *replaced):
            remove(old)
        return final

    def last_step(self) -> int | None:
        """The step of the newest intact checkpoint; None if there is none."""
        intact = next((path for path in reversed(self._committed()) if not _broken(path)), None)
        return None if intact is None else int(intact.name.removeprefix("step-").removesuffix(_REPLACED))

    def newest_state(self) -> dict[str, Any] | None:
        """What the newest checkpoint says of itself, without a look at its tensors; None if there is none.

        Raises:
            UserError: It cannot be read.
        """
        newest = next(reversed(self._committed()), None)
        return None if newest is None else read_json(newest / "state.json", infinities=True)

    def checkpoint_bytes(self) -> list[int]:
        """The bytes of each checkpoint, the oldest first."""
        return [sum(file.stat().st_size for file in path.iterdir()) for path in self._committed()]

    def latest(self) -> tuple[dict[str, Any], dict[str, dict[str, Tensor]], list[str]] | None:
        """The newest intact checkpoint: state, tensors by name in their shapes, and a warning for each broken one.

        Raises:
            UserError: There are checkpoints, and none is intact.
        """
        warnings: list[str] = []
        for folder in reversed(self._committed()):
            problem = _broken(folder)
            if problem:
                warnings.append(f"checkpoint {folder.name} is damaged ({problem}); going back to the one before")
                continue
            tensors = {path.stem: read_tensors(path) for path in folder.glob("*.safetensors")}
            return read_json(folder / "state.json", infinities=True), tensors, warnings
        if warnings:
            raise UserError("no intact checkpoint: " + "; ".join(warnings))
        return None

    def failed(self, names: Sequence[str]) -> dict[str, str]:
        """Those of these jobs that have no adapter because they failed, and the reason of each."""
        missing = [name for name in names if not (self.adapters / name).is_dir()]
        found = self.latest() if missing else None
        ends = {} if found is None else {name: found[0]["jobs"].get(name, {}).get("progress", {}) for name in missing}
        return {
            name: end.get("reason") or "loss or gradient was not finite"
            for name, end in ends.items()
            if end.get("ended") == "failed"
        }

    def finished(self, names: Sequence[str]) -> list[Path]:
        """The folders of these jobs' adapters.

        Raises:
            UserError: A job has no adapter, because it failed or the run is not finished.
        """
        for name, reason in self.failed(names).items():
            hint = " Name the others with --adapter." * (len(names) > 1)
            raise UserError(f"{self.folder} has no adapter '{name}', for its job failed: {reason}.{hint}")
        folders = [self.adapters / name for name in names]
        for folder in folders:
            if not folder.is_dir():
                raise UserError(f"{self.folder} is not finished: there is no {folder} yet. Go on with it (--resume).")
        return folders

    def rewind_metrics(self, size: int) -> None:
        """Cut ``metrics.jsonl`` back to what it held at a checkpoint; what came after will be written again."""
        path = self.folder / METRICS_FILE
        if os.path.lexists(path):
            check_regular(path)
            with writing(path):
                # It must not become longer: truncate would fill the gap with zero bytes.
                os.truncate(path, min(size, path.stat().st_size))

    def _committed(self) -> list[Path]:
        """The checkpoints, oldest first. One that was set aside comes before the one that takes its place."""
        found = (path for path in self.checkpoints.glob("step-*") if path.is_dir())
        return sorted(found, key=lambda path: (path.name.removesuffix(_REPLACED), not path.name.endswith(_REPLACED)))


def _write(work: Path, state: Mapping[str, object], tensors: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Write a checkpoint's files, with tensors of any shape, and wait until they are on the disk."""
    make_folder(work)
    for name, group in tensors.items():
        write_tensors(group, work / f"{name}.safetensors")
    write_text(work / "state.json", _json(state))
    manifest = {path.name: sha256_of(path) for path in sorted(work.iterdir())}
    write_text(work / "manifest.json", _json(manifest))
    for path in work.iterdir():
        sync(path)
    sync(work)


def _broken(folder: Path) -> str | None:
    """Why a checkpoint cannot be used, or None if every byte is what was written."""
    try:
        manifest = read_json(folder / "manifest.json")
    except UserError as error:
        return str(error)
    for name, digest in manifest.items():
        if Path(name).name != name:
            return f"manifest.json names {name!r}, which is no file of the checkpoint"
        path = folder / name
        if not path.is_file():
            return f"{name} is missing"
        if sha256_of(path) != digest:
            return f"{name} has changed"
    return None


def _json(value: Mapping[str, object]) -> str:
    return json.dumps(value, indent=2, ensure_ascii=False) + "\n"
