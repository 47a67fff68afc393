"""A training run on the screen: its signals and its progress."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

from weft.cli import common
from weft.cli.progress import Reporter, make_reporter

if TYPE_CHECKING:
    from weft.training.job import Job


class Session:
    """SIGINT and SIGTERM: while loading they end the program; while training the first asks to save and leave.

    In a program that calls Weft, only a SIGINT that would be a ``KeyboardInterrupt`` is taken. It stays one, but for
    the first while training, which asks likewise.

    Attributes:
        received: the number of the first signal, if there was one.
    """

    def __init__(self, *, quiet: bool, in_program: bool = False) -> None:
        self.received: int | None = None
        self._quiet, self._told, self._in_program = quiet, False, in_program
        self._reporter: Reporter | None = None

    def begin(self, jobs: Sequence[Job]) -> None:
        """Show the progress of these jobs. From here on a signal lets the trainer save."""
        self.close()
        self._reporter = make_reporter([(job.name, job.total_steps) for job in jobs], quiet=self._quiet)

    def event(self, event: Mapping[str, Any]) -> None:
        """Show an event of the trainer."""
        assert self._reporter is not None
        self._reporter.event(event)

    def should_stop(self) -> bool:
        """Whether to save and leave; says so once."""
        # The handler does not say it: it may have interrupted a print, and printing again there raises.
        if self.received is not None and not self._told:
            self._told = True
            common.say("stopping: saving after this step (Ctrl-C leaves at once, without saving)")
        return self.received is not None

    def close(self) -> None:
        """Leave the terminal as it was found."""
        if self._reporter is not None:
            self._reporter.close()

    @contextmanager
    def open(self) -> Iterator[None]:
        """Handle both signals inside the block."""
        numbers: tuple[int, ...] = (signal.SIGINT, signal.SIGTERM)
        if self._in_program:
            here = threading.current_thread() is threading.main_thread()  # no other may handle signals
            usual = signal.getsignal(signal.SIGINT) is signal.default_int_handler
            numbers = (signal.SIGINT,) if here and usual else ()
        before = {number: signal.signal(number, self._handle) for number in numbers}
        try:
            yield
        finally:
            self.close()
            for number, handler in before.items():
                signal.signal(number, handler)

    def _handle(self, signum: int, frame: FrameType | None) -> None:
        first = self.received is None
        if first:
            self.received = signum
        if self._in_program and (self._reporter is None or not first):
            raise KeyboardInterrupt
        if self._reporter is None:
            # Python drops what is raised inside a destructor; the flag then still ends the run at its first step.
            raise common.Interruption(signum)
        if not first and signum == signal.SIGINT:
            if sys.stderr.isatty():
                os.write(2, b"\x1b[?25h\n")  # the live display has hidden the cursor
            os._exit(common.INTERRUPTED)
