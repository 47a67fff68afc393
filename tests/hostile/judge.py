"""Runs the command line in this process under an audit hook, and says what a case did that it must not do."""

from __future__ import annotations

import contextlib
import io
import os
import sys
import sysconfig
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.hostile.memory import Memory

ROOT = Path(__file__).resolve().parents[2]
# What a program's libraries may read.
_LIBRARIES = tuple(
    str(Path(path).resolve())
    for path in {sys.prefix, sys.base_prefix, *sysconfig.get_paths().values(), str(ROOT / "src"), str(ROOT / "tests")}
    if path
)
_SYSTEM = ("/proc/", "/sys/", "/dev/null", "/dev/urandom", "/etc/ssl/", "/etc/localtime", "/usr/share/zoneinfo")
_FORBIDDEN = (
    "subprocess.Popen", "os.system", "os.exec", "os.spawn", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn",
    "os.startfile", "socket.connect", "socket.getaddrinfo", "socket.gethostbyname", "socket.bind", "socket.sendto",
    "pickle.find_class", "marshal.loads", "code.__new__", "ctypes.dlopen", "builtins.input", "urllib.Request",
    "ftplib.connect", "http.client.connect", "webbrowser.open",
)  # fmt: skip
_CHANGES = (
    "os.remove", "os.rename", "os.rmdir", "os.mkdir", "os.link", "os.symlink", "os.truncate", "os.chmod", "os.chown",
    "shutil.rmtree", "shutil.copyfile", "shutil.move", "os.utime",
)  # fmt: skip


@dataclass
class Outcome:
    """What a case did: exit code, seconds of this process and of the clock, bytes of memory above those before,
    forbidden events, and what it said."""

    code: int
    seconds: float
    clock: float
    memory: int
    events: list[str] = field(default_factory=list)
    said: str = ""


class Watch:
    """The audit hook; it cannot be taken off again, so it is switched."""

    def __init__(self) -> None:
        self.on = False
        self.events: list[str] = []
        self.readable: tuple[str, ...] = ()
        self.writable: tuple[str, ...] = ()
        self.foreign = ""
        sys.addaudithook(self._hook)

    @contextlib.contextmanager
    def over(self, folder: Path, more: Sequence[Path] = ()) -> Iterator[None]:
        """Watch what happens inside the block. Read may be the libraries, ``folder`` and ``more``; written its part
        ``out`` and the temporary folder of the block."""
        before, tempfile.tempdir = tempfile.tempdir, str(folder / "out" / "tmp")
        Path(tempfile.tempdir).mkdir(parents=True, exist_ok=True)
        self.events = []
        self.foreign = str(folder)
        self.writable = (str(folder / "out"), str(folder / "run"))  # a run that goes on is written to
        self.readable = (*_LIBRARIES, str(folder), *(str(path.resolve()) for path in more))
        self.on = True
        try:
            yield
        finally:
            self.on = False
            tempfile.tempdir = before

    def _hook(self, event: str, args: tuple[Any, ...]) -> None:
        if not self.on:
            return
        self.on = False  # what is done here is not the case's
        try:
            found = self._judge(event, args)
            if found:
                self.events.append(f"{event}: {found}"[:300])
        finally:
            self.on = True

    def _judge(self, event: str, args: tuple[Any, ...]) -> str:
        if event == "open":
            return self._open(*args[:3])
        if event in ("exec", "compile"):
            name = str(getattr(args[0], "co_filename", "") if event == "exec" else args[1] or "")
            inside = name.startswith(self.foreign) or "transformers_modules" in name
            return name if inside and not name.startswith(str(ROOT / "src")) else ""
        if event == "import":
            name = str(args[0])
            return name if name.startswith(("transformers_modules", "weft_canary")) else ""
        if event.startswith(_FORBIDDEN):
            if event == "ctypes.dlopen" and self._within(args[0], _LIBRARIES):
                return ""
            if event == "marshal.loads" or event == "code.__new__":
                return ""  # importing a library from its cache
            return repr(args)[:200]
        if event in _CHANGES:
            paths = [path for path in args[:2] if isinstance(path, (str, bytes, os.PathLike))]
            target = paths[-1:] if event == "shutil.copyfile" else paths
            outside = [path for path in target if not self._within(path, self.writable)]
            return repr(outside)[:200] if outside else ""
        return ""

    def _open(self, path: Any, mode: Any, flags: Any) -> str:
        if not isinstance(path, (str, bytes, os.PathLike)):
            return ""  # a descriptor that was opened before
        writes = isinstance(mode, str) and any(mark in mode for mark in "wax+")
        if isinstance(flags, int) and mode is None:
            writes = bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC))
        if writes:
            return "" if self._within(path, self.writable) or str(path) == "/dev/null" else f"{path!r} to write"
        system = str(path).startswith(_SYSTEM)
        return "" if system or self._within(path, self.readable) else f"{path!r} to read"

    @staticmethod
    def _within(path: Any, roots: Sequence[str]) -> bool:
        if path is None:
            return True
        whole = os.path.abspath(os.fsdecode(path))
        # As it is written: that a link in a folder leads elsewhere is the folder's owner's doing, but not ".." in it.
        return any(whole == root or whole.startswith(root + "/") for root in roots)


def run(watch: Watch, words: Sequence[str], folder: Path, more: Sequence[Path] = (), stdin: str = "y\ny\n") -> Outcome:
    """``weft words`` with ``folder`` as what is foreign; the working directory is its part ``out``."""
    from weft import patterns
    from weft.cli.main import main
    from weft.data.rendering import sandbox

    # What a process remembers of templates and patterns is not to help the next case.
    sandbox._STOPPED.clear()
    patterns.pattern.cache_clear()
    out = folder / "out"
    out.mkdir(exist_ok=True)
    said, where, before = io.StringIO(), os.getcwd(), dict(os.environ)
    os.chdir(out)
    keep = sys.stdin
    sys.stdin = io.StringIO(stdin)
    try:
        memory, begun, clock = Memory(), time.process_time(), time.perf_counter()
        with watch.over(folder, more), contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(said):
            code = main([str(word) for word in words])
        seconds, clock, grown = time.process_time() - begun, time.perf_counter() - clock, memory.grown()
    finally:
        sys.stdin = keep
        os.chdir(where)
        os.environ.clear()
        os.environ.update(before)
    return Outcome(code, seconds, clock, grown, watch.events, said.getvalue())


def faults(outcome: Outcome, *, codes: Sequence[int] = (2,), seconds: float = 5.0, memory: float = 500e6) -> list[str]:
    """What of an outcome is not as promised."""
    found = list(outcome.events)
    if outcome.code not in codes:
        found.append(f"exit code {outcome.code}: {outcome.said[-300:]}")
    elif (outcome.code == 2 and "error: " not in outcome.said) or "Traceback" in outcome.said:
        found.append(f"no sentence, or a traceback: {outcome.said[-300:]}")
    elif len(outcome.said) > 4000:
        found.append(f"{len(outcome.said)} characters are said")
    if outcome.seconds > seconds:
        found.append(f"{outcome.seconds:.1f} s")
    if outcome.memory > memory:
        found.append(f"{outcome.memory / 1e6:.0f} MB")
    return found
