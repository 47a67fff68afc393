"""A report's plots as PNG files, for a mail or a paper: figures, gain against forgetting, losses."""

from __future__ import annotations

import io
import math
from collections.abc import Iterator
from typing import Any

from weft.evaluate.report.plots import loss_axes
from weft.evaluate.report.report import Report
from weft.evaluate.report.runs import RunRecord
from weft.evaluate.report.svg import beside
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
        axis.set_yticks(range(len(own)), [_plain(one.contestant) for one in own], fontsize=8)
        axis.set_title(_plain(f"{task.name} ({task.metric}{written.unit})"), fontsize=10)
        axis.grid(axis="x", alpha=0.3)
    return _png(figure)


def _trade(report: Report) -> bytes:
    """Points with numbers, and the names beside them, the largest gain first."""
    figure, axes = _subplots(1, 1, 9, 5)
    axis = axes[0][0]
    ordered = sorted(report.trades, key=lambda one: -one.gain)
    places = [(one.forgetting, 100 * one.gain) for one in ordered]
    axis.axhline(0, color=_GREY, lw=0.8)
    axis.axvline(0, color=_GREY, lw=0.8)
    axis.margins(0.08)
    for number, (one, place) in enumerate(zip(ordered, places, strict=True), 1):
        colour = _RED if one.contestant in report.idle else _BLUE
        axis.plot(*place, "o", color=colour, label=_plain(f"{number}  {one.contestant}"))
    (left, right), (low, high) = axis.get_xlim(), axis.get_ylim()
    wide, tall = (right - left) / 100, (high - low) / 100
    numbers = beside([((x - left) / wide, 100 - (y - low) / tall) for x, y in places])
    for number, (x, y) in enumerate(numbers, 1):
        axis.text(left + x * wide, low + (100 - y) * tall, str(number), ha="center", va="center", fontsize=8)
    axis.set_xlabel("forgetting: change of cross-entropy on general text (nats)")
    axis.set_ylabel("gain (points)")
    axis.grid(alpha=0.3)
    axis.legend(loc="center left", bbox_to_anchor=(1, 0.5), frameon=False, fontsize=8, handlelength=0, markerscale=0)
    return _png(figure)


def _losses(run: RunRecord) -> bytes:
    jobs = [job for job in run.jobs if job.train or any(job.evals.values())]
    columns = min(_COLUMNS, len(jobs))
    rows = -(-len(jobs) // columns)
    figure, axes = _subplots(rows, columns, 3.0 * columns, 2.0 * rows + 0.4)
    places = [one for line in axes for one in line]
    _, loss = loss_axes(jobs)
    for axis in places[len(jobs) :]:
        axis.remove()
    for axis, job in zip(places, jobs, strict=False):
        if job.train:
            axis.plot(*zip(*job.train, strict=True), color=_BLUE, lw=1.2, label="training")
        for number, (name, curve) in enumerate(job.evals.items()):
            if curve:
                label = _plain(f"evaluation {name}".strip())
                axis.plot(*zip(*curve, strict=True), "o-", ms=3, lw=0.8, color=f"C{number + 1}", label=label)
        axis.set_title(_plain(job.name), fontsize=9)
        axis.set_yscale("log" if loss.log else "linear")
        axis.set_ylim(loss.low, loss.high)
        axis.yaxis.set_major_formatter("{x:g}")
        axis.grid(alpha=0.3)
        axis.tick_params(labelsize=7)
    axes[0][0].legend(fontsize=7)
    figure.supxlabel("optimizer step", fontsize=9)
    figure.supylabel("loss per token", fontsize=9)
    return _png(figure)


def _plain(text: str) -> str:
    """A name as it is: between two dollars matplotlib would read mathematics."""
    return text.replace("$", "\\$")
