"""The progress of a training run: a live table on a terminal (stderr) or in a notebook, plain lines anywhere else."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from weft.cli import common

if TYPE_CHECKING:
    from rich.console import Console
    from rich.table import Table

    from weft.models.reach import Omission
    from weft.training.run import Setup


def not_reached(setup: Setup) -> dict[str, Omission | None]:
    """The parts of the base that each job does not reach."""
    from weft.models.reach import left_out

    return {job.name: left_out(job.adapter, setup.base.model, setup.base.architecture) for job in setup.jobs}


def opening(setup: Setup, missed: Mapping[str, Omission | None]) -> Iterator[str]:
    """PEFT's sentence for each job, with its folder, the parts of the base that it does not reach, and its note."""
    from weft.models.quantize import num_parameters
    from weft.models.reach import unquantized

    if told := unquantized(setup.base.model, setup.base.architecture):
        yield told
    base = num_parameters(setup.base.model)
    for job in setup.jobs:
        own = job.adapter.num_trainable()
        yield (
            f"{job.name}: trainable params: {own:,} || all params: {base + own:,} || "
            f"trainable%: {100 * own / (base + own):.4f} -> {Path(setup.config.output_dir) / 'adapters' / job.name}"
        )
        if missed[job.name]:
            yield f"{job.name}: {missed[job.name]}"
        if job.adapter.note:
            yield f"{job.name}: {job.adapter.note}"
        if job.eval_sizes and job.config.early_stopping_patience is not None:
            yield f"{job.name}: early stopping watches the loss on {job.watched}"


_BAR = 8  # columns that the bar of a job has at least


class Reporter:
    """Takes the trainer's events; this one shows warnings only."""

    def event(self, event: Mapping[str, Any]) -> None:
        """Take an event: ``step``, ``eval``, ``forgetting``, ``warning`` or ``end``."""
        if event["event"] == "warning":
            common.say(f"warning: {event['message']}")

    def close(self) -> None:
        """Leave the terminal as it was found."""


class PlainReporter(Reporter):
    """Writes a ``key=value`` line for each event."""

    def event(self, event: Mapping[str, Any]) -> None:
        super().event(event)
        if line := plain_line(event):
            common.say(line)


# What a line of a step tells of judged answers, where there is some; metrics.jsonl has more.
_FIGURES = ("reward", "rewards/margins", "accuracy", "logps/chosen", "kl")


def plain_line(event: Mapping[str, Any]) -> str | None:
    """The line for an event, or None for those that have none."""
    if event["event"] == "eval":
        words = [f"eval job={event['job']} step={event['step']}"]
        for key, value in event.items():
            if key.endswith("_loss"):
                words.append(f"{key}={value:.4f}")
            elif key.endswith(("_accuracy", "_majority", "_reward")) or "_rewards/" in key:
                words.append(f"{key.removeprefix('eval_')}={value:.4f}")
        watched = event.get("early_stopping_on")
        return " ".join([*words, *([f"early_stopping_on={watched}"] if watched else [])])
    if event["event"] == "forgetting":
        return (
            f"forgetting job={event['job']} step={event['step']} forgetting={event['forgetting']:+.4f} "
            f"per_byte={event['forgetting_per_byte']:+.4f} general_loss={event['general_loss']:.4f}"
        )
    if event["event"] != "step":
        return None
    return (
        f"step job={event['job']} step={event['step']}/{event['total_steps']} epoch={event['epoch']:.2f} "
        f"loss={event['loss']:.4f} grad_norm={event['grad_norm']:.3f} lr={event['learning_rate']:.2e} "
        f"tokens/s={event['tokens_per_second']:.0f} eta={common.human_time(event['eta_seconds'])} "
        f"memory={event['memory_gb']:.2f}GB" + "".join(f" {k}={event[k]:.4f}" for k in _FIGURES if k in event)
    )


