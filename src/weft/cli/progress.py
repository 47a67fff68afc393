"""What a training run shows while it runs: a live table on a terminal, plain lines anywhere else. On stderr."""

from __future__ import annotations

import sys
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import TYPE_CHECKING, Any, Protocol

from weft.cli import common

if TYPE_CHECKING:
    from rich.console import Console, ConsoleRenderable


class Reporter(Protocol):
    """Takes the trainer's events."""

    def event(self, event: Mapping[str, Any]) -> None:
        """One event: ``step``, ``eval``, ``warning`` or ``end``."""

    def close(self) -> None:
        """Leave the terminal as it was found."""


class QuietReporter:
    """Warnings only."""

    def event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "warning":
            common.say(f"warning: {event['message']}")

    def close(self) -> None:
        pass


class PlainReporter(QuietReporter):
    """One ``key=value`` line per event."""

    def event(self, event: Mapping[str, Any]) -> None:
        super().event(event)
        line = plain_line(event)
        if line:
            common.say(line)


def plain_line(event: Mapping[str, Any]) -> str | None:
    """The line for an event, or None for those that have none."""
    if event["event"] == "eval":
        line = f"eval job={event['job']} step={event['step']} eval_loss={event['eval_loss']:.4f}"
        if "eval_accuracy" not in event:
            return line
        return f"{line} accuracy={event['eval_accuracy']:.4f} majority={event['eval_majority']:.4f}"
    if event["event"] != "step":
        return None
    return (
        f"step job={event['job']} step={event['step']}/{event['total_steps']} epoch={event['epoch']:.2f} "
        f"loss={event['loss']:.4f} grad_norm={event['grad_norm']:.3f} lr={event['learning_rate']:.2e} "
        f"tokens/s={event['tokens_per_second']:.0f} eta={common.human_time(event['eta_seconds'])} "
        f"memory={event['memory_gb']:.2f}GB"
    )


@dataclass
class _Row:
    """The last that is known of a job."""

    step: int = 0
    total: int = 0
    loss: float | None = None
    _: KW_ONLY
    eval_loss: float | None = None
    accuracy: float | None = None
    speed: float | None = None
    eta: float | None = None


class LiveReporter:
    """One line per job that is rewritten in place."""

    def __init__(self, jobs: Sequence[tuple[str, int, int]], console: Console) -> None:
        """``jobs``: name, steps done, steps in all."""
        from rich.live import Live

        self.rows = {name: _Row(step, total) for name, step, total in jobs}
        self.memory = 0.0
        self.console = console
        self.live = Live(self.table(), console=console, refresh_per_second=4, get_renderable=self.table)
        self.live.start()

    def event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "warning":
            self.console.print(f"warning: {event['message']}", markup=False, highlight=False)
        elif event["event"] == "eval":
            row = self.rows[event["job"]]
            row.eval_loss, row.accuracy = event["eval_loss"], event.get("eval_accuracy")
        elif event["event"] == "step":
            row = self.rows[event["job"]]
            row.step, row.total, row.loss = event["step"], event["total_steps"], event["loss"]
            row.speed, row.eta = event["tokens_per_second"], event["eta_seconds"]
            self.memory = max(self.memory, event["memory_gb"])

    def close(self) -> None:
        self.live.stop()

    def table(self) -> ConsoleRenderable:
        """The present state of all jobs."""
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        # The process has one memory; it stands in the heading rather than once per job.
        memory = f"mem {self.memory:.2f}GB" if self.memory else "mem"
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        table.add_column("job", max_width=24, no_wrap=True)
        table.add_column("", min_width=8)
        classifies = any(row.accuracy is not None for row in self.rows.values())
        for heading in ("step", "loss", "eval", *(["acc"] if classifies else []), "tok/s", "ETA"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column(memory, no_wrap=True)
        for name, row in self.rows.items():
            bar = ProgressBar(total=max(row.total, 1), completed=row.step, width=None)
            cells = [
                f"{row.step}/{row.total}",
                _number(row.loss, ".4f"),
                _number(row.eval_loss, ".4f"),
                *([_number(row.accuracy, ".3f")] if classifies else []),
                _number(row.speed, ".0f"),
                "" if row.eta is None else common.human_time(row.eta),
            ]
            table.add_row(name, bar, *cells, "")
        return table


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def make_reporter(jobs: Sequence[tuple[str, int, int]], *, quiet: bool) -> Reporter:
    """The reporter that fits where stderr goes."""
    if quiet:
        return QuietReporter()
    console = common.console(stderr=True)
    if sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return LiveReporter(jobs, console)
    return PlainReporter()
