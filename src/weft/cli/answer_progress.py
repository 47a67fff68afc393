"""How far ``weft generate`` has come: a bar on a terminal (stderr), else a line every ten seconds."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType
from typing import Self

from weft.cli import common

_PAUSE = 10.0  # seconds between two lines


class AnswerProgress:
    """Counts answers; this one writes lines.

    Args:
        total: how many answers there will be.
        done: how many were there already.
        tokens: how many tokens have been written since the beginning.
    """

    def __init__(self, total: int, done: int, tokens: Callable[[], int]) -> None:
        self.total, self.done, self.tokens = total, done, tokens
        self._began = self._told = time.monotonic()

    def advance(self) -> None:
        """One more answer is there."""
        self.done += 1
        self.show()

    def show(self) -> None:
        """Say how far it is, if that was not said just now."""
        if time.monotonic() - self._told >= _PAUSE and self.done < self.total:
            self._told = time.monotonic()
            common.say(f"{self.done:,} of {self.total:,} answers, {self.speed()}")

    def speed(self) -> str:
        """Tokens per second."""
        return f"{self.tokens() / max(time.monotonic() - self._began, 1e-9):.0f} tokens/s"

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        """Leave the terminal as it was found."""


class AnswerBar(AnswerProgress):
    """Shows a bar, which is gone at the end."""

    def __init__(self, total: int, done: int, tokens: Callable[[], int]) -> None:
        from rich.progress import BarColumn, Progress, ProgressColumn, Task, TextColumn, TimeRemainingColumn
        from rich.text import Text

        super().__init__(total, done, tokens)

        class Speed(ProgressColumn):
            def render(column, task: Task) -> Text:  # noqa: N805
                return Text(self.speed())

        self._bar = Progress(
            TextColumn("answers"), BarColumn(30), TextColumn("{task.completed}/{task.total}"), Speed(),
            TextColumn("ETA"), TimeRemainingColumn(), console=common.console(stderr=True), transient=True,
        )  # fmt: skip
        self._task = self._bar.add_task("answers", total=total, completed=done)

    def show(self) -> None:
        self._bar.update(self._task, completed=self.done)

    def __enter__(self) -> Self:
        self._bar.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._bar.stop()


def make_progress(total: int, done: int, tokens: Callable[[], int]) -> AnswerProgress:
    """What fits where stderr goes. One answer needs no bar."""
    console = common.console(stderr=True)
    shows = sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal
    return (AnswerBar if shows and total > 1 else AnswerProgress)(total, done, tokens)