class TableReporter(Reporter):
    """Keeps a table with a line for each job."""

    def __init__(self, jobs: Sequence[tuple[str, int]]) -> None:
        """``jobs``: their names, and the steps of each."""
        self.rows: dict[str, dict[str, Any]] = {name: {"step": 0, "total_steps": total} for name, total in jobs}
        self.memory = 0.0

    def event(self, event: Mapping[str, Any]) -> None:
        super().event(event)
        if event["event"] in ("step", "eval", "forgetting"):
            self.rows[event["job"]].update(event)
            self.memory = max(self.memory, event.get("memory_gb", 0.0))

    def table(self, console: Console | None = None) -> Table:
        """The present state of all jobs. Where a line has no room for all named sets, each has a line of its own."""
        if console is None:
            return self._table()
        anywhere = console.options.update_width(sys.maxsize)
        needed = console.measure(self._table(bar=_BAR), options=anywhere).maximum
        return self._table(by_set=needed > console.width)

    def _table(self, *, bar: int | None = None, by_set: bool = False) -> Table:
        from rich.progress_bar import ProgressBar
        from rich.table import Table

        # The process has one memory; it stands in the heading rather than once per job.
        memory = f"mem {self.memory:.2f}GB" if self.memory else "mem"
        table = Table(box=None, padding=(0, 1), pad_edge=False)
        table.add_column("job", max_width=20 if by_set else 24, no_wrap=True)
        table.add_column("", min_width=_BAR)
        told = dict.fromkeys(key for row in self.rows.values() for key in row if key.startswith("eval_"))
        losses = [key for key in told if key.endswith("_loss")] or ["eval_loss"]
        rights = [key for key in told if key.endswith("_accuracy")]
        sets = [key for key in losses if key != "eval_loss"] if by_set else []
        if sets:
            losses, rights = ["eval_loss"], ["eval_accuracy"] * bool(rights)
        headings = [_heading(key, "eval") for key in losses] + [_heading(key, "acc") for key in rights]
        forgets = ["forgetting"] * any("forgetting" in row for row in self.rows.values())
        for heading in ("step", "loss", *headings, *("forgot" for _ in forgets), "tok/s", "ETA"):
            table.add_column(heading, justify="right", no_wrap=True)
        table.add_column(memory, no_wrap=True)
        for name, row in self.rows.items():
            progress = ProgressBar(total=max(row["total_steps"], 1), completed=row["step"], width=bar)
            cells = [
                f"{row['step']}/{row['total_steps']}",
                _number(row.get("loss"), ".4f"),
                *(_number(row.get(key), ".4f") for key in losses),
                *(_number(row.get(key), ".3f") for key in rights),
                *(_number(row.get(key), "+.3f") for key in forgets),
                _number(row.get("tokens_per_second"), ".0f"),
                common.human_time(row["eta_seconds"]) if "eta_seconds" in row else "",
            ]
            table.add_row(name, progress, *cells, "")
            for key in sets:
                if key in row:
                    right = [_number(row.get(f"{key.removesuffix('loss')}accuracy"), ".3f")] * len(rights)
                    table.add_row(f" {_heading(key, '')}", "", "", "", _number(row[key], ".4f"), *right)
        return table


class LiveReporter(TableReporter):
    """Rewrites the table in place, on a terminal."""

    def __init__(self, jobs: Sequence[tuple[str, int]], console: Console) -> None:
        from rich.live import Live

        super().__init__(jobs)
        self.live = Live(console=console, refresh_per_second=4, get_renderable=lambda: self.table(console))
        self.live.start()

    def event(self, event: Mapping[str, Any]) -> None:
        if event["event"] == "warning":
            self.live.console.print(f"warning: {event['message']}", markup=False, highlight=False)
        else:
            super().event(event)

    def close(self) -> None:
        self.live.stop()


class NotebookReporter(TableReporter):
    """Rewrites the table in the output of a notebook's cell. It needs IPython alone, where rich wants ipywidgets."""

    def __init__(self, jobs: Sequence[tuple[str, int]]) -> None:
        from IPython.display import display

        super().__init__(jobs)
        self._shown = time.monotonic()
        self._display = display(self.table(), display_id=True)

    def event(self, event: Mapping[str, Any]) -> None:
        super().event(event)
        if time.monotonic() - self._shown > 0.25:
            self.close()
            self._shown = time.monotonic()

    def close(self) -> None:
        self._display.update(self.table())


def _heading(key: str, word: str) -> str:
    """``eval`` of ``eval_loss``, ``eval domain`` of ``eval_domain_loss``."""
    name, _, _ = key.removeprefix("eval_").rpartition("_")
    return f"{word} {name}".rstrip()


def _number(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def make_reporter(jobs: Sequence[tuple[str, int]], *, quiet: bool) -> Reporter:
    """Make the reporter that fits where stderr goes."""
    if quiet:
        return Reporter()
    console = common.console(stderr=True)
    if console.is_jupyter:
        return NotebookReporter(jobs)
    if sys.stderr.isatty() and console.is_terminal and not console.is_dumb_terminal:
        return LiveReporter(jobs, console)
    return PlainReporter()
