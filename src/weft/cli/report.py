"""``weft report``: what a run or an evaluation found, as one page."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli import common, early, options
from weft.paths import local_path

if TYPE_CHECKING:
    from weft.evaluate.report.report import Report

Output = Annotated[
    Path | None,
    typer.Option(metavar="DIR", parser=local_path, help="Folder of the page, Markdown, JSON and pictures."),
]
Reference = Annotated[
    str | None, typer.Option(metavar="NAME", help="Compare with this contestant; default: with the base.")
]


def report(
    target: Annotated[
        Path, typer.Argument(metavar="RUN|RESULTS", parser=local_path, help="The folder of a run, or of results.")
    ],
    output: Output = None,
    reference: Reference = None,
    as_json: options.Json = False,
) -> int:
    """Report on a run: figures with errors, differences to the base, flips, costs, forgetting, losses.

    Writes report.html, report.md, report.json and pictures into --output (default: the folder report in the target).

    weft report runs/first
    """
    return tell([target], target / "report" if output is None else output, reference, as_json=as_json)


def tell(targets: list[Path], output: Path | None, reference: str | None, *, as_json: bool) -> int:
    """Make the report of these folders, write it if a folder is given, and show it."""
    early.refuse(lambda: _check(targets))
    from weft.evaluate.report.report import make_report
    from weft.evaluate.report.sources import find_sources
    from weft.evaluate.report.writing import write_report

    found = make_report(find_sources(targets), reference=reference)
    files = write_report(found, output) if output is not None else []
    if as_json:
        common.print_json(found.summary())
    else:
        _show(found)
    if files:
        common.say(f"wrote {files[0]}")
    return common.DONE


def _check(targets: list[Path]) -> None:
    from weft.evaluate.report.sources import find_sources

    find_sources(targets)


def _show(found: Report) -> None:
    from weft.cli.report_tables import show

    show(found, common.console())
