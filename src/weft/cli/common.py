"""The parts that all verbs share: exit codes, the two consoles, JSON on stdout, quiet libraries."""

from __future__ import annotations

import contextlib
import gc
import io
import json
import logging
import os
import shutil
import sys
import textwrap
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING

from weft.numbers import duration as duration
from weft.numbers import finite as finite
from weft.numbers import human_size as human_size
from weft.numbers import human_time as human_time
from weft.paths import is_hub_id

if TYPE_CHECKING:
    from rich.console import Console

DONE = 0
DEFECT = AUDIT_FAILED = 1
USAGE = 2
JOB_FAILED = CANNOT_FIT = 3
DIFFERS = 4
INTERRUPTED = 130
TERMINATED = 143
PIPE_CLOSED = 141

EXIT_CODES: dict[int, str] = {
    DONE: "done",
    DEFECT: "a defect of Weft (--debug shows the traceback); of `weft preview`: the audit found errors",
    USAGE: "the input cannot be used, or the disk is full (the message says what and where)",
    JOB_FAILED: "training ended, but a job failed (loss or gradient not finite, or nothing learned); of `weft plan`, "
    "and of `weft train` before it begins: the run does not fit into memory",
    DIFFERS: "`weft verify`: the two differ by more than rounding explains (it says where first)",
    INTERRUPTED: "interrupted by Ctrl-C (a training run is saved and can be resumed)",
    PIPE_CLOSED: "whoever read the output has gone",
    TERMINATED: "ended by SIGTERM (likewise)",
}
EPILOG = "Exit codes: " + "; ".join(f"{code} {meaning}" for code, meaning in sorted(EXIT_CODES.items())) + "."

# No table in a file or a pipe is wider.
_PIPE_WIDTH = 160


class Interruption(BaseException):
    """A signal that arrives where nothing has to be saved. It is no Exception, so that no handler swallows it."""

    def __init__(self, signum: int) -> None:
        super().__init__(signum)
        self.signum = signum


def console(*, stderr: bool = False) -> Console:
    """A console on the present stdout or stderr; markup is off because names and messages come from users."""
    from rich.console import Console

    stream = sys.stderr if stderr else sys.stdout
    width = None if stream.isatty() else _PIPE_WIDTH
    return Console(file=stream, width=width, markup=False, highlight=False, emoji=False)


def say(text: str) -> None:
    """Write a line for the user to stderr, beside the result."""
    print(folded(text), file=sys.stderr, flush=True)


def folded(text: str) -> str:
    """The text; for a terminal its lines are broken between words, and no word or path is cut."""
    if not sys.stderr.isatty():
        return text
    width = shutil.get_terminal_size().columns
    lines = []
    for line in text.split("\n"):
        body = line.lstrip()
        indent = line[: len(line) - len(body)]
        lines += textwrap.wrap(
            body, width, initial_indent=indent, subsequent_indent=indent, break_long_words=False,
            break_on_hyphens=False, replace_whitespace=False, expand_tabs=False,
        ) or [line]  # fmt: skip
    return "\n".join(lines)


def printable(text: str) -> str:
    """The text for a terminal: what would move its cursor or change its colours is shown as ``�``."""
    return "".join(c if c in "\n\t" or " " <= c < "\x7f" or c > "\x9f" else "�" for c in text)


def tell_hub(model: str) -> None:
    """Say that a model will be looked for on the hub: a mistyped folder looks like an id, and asking takes a while."""
    if is_hub_id(model):
        say(f"{model} is no folder here; looking for it in the Hugging Face cache and hub")


def open_streams() -> None:
    """A console shows ``?`` for what its encoding lacks, and lines that are piped in are UTF-8 on every machine."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    if isinstance(sys.stdin, io.TextIOWrapper) and not sys.stdin.isatty():
        # What is not UTF-8 arrives as surrogates, which the reader of the lines refuses by number.
        sys.stdin.reconfigure(encoding="utf-8", errors="surrogateescape")


def print_json(value: object, *, indent: int | None = 2) -> None:
    """One JSON object on stdout, UTF-8 whatever the console's encoding. What is not finite becomes null."""
    text = json.dumps(finite(value), ensure_ascii=False, indent=indent) + "\n"
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.flush()
        sys.stdout.buffer.write(text.encode(errors="replace"))
    else:
        sys.stdout.write(text)
    sys.stdout.flush()


@contextlib.contextmanager
def no_collection() -> Iterator[None]:
    """Inside, Python looks for no unused objects: while libraries are imported there are none, and the look is a sixth
    of the time. What is there afterwards is never looked at again."""
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()


def quiet_libraries() -> None:
    """Keep other libraries' messages off the screen. This must come before they are imported."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    warnings.filterwarnings("ignore")
    for name in ("transformers", "huggingface_hub", "torch", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)


class _Folded(logging.Formatter):
    """Breaks lines as ``say`` does."""

    def format(self, record: logging.LogRecord) -> str:
        return folded(super().format(record))


def show_warnings() -> None:
    """Write Weft's own warnings (records left out, for one) as ``warning: …`` to stderr."""
    logger = logging.getLogger("weft")
    for old in [handler for handler in logger.handlers if handler.name == __name__]:
        logger.removeHandler(old)
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_Folded("warning: %(message)s"))
    handler.set_name(__name__)
    logger.addHandler(handler)
    logger.propagate = False


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
