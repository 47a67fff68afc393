"""The figures of an evaluation on a terminal: contestants in rows, the metrics of tasks in columns."""

from __future__ import annotations

from typing import TYPE_CHECKING

from weft.cli import common

if TYPE_CHECKING:
    from weft.evaluate.results import Results, Score

_CELL = 13  # characters of a figure with its error


def show_figures(results: Results) -> None:
    """Print one table, or one for each task where one would be too wide."""
    from rich.table import Table
    from rich.text import Text

    console = common.console()
    scores = {(one.contestant, one.task, one.metric): one for one in results.scores}
    columns = list(dict.fromkeys((one.task, one.metric) for one in results.scores))
    names = [one.name for one in results.contestants]
    counts = {(one.task, one.metric): one.n for one in results.scores}
    headings = {column: f"{column[0]} (n={counts[column]:,})\n{column[1]}" for column in columns}
    width = max(map(len, names), default=0) + sum(
        2 + max(_CELL, *map(len, heading.split("\n"))) for heading in headings.values()
    )
    tasks = dict.fromkeys(task for task, _ in columns)
    apart = [[column for column in columns if column[0] == task] for task in tasks]
    for group in [columns] if width <= console.width else apart:
        table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0), header_style="bold")
        table.add_column("contestant", overflow="fold")
        for task, metric in group:
            heading = Text(common.printable(headings[task, metric]))
            table.add_column(heading, justify="right", overflow="fold")
        for name in names:
            cells = [_cell(scores.get((name, *column))) for column in group]
            table.add_row(Text(common.printable(name)), *cells)
        console.print(table)


def _cell(score: Score | None) -> str:
    """A figure with its standard error."""
    if score is None:
        return "-"
    digits = 3 if abs(score.value) < 2 else 2
    error = "" if score.stderr is None else f" ± {score.stderr:.{digits}f}"
    return f"{score.value:.{digits}f}{error}"
