"""``weft rollouts``: what a policy wrote, and what each answer was worth."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from weft.cli import common, options
from weft.errors import check_word
from weft.paths import local_path


def rollouts(
    run: Annotated[Path, typer.Argument(metavar="RUN", parser=local_path, help="The folder of a run.")],
    job: Annotated[str | None, typer.Option(help="A job of the run, if several write answers.")] = None,
    step: Annotated[int | None, typer.Option(help="The step that learned from them first; default: the last.")] = None,
    order: Annotated[str, typer.Option(help="written, best or worst: which answers come first.")] = "written",
    limit: Annotated[int, typer.Option(min=1, help="Show so many answers.")] = 40,
    html: Annotated[
        Path | None, typer.Option(metavar="FILE", parser=local_path, help="Write a page with all of them.")
    ] = None,
    as_json: options.Json = False,
) -> int:
    """Show the answers that a job wrote before a step, with their rewards.

    weft rollouts runs/grpo --order worst
    """
    check_word("--order", order, ("written", "best", "worst"))
    from weft.files.whole import write_text
    from weft.preview.rollouts import as_page, as_text, ordered, read_rollouts

    found = read_rollouts(run, job, step)
    rows = ordered(found.rows, order)
    if html is not None:
        write_text(html, as_page(found, rows))
        common.say(f"wrote {html}")
    if as_json:
        common.print_json({"job": found.job, "step": found.step, "rollouts": rows[:limit]})
    elif html is None:
        for line in as_text(found, rows[:limit]):
            print(line)
    return common.DONE
