"""A report's plots as PNG files, for a mail or a paper: figures, gain against forgetting, losses."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

from weft.evaluate.report.report import Report
from weft.evaluate.report.runs import RunRecord
from weft.evaluate.report.wording import scale
from weft.evaluate.statistics import Z95

# All that a report may write, so that an older report's do not stay beside a newer one.
FIGURES, TRADE, LOSSES = "figures.png", "gain_forgetting.png", "losses.png"
_DPI, _ROW, _COLUMNS = 120, 0.24, 4  # dots an inch; inches of a row; small plots beside each other
_BLUE, _ORANGE, _GREEN, _RED, _GREY = "#2f66d0", "#c2571a", "#0b6b2e", "#b3261e", "#666d75"


def pictures(report: Report) -> Iterator[tuple[str, bytes]]:
    """(name, PNG) of each plot for which there are figures."""
    if report.comparison.figures:
        yield FIGURES, _figures(report)
    if len(report.trades) > 1:
        yield TRADE, _trade(report)
    for number, run in enumerate(report.runs, 1):
        if any(job.train or any(job.evals.values()) for job in run.jobs):
            yield (LOSSES if len(report.runs) == 1 else losses_name(number)), _losses(run)


def losses_name(number: int) -> str:
    """The file of one of several runs' losses."""
    return LOSSES.replace(".png", f"_{number}.png")


def _subplots(rows: int, columns: int, width: float, height: float) -> tuple[Any, Any]:
    """A figure and its axes [rows, columns], without a window and without the state of pyplot."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, figure.subplots(rows, columns, squeeze=False)


def _png(figure: Any) -> bytes:
    drawn = io.BytesIO()
    figure.savefig(drawn, dpi=_DPI)
    return drawn.getvalue()


def _figures(report: Report) -> bytes:
    shown = {one.task for one in report.comparison.figures}
    tasks = [task for task in report.sheet.tasks.values() if task.name in shown]
    most = max(sum(one.task == task.name for one in report.comparison.figures) for task in tasks)
    figure, axes = _subplots(1, len(tasks), max(6.0, 4.2 * len(tasks)), 1.2 + _ROW * most)
    for axis, task in zip(axes[0], tasks, strict=True):
        written = scale(task, report.comparison)
        factor = 100 if written.percent else 1
        own = [one for one in report.comparison.figures if one.task == task.name and math.isfinite(one.value)]
        own.sort(key=lambda one: one.value if task.higher_is_better else -one.value)
        for row, one in enumerate(own):
            better = written.better(one.difference) if one.difference is not None and one.difference.found else None
            colour = _GREY if one.difference is None else _BLUE if better is None else _GREEN if better else _RED
            axis.errorbar(factor * one.value, row, xerr=factor * Z95 * (one.stderr or 0), fmt="o", ms=4, color=colour)
            if one.difference is None:
                axis.axvline(factor * one.value, color=_GREY, lw=0.8, ls=":")
        axis.set_yticks(range(len(own)), [one.contestant for one in own], fontsize=8, parse_math=False)
        axis.set_title(f"{task.name} ({task.metric}{written.unit})", fontsize=10, parse_math=False)
        axis.grid(axis="x", alpha=0.3)
    return _png(figure)


def _trade(report: Report) -> bytes:
    figure, axes = _subplots(1, 1, 7.5, 5)
    axis = axes[0][0]
    for one in report.trades:
        idle = one.contestant in report.idle
        axis.plot(one.forgetting, 100 * one.gain, "o", color=_RED if idle else _BLUE)
        axis.annotate(one.contestant, (one.forgetting, 100 * one.gain), (4, 4), textcoords="offset points", fontsize=8,
                      parse_math=False)  # fmt: skip
    axis.axhline(0, color=_GREY, lw=0.8)
    axis.axvline(0, color=_GREY, lw=0.8)
    axis.set_xlabel("forgetting: change of cross-entropy on general text (nats)")
    axis.set_ylabel("gain (points)")
    axis.grid(alpha=0.3)
    return _png(figure)


def _losses(run: RunRecord) -> bytes:
    jobs = [job for job in run.jobs if job.train or any(job.evals.values())]
    columns = min(_COLUMNS, len(jobs))
    rows = -(-len(jobs) // columns)
    figure, axes = _subplots(rows, columns, 3.0 * columns, 2.0 * rows + 0.4)
    for axis in [one for line in axes for one in line][len(jobs) :]:
        axis.remove()
    for axis, job in zip((one for line in axes for one in line), jobs, strict=False):
        if job.train:
            axis.plot(*zip(*job.train, strict=True), color=_BLUE, lw=1.2, label="training")
        for number, (name, curve) in enumerate(job.evals.items()):
            if curve:
                axis.plot(*zip(*curve, strict=True), "o-", ms=3, lw=0.8, color=f"C{number + 1}",
                          label=f"evaluation {name}".strip())  # fmt: skip
        axis.set_title(job.name, fontsize=9, parse_math=False)
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("loss per token", fontsize=9)
    return _png(figure)
