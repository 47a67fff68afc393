"""A report as Markdown."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence

from weft.evaluate.report.comparison import Figure
from weft.evaluate.report.report import Flip, Report
from weft.evaluate.report.wording import (
    COSTS,
    NONE,
    Scale,
    costs_mean,
    costs_shown,
    flips,
    how_to_evaluate,
    losses,
    metric_of,
    p_value,
    scale,
    task_line,
    templates,
    told,
)
from weft.evaluate.results import TaskRecord

_TEXT = 300  # characters of an answer
_FLIPS = 3  # each way


def markdown(report: Report, pictures: Sequence[str] = ()) -> str:
    """The whole text. ``pictures`` are names of files beside it."""
    lines = [f"# {_cell(report.title)}", ""]
    for task in report.sheet.tasks.values():
        lines += _task(report, task)
    if report.idle:
        lines += ["## Contestants that change nothing", "", *(f"- {_cell(k)}: {v}" for k, v in report.idle.items()), ""]
    if report.says:
        lines += ["## What the figures can and cannot say", "", *(f"- {_cell(one)}" for one in report.says), ""]
    if not report.sheet.contestants:
        lines += [how_to_evaluate(report), ""]
    lines += [*_forgetting(report), *_costs(report), *_losses(report), *_flips(report), *_settings(report)]
    for name in pictures:
        lines += [f"![{name.rsplit('.', 1)[0].replace('_', ' ')}]({name})", ""]
    if report.notes:
        lines += ["## Notes", "", *(f"- {_cell(one)}" for one in report.notes), ""]
    return "\n".join(lines)


def _task(report: Report, task: TaskRecord) -> Iterator[str]:
    own = [one for one in report.comparison.figures if one.task == task.name]
    if not own:
        return
    written = scale(task, report.comparison)
    yield from (f"## {_cell(task.name)}", "", f"{task_line(report, task)}.", "")
    head = [f"{metric_of(task)}{written.unit}", "Δ", "95 %", "p (Holm)", "flips", "test"]
    yield from _table(["contestant", *head], [[one.contestant, *_row(one, written)] for one in own])
    yield ""


def _row(figure: Figure, written: Scale) -> list[str]:
    one = figure.difference
    if one is None:
        return [written.figure(figure), NONE, NONE, NONE, NONE, NONE]
    shown = f"**{written.change(one.value)}**" if one.found else written.change(one.value)
    return [written.figure(figure), shown, written.between(one), p_value(one.p_holm), flips(one), one.test]


def _forgetting(report: Report) -> list[str]:
    if not report.forgetting:
        return []
    rows = [
        [one.contestant, one.task, f"{one.change:+.4f}" + (f" ± {one.stderr:.4f}" if one.stderr is not None else "")]
        for one in report.forgetting
    ]
    return ["## Forgetting", "", *_table(["contestant", "text", "Δ cross-entropy (nats)"], rows), ""]


def _costs(report: Report) -> list[str]:
    shown = costs_shown(report)
    if not shown:
        return []
    rows = [[cost.contestant, *(COSTS[name](cost) for name in shown)] for cost in report.costs]
    return ["## Costs", "", costs_mean(report), "", *_table(["contestant", *shown], rows), ""]


def _losses(report: Report) -> list[str]:
    rows = [
        [name, method, of or NONE, *(NONE if value is None else f"{value:.4f}" for value in values)]
        for name, method, of, *values in losses(report)
    ]
    head = ["job", "method", "set", "eval first", "eval best", "eval last", "train last"]
    return ["## Losses", "", *_table(head, rows), ""] if rows else []


def _flips(report: Report) -> Iterator[str]:
    groups: dict[tuple[str, str, bool], list[Flip]] = {}
    for flip in report.flips:
        groups.setdefault((flip.contestant, flip.task, flip.gained), []).append(flip)
    if groups:
        yield from ("## Items that came out otherwise", "")
    for (contestant, task, gained), found in groups.items():
        yield from (f"### {_cell(contestant)} on {_cell(task)}: {'gained' if gained else 'lost'}", "")
        rows = [
            [one.item, _end(one.asked), *map(_short, (one.expected, one.before, one.after))] for one in found[:_FLIPS]
        ]
        yield from (*_table(["item", "asked", "expected", "before", "after"], rows), "")


def _settings(report: Report) -> Iterator[str]:
    if not report.sheet.tasks:
        return
    yield from ("## Settings", "")
    for task in report.sheet.tasks.values():
        facts = "; ".join(f"{key}: {told(value)}" for key, value in task.facts.items())
        yield f"- task {_cell(task.name)}: {_cell(_short(facts))}"
    for label, facts_of in report.sheet.facts.items():
        yield f"- evaluation {_cell(label)}: {_cell(_short('; '.join(f'{k}: {told(v)}' for k, v in facts_of.items())))}"
    yield ""
    for text, names in templates(report).items():
        fence = "`" * max(3, 1 + max(map(len, re.findall("`+", text)), default=0))
        yield from (f"Template and end tokens of {_cell(', '.join(names))}:", "", fence, text, fence, "")


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> list[str]:
    lines = [head, ["---"] * len(head), *rows]
    return ["| " + " | ".join(map(_cell, line)) + " |" for line in lines]


def _short(text: str) -> str:
    return text if len(text) <= _TEXT else f"{text[:_TEXT]}…"


def _end(text: str) -> str:
    return text if len(text) <= _TEXT else f"…{text[-_TEXT:]}"


def _cell(text: str) -> str:
    """Text of a model in a table: what Markdown and HTML would read as their own is written out, pictures above all."""
    out = text.replace("\\", "\\\\").replace("|", "\\|").replace("[", "\\[").replace("<", "&lt;")
    out = out.replace("\r", " ").replace("\n", "<br>")
    return out.replace("`", "\\`") if out.count("`") % 2 else out
