"""The plots of a report's page: figures with their errors, gain against forgetting, losses."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from html import escape

from weft.evaluate.report.comparison import Figure
from weft.evaluate.report.report import Report
from weft.evaluate.report.runs import JobRecord, RunRecord
from weft.evaluate.report.svg import Axis, Point, axis_of, curves, interval, scale_row, scatter
from weft.evaluate.report.wording import Scale, metric_of, scale, task_line
from weft.evaluate.results import TaskRecord
from weft.evaluate.statistics import Z95


def dot_plots(report: Report) -> Iterator[str]:
    """A panel for each task: every figure with its 95 % interval, the best first, a line where the reference lies."""
    panels = [_panel(report, task) for task in report.sheet.tasks.values()]
    if any(panels):
        yield "<section><h2>Figures with their errors</h2>\n"
        yield (
            '<p class="lead">Dots are figures, bars their own 95 % intervals, the dashed line is the reference. Two '
            "bars may overlap although the paired difference is certain: what makes an item hard cancels out in it. "
            '<span class="good">Green</span> is better than the reference by the corrected test, '
            '<span class="bad">red</span> is worse.</p>\n'
        )
        yield f'<div class="panels">{"".join(panels)}</div></section>\n'


def _panel(report: Report, task: TaskRecord) -> str:
    own = sorted(
        (one for one in report.comparison.figures if one.task == task.name and math.isfinite(one.value)),
        key=lambda one: -one.value if task.higher_is_better else one.value,
    )
    if not own:
        return ""
    written = scale(task, report.comparison)
    ends = [one.value + sign * Z95 * (one.stderr or 0) for one in own for sign in (-1, 1)]
    axis = axis_of([min(max(end, 0.0), 1.0) for end in ends] if written.percent else ends)
    rows = "".join(_row(report, one, written, axis) for one in own)
    return (
        f'<div class="panel"><h3>{escape(task.name)}</h3><p class="faint">{escape(task_line(report, task))}</p>{rows}'
        f'<div class="row"><span></span>{scale_row(axis, written.percent)}<span class="n faint">{written.unit}</span>'
        "</div></div>\n"
    )


def _row(report: Report, figure: Figure, written: Scale, axis: Axis) -> str:
    difference = figure.difference
    base = report.comparison.figure(difference.reference, figure.task) if difference is not None else None
    better = written.better(difference) if difference is not None and difference.found else None
    kind = "base" if difference is None else "" if better is None else "good" if better else "bad"
    text, half = written.figure(figure), Z95 * (figure.stderr or 0)
    reference = figure.value if base is None and difference is None else base.value if base is not None else None
    drawn = interval(
        axis, figure.value, half, reference, label=f"{figure.contestant}: {text}{written.unit}", kind=kind
    )  # fmt: skip
    name = escape(figure.contestant)
    return f'<div class="row"><span title="{name}">{name}</span>{drawn}<span class="n">{text}</span></div>'


def trade_plot(report: Report) -> Iterator[str]:
    """Gain against forgetting, with the names beside it."""
    if len(report.trades) < 2:
        return
    kinds = {name: "prompt" if one.kind == "prompt" else "" for name, one in report.sheet.contestants.items()}
    kinds |= dict.fromkeys(report.idle, "idle")
    ordered = sorted(report.trades, key=lambda one: -one.gain)
    points = [
        Point(one.forgetting, one.gain, number,
              label=f"{one.contestant}: {100 * one.gain:+.1f} points, {one.forgetting:+.3f}",
              kind=kinds[one.contestant])
        for number, one in enumerate(ordered, 1)
    ]  # fmt: skip
    rows = "".join(
        f'<tr><td class="n">{point.number}</td><td>{escape(one.contestant)}</td>'
        f'<td class="n">{100 * one.gain:+.1f}</td><td class="n">{one.forgetting:+.3f}</td></tr>'
        for point, one in zip(points, ordered, strict=True)
    )
    tasks = ", ".join(dict.fromkeys(task for one in ordered for task in one.tasks))
    texts = ", ".join(dict.fromkeys(one.task for one in report.forgetting))
    drawn = scatter(
        points, x_label=f"forgetting: change of cross-entropy on {texts} (nats) →", y_label="↑ gain (points)",
        x_percent=False, y_percent=True,
    )  # fmt: skip
    yield (
        "<section><h2>Gain against forgetting</h2>\n"
        f'<p class="lead">Up is gained on {escape(tasks)} (the mean), right is lost on general text. Good is the upper '
        f"left.</p>\n"
        f'<div class="plot"><div>{drawn}</div><table class="key"><tr><th class="n">#</th><th>contestant</th>'
        f'<th class="n">gain</th><th class="n">forgetting</th></tr>{rows}</table></div></section>\n'
    )


def loss_curves(report: Report) -> Iterator[str]:
    """Small plots of the losses of every job, all of one run on the same axes."""
    for run in report.runs:
        drawn = [job for job in run.jobs if job.train or any(job.evals.values())]
        if not drawn:
            continue
        x, y = loss_axes(drawn)
        name = "" if len(report.runs) == 1 else f" of {escape(run.label)}"
        sets = list(dict.fromkeys(of for job in drawn for of in job.evals))
        yield f'<section><h2>Losses{name}</h2>\n<p class="lead">{_legend(sets, y)}</p>\n<div class="many">'
        for job in drawn:
            last = "; ".join(f"{f'{of} ' if of else ''}{curve[-1][1]:.3f}" for of, curve in job.evals.items() if curve)
            told = f"last evaluation {last}" if last else f"last training loss {job.train[-1][1]:.3f}"
            yield (
                f'<div class="panel"><h3>{escape(job.name)}</h3><p class="faint">{escape(told)}</p>'
                f"{curves(job.train, [job.evals.get(of, ()) for of in sets], x, y)}</div>\n"
            )
        yield "</div></section>\n"


def _legend(sets: Sequence[str], y: Axis) -> str:
    names = "".join(
        f'<span class="swatch" style="background: var(--eval-{number % 4})"></span>'
        f"evaluation{escape(f' {of}' if of else '')}"
        for number, of in enumerate(sets)
    )
    scaled = " The axis is logarithmic." if y.log else ""
    return (
        f'Loss per token over the optimizer steps, the same axes for all.{scaled}<br><span class="swatch" '
        f'style="background: var(--accent); margin-left: 0"></span>training{names}'
    )


def loss_axes(jobs: Sequence[JobRecord]) -> tuple[Axis, Axis]:
    """The axes, steps and loss, that hold the losses of all jobs; by logarithm where they differ much."""
    points = [point for job in jobs for curve in (job.train, *job.evals.values()) for point in curve]
    values = [value for _, value in points]
    log = min(values) > 0 and max(values) > 5 * min(values)
    return Axis(min(step for step, _ in points), max(step for step, _ in points)), axis_of(values, log=log)


def settings_of(run: RunRecord) -> Iterator[tuple[str, str]]:
    """What a run was trained with, a line for each job: what all have in common stands once."""
    yield from ((key, str(value)) for key, value in {"model": run.model, **run.settings}.items())
    jobs = [dict(job.settings) for job in run.jobs]
    common = (
        {key: value for key, value in jobs[0].items() if all(key in one and one[key] == value for one in jobs)}
        if jobs
        else {}
    )
    if common:
        yield "all jobs", ", ".join(f"{key} {value}" for key, value in common.items())
    for job in run.jobs:
        own = ", ".join(f"{key} {value}" for key, value in job.settings.items() if key not in common)
        yield job.name, f"{job.method}{': ' if own else ''}{own}"


__all__ = ["dot_plots", "loss_curves", "metric_of", "settings_of", "trade_plot"]
