"""Runs many cases in a few processes; one that hangs or fills the memory is ended, and counts as that."""

from __future__ import annotations

import json
import os
import selectors
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from queue import Empty, Queue

from tests.hostile.judge import ROOT, Outcome

HANGS, MEMORY = 40.0, 3 << 30  # seconds and bytes after which a case is ended


class _Worker:
    def __init__(self, folder: Path) -> None:
        paths = os.pathsep.join([str(ROOT / "src"), str(ROOT), os.environ.get("PYTHONPATH", "")])
        self.process = subprocess.Popen(
            [sys.executable, "-m", "tests.hostile.worker", str(folder)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
            cwd=ROOT, env={**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"},
        )  # fmt: skip
        if self._line(120.0) != "ready":
            raise RuntimeError("a worker did not start")

    def ask(self, number: int) -> Outcome:
        assert self.process.stdin is not None
        self.process.stdin.write(f"{number}\n".encode())
        self.process.stdin.flush()
        begun = time.perf_counter()
        line = self._line(HANGS)
        if line:
            return Outcome(**json.loads(line))
        what = f"ended after {time.perf_counter() - begun:.1f} s, with exit code {self.process.poll()}"
        self.close()
        return Outcome(-9, time.perf_counter() - begun, time.perf_counter() - begun, 0, [], what)

    def _line(self, seconds: float) -> str:
        """The next line; empty if it does not come in time, or the process grows too large, or has ended."""
        assert self.process.stdout is not None
        data, until = b"", time.perf_counter() + seconds
        with selectors.DefaultSelector() as ready:
            ready.register(self.process.stdout, selectors.EVENT_READ)
            while time.perf_counter() < until and not data.endswith(b"\n"):
                if ready.select(0.1):
                    piece = os.read(self.process.stdout.fileno(), 1 << 16)
                    if not piece:
                        return ""
                    data += piece
                elif self._size() > MEMORY:
                    return ""
        return data.decode().strip() if data.endswith(b"\n") else ""

    def _size(self) -> int:
        try:
            return int(Path(f"/proc/{self.process.pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (OSError, IndexError):
            return 0

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def run_cases(numbers: Sequence[int], folder: Path, workers: int = 2) -> Iterator[tuple[int, Outcome]]:
    """Each case's outcome, as they come."""
    from tests.hostile.kit import make_good

    make_good(folder / "good")
    todo: Queue[int] = Queue()
    for number in numbers:
        todo.put(number)
    done: Queue[tuple[int, Outcome] | None] = Queue()

    def work() -> None:
        worker = None
        try:
            while True:
                number = todo.get_nowait()
                if worker is None or not worker.alive:
                    worker = _Worker(folder)
                done.put((number, worker.ask(number)))
        except Empty:
            pass
        finally:
            if worker is not None:
                worker.close()
            done.put(None)

    threads = [threading.Thread(target=work, daemon=True) for _ in range(min(workers, len(numbers)))]
    for thread in threads:
        thread.start()
    running = len(threads)
    while running:
        found = done.get()
        if found is None:
            running -= 1
        else:
            yield found
