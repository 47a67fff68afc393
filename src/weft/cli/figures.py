"""The figures of an evaluation on a terminal: contestants in rows, the metrics of tasks in columns."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING

from weft.cli import common

if TYPE_CHECKING:
    from weft.evaluate.results import Results, Score

ANSWERS = "answers"  # the folder in which answers are kept
_PAUSE = 10.0  # seconds between two lines that say how far it is
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


class Progress:
    """Says how far a task is, every ten seconds."""

    def __init__(self) -> None:
        self._told = time.monotonic()

    def __call__(self, task: str, done: int, total: int) -> None:
        if time.monotonic() - self._told >= _PAUSE and done < total:
            self._told = time.monotonic()
            common.say(f"{task}: {done:,} of {total:,} answers")


def tell(results: Results, folder: Path | None, as_json: bool) -> None:
    """Print the figures, and what must be said beside them."""
    if as_json:
        common.print_json(results.summary())
    else:
        show_figures(results)
    for one in results.contestants:
        if one.facts.get("largest_change") == 0:
            common.say(f"warning: '{one.name}' changes nothing: its logits are the base's own")
    if folder is not None:
        common.say(f"{len(results.items):,} answers -> {folder}")
    else:
        common.say("nothing is kept; --output FOLDER writes the results and keeps the answers")
