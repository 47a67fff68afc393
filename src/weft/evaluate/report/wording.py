"""How a report writes its figures, the same on the page, in Markdown and in the terminal."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass

from weft.evaluate.report.comparison import Comparison, Difference, Figure, is_general
from weft.evaluate.report.report import Cost, Report
from weft.evaluate.results import TaskRecord
from weft.numbers import duration, human_size

NONE = "–"
# The columns of what contestants cost, and how each is written.
COSTS: Mapping[str, Callable[[Cost], str]] = {
    "method": lambda cost: cost.method or NONE,
    "parameters": lambda cost: _or_none(cost.trainable_parameters, "{:,}".format),
    "file": lambda cost: _or_none(cost.bytes, lambda size: human_size(int(size))),
    "training": lambda cost: _or_none(cost.seconds, duration),
    "tokens/s": lambda cost: _or_none(cost.tokens_per_second, "{:,.0f}".format),
    "peak memory": lambda cost: _or_none(cost.peak_bytes, lambda size: human_size(int(size))),
    "tokens asked": lambda cost: _or_none(cost.prompt_tokens, "{:,.1f}".format),
    "tokens answered": lambda cost: _or_none(cost.answer_tokens, "{:,.1f}".format),
}


def _or_none(value: float | None, written: Callable[[float], str]) -> str:
    return NONE if value is None else written(value)


def costs_shown(report: Report) -> list[str]:
    """The columns in which anybody has a figure."""
    return [name for name, of in COSTS.items() if any(of(cost) != NONE for cost in report.costs)]


def costs_mean(report: Report) -> str:
    """What the columns mean."""
    shared = "Training time, speed and peak memory are those of a pass that all jobs of a run share."
    asked = " Tokens asked and answered are means of one item." if report.sheet.contestants else ""
    return (shared if report.runs else "") + asked


@dataclass(frozen=True)
class Scale:
    """How the figures of a task are written: shares in percent, others as they are."""

    task: TaskRecord
    percent: bool

    @property
    def unit(self) -> str:
        """What stands behind a figure."""
        return " %" if self.percent else ""

    @property
    def best(self) -> str:
        """The direction in which figures are better."""
        return "↑" if self.task.higher_is_better else "↓"

    def number(self, value: float) -> str:
        """A figure, without its unit."""
        return f"{100 * value:.1f}" if self.percent else f"{value:.3f}" if abs(value) < 100 else f"{value:,.1f}"

    def figure(self, figure: Figure) -> str:
        """A figure with its standard error."""
        error = "" if figure.stderr is None else f" ± {self.number(figure.stderr)}"
        return self.number(figure.value) + error

    def change(self, value: float) -> str:
        """A difference, with its sign; a true minus keeps columns straight."""
        text = self.number(abs(value))
        zero = not any(digit in "123456789" for digit in text)
        return f"{'±' if zero else '+' if value > 0 else '−'}{text}"

    def better(self, difference: Difference) -> bool | None:
        """Whether a difference is for the better; None if there is none or the items say otherwise than the figure."""
        if difference.value * difference.items_change <= 0:
            return None
        return (difference.value > 0) == self.task.higher_is_better

    def between(self, difference: Difference) -> str:
        """The 95 % interval of a difference."""
        if difference.low is None or difference.high is None:
            return NONE
        return f"{self.change(difference.low)} … {self.change(difference.high)}"


def scale(task: TaskRecord, comparison: Comparison) -> Scale:
    """The scale of a task's first metric."""
    values = [one.value for one in comparison.figures if one.task == task.name and math.isfinite(one.value)]
    return Scale(task, task.kind != "perplexity" and not is_general(task) and all(0 <= one <= 1 for one in values))


def p_value(p: float) -> str:
    """A p-value as people read it."""
    return "< 0.001" if p < 0.001 else f"{p:.3f}" if p < 0.1 else f"{p:.2f}"


def flips(difference: Difference) -> str:
    """How many items became right, and how many wrong; of other scores, how many rose and fell."""
    return f"+{len(difference.gained)} −{len(difference.lost)}"


def metric_of(task: TaskRecord) -> str:
    """A metric in words."""
    return task.metric.replace("_", " ")


def task_line(report: Report, task: TaskRecord) -> str:
    """What was asked, in a line."""
    count = max((one.n for one in report.comparison.figures if one.task == task.name), default=0)
    kind = "general text" if is_general(task) else task.kind.replace("_", " ")
    way = "higher is better" if task.higher_is_better else "lower is better"
    return f"{kind}, {count:,} items, {metric_of(task)}, {way}"


def losses(report: Report) -> Iterator[tuple[str, str, str, float | None, float | None, float | None, float | None]]:
    """Of each job: its name, its method, the set, and the first, the best and the last evaluation loss, the last train
    loss."""
    for run in report.runs:
        for job in run.jobs:
            name = job.name if len(report.runs) == 1 else f"{job.name} ({run.label})"
            train = job.train[-1][1] if job.train else None
            for of, curve in (job.evals or {"": ()}).items():
                values = [value for _, value in curve]
                ends = (values[0], min(values), values[-1]) if values else (None, None, None)
                yield (name, job.method, of, *ends, train)


def told(value: object) -> str:
    """A fact as text: what is no text as JSON writes it."""
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, default=str)


def how_to_evaluate(report: Report) -> str:
    """What to do where nothing was evaluated."""
    target = report.runs[0].path if report.runs else "RUN"
    return f"Nothing was evaluated yet. `weft eval {target} --tasks …` does, and this report then compares the answers."


def templates(report: Report) -> dict[str, list[str]]:
    """Template and end tokens as they were used -> the contestants that were asked so."""
    found: dict[str, list[str]] = {}
    for one in report.sheet.contestants.values():
        told = [f"{key}: {one.facts[key]}" for key in ("template", "stops") if one.facts.get(key)]
        if told:
            found.setdefault("\n".join(told), []).append(one.name)
    if not report.sheet.contestants:
        for run in report.runs:
            for job in run.jobs:
                told = [f"{k}: {v}" for k, v in (("template", job.template), ("stops", job.stops)) if v]
                if told:
                    found.setdefault("\n".join(told), []).append(job.name)
    return found
