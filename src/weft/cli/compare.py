"""``weft compare``: runs and evaluations beside each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli import options, report
from weft.errors import UserError
from weft.paths import local_path


def compare(
    targets: Annotated[
        list[Path],
        typer.Argument(metavar="RUN|RESULTS...", parser=local_path, help="Two or more folders of runs or results."),
    ],
    output: report.Output = None,
    reference: report.Reference = None,
    as_json: options.Json = False,
) -> int:
    """Compare runs and evaluations: every contestant on every task, with paired tests of the differences to the base.

    weft compare runs/a runs/b --output comparison
    """
    if len(targets) < 2:
        raise UserError(f"one folder cannot be compared. Name another one, or take `weft report {targets[0]}`.")
    return report.tell(list(targets), output, reference, as_json=as_json)
