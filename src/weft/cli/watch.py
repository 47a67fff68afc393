"""``weft watch``: the curves of a run in the terminal, while another process trains it."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from weft.cli import common, options
from weft.cli.curves import ALL, plot
from weft.cli.progress import plain_line
from weft.errors import UserError
from weft.paths import local_path

if TYPE_CHECKING:
    from rich.console import Console

_TALLEST, _WIDEST = 6, 120
_LABEL, _SIDE = 16, 3  # columns of "loss  12.3456  " before a curve, and between two that stand side by side
_STATES = {
    "trains": "training",
    "finished": "finished",
    "stopped": "stopped; what it has done is saved",
    "crashed": "crashed: no process trains it, and it has not ended",
    "waits": "has not begun",
}


def watch(
    run: Annotated[str, typer.Argument(metavar="RUN", help="Folder of a run, or of a sweep with one run.")],
    once: Annotated[bool, typer.Option("--once", help="Print one picture and leave.")] = False,
    every: Annotated[float, typer.Option(min=0.1, metavar="SECONDS", help="How often to look.")] = 1.0,
    as_json: options.Json = False,
) -> int:
    """Show how a run is doing, until it ends: loss, evaluations, rate and time left of each job.

    weft watch runs/first

    weft watch runs/first --once
    """
    view = View(_folder(run))
    view.look()
    if as_json:
        common.print_json(view.json())
    elif once:
        for line in view.lines(min(_WIDEST, common.console().width)):
            print(line)
    else:
        try:
            _follow(view, every)
        except KeyboardInterrupt:
            return common.INTERRUPTED
    failed = view.state == "crashed" or any(job["ended"] == "failed" for job in view.jobs.values())
    return common.JOB_FAILED if failed else common.DONE


def _folder(run: str) -> Path:
    from weft.files.run_folder import LOCK_FILE, METRICS_FILE, RUN_FILE

    folder = local_path(run)
    runs = sorted(path for path in folder.glob("run-*") if (path / LOCK_FILE).is_file())
    if not (folder / LOCK_FILE).is_file() and runs:
        if len(runs) > 1:
            raise UserError(f"{folder} holds several runs; name one of them, as {runs[-1]}.")
        return runs[0]
    if not any((folder / name).is_file() for name in (LOCK_FILE, METRICS_FILE, RUN_FILE)):
        raise UserError(f"{folder} is no run's folder; give the output_dir of a run.")
    return folder


class View:
    """What is known of a run from its folder.

    Attributes:
        state: one of ``trains``, ``finished``, ``stopped``, ``crashed``, ``waits``.
        jobs: what the last events say of each job, and how it ``ended``.
        new: the rows that the last look has found.
    """

    def __init__(self, folder: Path) -> None:
        from weft.files.metrics import Follower, Metrics
        from weft.files.run_folder import METRICS_FILE, RunStore

        self.folder, self.store = folder, RunStore(folder)
        self.rows, self.new = Metrics(), Metrics()
        self.jobs: dict[str, dict[str, Any]] = {}
        self.state = "waits"
        self._follower = Follower(folder / METRICS_FILE)

    def look(self) -> None:
        """Read what there is. Raises UserError if a file of the run is damaged."""
        from weft.files.metrics import Metrics

        in_use = self.store.in_use()  # before the rows, so that none is missed of a run that ends in between
        anew, rows = self._follower.rows()
        self.new = Metrics(rows)
        if anew:
            self.rows.clear()
            self.jobs.clear()
        self.rows += rows
        for row in rows:
            if row.get("job") is not None:
                job = self.jobs.setdefault(row["job"], {"ended": None, "step": 0, "total_steps": None})
                job.update({key: value for key, value in row.items() if key not in ("event", "job", "time")})
                if row["event"] == "left":
                    job["ended"] = "left"
        state = None if in_use else self.store.newest_state()
        self._end(state)
        self.state = "trains" if in_use else self._how_left(state)

    def _end(self, state: dict[str, Any] | None) -> None:
        for name, own in (state or {}).get("jobs", {}).items():
            job = self.jobs.setdefault(name, {"step": own["progress"]["step"]})
            job["ended"], job["reason"] = own["progress"]["ended"], own["progress"].get("reason")
            job["total_steps"] = own.get("total_steps")

    def _how_left(self, state: dict[str, Any] | None) -> str:
        if state is None:
            return "crashed" if self.rows else "waits"
        size = self._follower.path.stat().st_size if self._follower.path.is_file() else 0
        if not state.get("last", True) or state.get("metrics_bytes") != size:
            return "crashed"
        return "finished" if all(job["ended"] for job in self.jobs.values()) else "stopped"

    def json(self) -> dict[str, Any]:
        """The state, and the last figures of each job."""
        return {"folder": str(self.folder), "state": self.state, "jobs": self.jobs}

    def lines(self, width: int, height: int | None = None) -> Iterator[str]:
        """The picture, at most ``width`` wide; it takes ``height`` lines, if the jobs have room in so many."""
        yield common.printable(f"{self.folder}: {_STATES[self.state]}")[:width]
        if self.state in ("stopped", "crashed"):
            from weft.sweeps.record import SWEEP_FILE

            swept = (self.folder.parent / SWEEP_FILE).is_file()
            again = "the same call of weft sweep" if swept else f"weft train {self.folder} --resume"
            yield f"go on with:  {again}"
        if not self.jobs:
            yield "nothing is logged yet"
        # Of each job: an empty line, a heading, the rate; two curves, which stand side by side where there is room.
        bands = 1 if width >= 100 else 2
        spare = _TALLEST if height is None else (height - 2) // max(1, len(self.jobs)) - 3
        tall = max(1, min(_TALLEST, spare // bands)) if len(self.jobs) <= 4 or height is not None else 1
        for name, job in self.jobs.items():
            yield ""
            yield from self._job(name, job, width, tall)

    def _job(self, name: str, job: dict[str, Any], width: int, tall: int) -> Iterator[str]:
        yield _heading(name, job, width, live=self.state == "trains")
        if job.get("reason"):
            yield f"  {job['ended']}: {job['reason']}"[:width]
        own = self.rows.where(job=name)
        told = [key for key in own.columns() if key.startswith("eval_") and key.endswith("_loss")]
        keys = ["loss", *told[:1]]
        if width >= 100 and len(keys) == 2:
            half = (width - _SIDE) // 2
            sides = [self._curve(own, key, half, tall) for key in keys]
            yield from (f"{left:<{half}}{' ' * _SIDE}{right}".rstrip() for left, right in zip(*sides, strict=True))
        else:
            for key in keys:
                yield from self._curve(own, key, width, tall)
        for key in (*told[1:], "learning_rate"):
            yield from self._curve(own, key, width, 1)

    def _curve(self, own: Any, key: str, width: int, tall: int) -> list[str]:
        steps, values = own.curve(key)
        if not values:
            return [f"{_short(key):<6}no figure yet"] + [""] * (tall - 1)
        lines = plot(steps, values, max(4, width - _LABEL), tall)
        finite = [value for value in values if math.isfinite(value)] or [math.nan]
        labels = [""] * tall
        # The highest and the lowest stand at the curve's height; the last one is what people look for.
        if tall > 2:
            labels[0], labels[-1] = _number(max(finite)), _number(min(finite))
        labels[tall // 2 if tall > 2 else 0] = f"{_short(key)} {_number(values[-1])}"
        return [f"{label:>{_LABEL - 2}}  {line}".rstrip() for label, line in zip(labels, lines, strict=True)]


def _heading(name: str, job: dict[str, Any], width: int, *, live: bool) -> str:
    total = job.get("total_steps")
    words = [f"step {job['step']}" + (f" of {total}" if total else "")]
    if job.get("ended"):
        words.append(str(job["ended"]))
    elif live and job.get("eta_seconds") is not None:
        words.append(f"{common.human_time(job['eta_seconds'])} left")
    if job.get("tokens_per_second") is not None:
        words.append(f"{job['tokens_per_second']:,.0f} tokens/s")
    text = "  ".join(words)
    room = max(8, width - len(text) - 2)
    return f"{name if len(name) <= room else name[: room - 1] + '…'}  {text}"[:width]


def _short(key: str) -> str:
    return {"learning_rate": "rate", "eval_loss": "eval"}.get(key, key.removeprefix("eval_").removesuffix("_loss"))


def _number(value: float) -> str:
    return f"{value:.4f}" if 0.01 <= abs(value) < 1000 or value == 0 else f"{value:.1e}"


def _follow(view: View, every: float) -> None:
    """Show the run until it ends: a picture that is drawn anew, or (no terminal) a line for each event."""
    console = common.console()
    drawn = sys.stdout.isatty() and console.is_terminal and not console.is_dumb_terminal and _encodes()
    if drawn:
        _draw(view, console, every)
        return
    print(f"{view.folder}: {_STATES[view.state]}", flush=True)
    while True:
        for row in view.new:
            line = f"warning: {row['message']}" if row["event"] == "warning" else plain_line(row)
            if row["event"] == "left":
                line = f"left job={row['job']} step={row['step']}: {row['reason']}"
            if line:
                print(common.printable(line), flush=True)
        if view.state not in ("trains", "waits"):
            break
        time.sleep(every)
        view.look()
    print(f"{view.folder}: {_STATES[view.state]}", flush=True)


def _draw(view: View, console: Console, every: float) -> None:
    from rich.live import Live
    from rich.text import Text

    def picture() -> Text:
        return Text("\n".join(view.lines(min(_WIDEST, console.width), console.height - 1)), no_wrap=True)

    with Live(picture(), console=console, auto_refresh=False, vertical_overflow="crop") as live:
        while view.state in ("trains", "waits"):
            time.sleep(every)
            view.look()
            live.update(picture(), refresh=True)


def _encodes() -> bool:
    try:
        ALL.encode(sys.stdout.encoding or "ascii")
    except UnicodeEncodeError:
        return False
    return True
