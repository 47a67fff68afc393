"""A report in the terminal: a table for each task, then what must be said."""

from __future__ import annotations

from typing import TYPE_CHECKING

from rich.table import Table
from rich.text import Text

from weft.cli import common
from weft.evaluate.report.report import Report
from weft.evaluate.report.wording import NONE, flips, how_to_evaluate, losses, metric_of, p_value, scale, task_line

if TYPE_CHECKING:
    from rich.console import Console

    from weft.evaluate.report.comparison import Figure
    from weft.evaluate.report.wording import Scale
    from weft.evaluate.results import TaskRecord


def show(report: Report, out: Console) -> None:
    """Print it."""
    for task in report.sheet.tasks.values():
        _task(report, task, out)
    if not report.sheet.contestants:
        _losses(report, out)
        out.print(Text(how_to_evaluate(report)), soft_wrap=not out.is_terminal)
    for name, why in report.idle.items():
        out.print(Text(f"{name} is a no-op: {why}.", "bold red"), soft_wrap=not out.is_terminal)
    for line in (*report.says, *report.notes):
        out.print(Text(common.printable(line)), soft_wrap=not out.is_terminal)


def _task(report: Report, task: TaskRecord, out: Console) -> None:
    own = [one for one in report.comparison.figures if one.task == task.name]
    if not own:
        return
    written = scale(task, report.comparison)
    out.print(Text(common.printable(task.name), "bold"), Text(common.printable(task_line(report, task)), "dim"))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column("contestant", overflow="fold")
    for name in (f"{metric_of(task)}{written.unit}", "Δ", "p (Holm)", "flips"):
        table.add_column(name, justify="right", no_wrap=True)
    for one in own:
        table.add_row(Text(common.printable(one.contestant)), written.figure(one), *_difference(one, written))
    out.print(table)
    out.print()


def _difference(figure: Figure, written: Scale) -> tuple[Text, str, str]:
    one = figure.difference
    if one is None:
        return Text(NONE), NONE, NONE
    better = written.better(one) if one.found else None
    style = "dim" if better is None else "green" if better else "red"
    mark = "*" if one.found else " "
    turned = flips(one) if one.counted else NONE
    return Text(written.change(one.value) + mark, style), p_value(one.p_holm), turned


def _losses(report: Report, out: Console) -> None:
    rows = list(losses(report))
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    heads = ("job", "method", "set", "eval first", "eval best", "eval last", "train last")
    named = any(of for _, _, of, *_ in rows)
    kept = [number for number in range(len(heads)) if named or number != 2]
    for number in kept:
        table.add_column(heads[number], justify="right" if number > 2 else "left", overflow="fold")
    for name, method, of, *values in rows:
        cells = [name, method, of, *(NONE if value is None else f"{value:.4f}" for value in values)]
        table.add_row(*(Text(common.printable(cells[number])) for number in kept))
    out.print(table)
    out.print()
