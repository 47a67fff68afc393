"""``weft demo``: five methods, one frozen base, one pass; with the answers before and after."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated

import typer

from weft.cli import common, options
from weft.cli.session import Session

if TYPE_CHECKING:
    from rich.console import Console

    from weft.evaluate.demo import DemoResult
    from weft.training.run import Setup


def demo(
    model: Annotated[str, typer.Option(help="Base: tiny-llama or tiny-bloom (the instruction set is theirs).")] = (
        "tiny-llama"
    ),
    output_dir: Annotated[str, typer.Option(help="Folder of the run; a demo in it is replaced.")] = "runs/demo",
    steps: Annotated[int | None, typer.Option(min=1, help="Optimizer steps (default: 300).")] = None,
    as_json: options.Json = False,
    quiet: Annotated[bool, typer.Option("--quiet", "-q", help="No progress; only the result.")] = False,
) -> int:
    """Train five methods at once on an embedded base, and show what each has learned and forgotten."""
    from weft.evaluate.demo import STEPS, run_demo

    session = Session(quiet=quiet)

    def ready(setup: Setup) -> None:
        if not quiet:
            common.say(f"{len(setup.jobs)} methods over one frozen {model}; first the base answers by itself")
        session.begin(setup.jobs)

    with session.open():
        result = run_demo(
            model,
            output_dir,
            steps=steps or STEPS,
            on_event=session.event,
            on_ready=ready,
            should_stop=session.should_stop,
        )
    if result is None:
        return 128 + (session.received or 2)
    if as_json:
        common.print_json(asdict(result))
    else:
        show(result, common.console())
    return common.DONE


def show(result: DemoResult, console: Console) -> None:
    """Print the table and some answers."""
    from rich.table import Table

    table = Table(title=f"Five methods, one pass over one frozen {result.model}")
    for column in ("method", "trainable", "file", "exact match", "base text loss", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in result.rows:
        cells = (
            row.method,
            f"{row.trainable_parameters:,}",
            f"{row.file_bytes / 1024:.0f} KiB",
            f"{row.exact_match_before:.1%} → {row.exact_match_after:.1%}",
            f"{row.base_text_loss_change:+.3f}",
            f"{row.seconds:.1f}",
        )
        table.add_row(*cells)
    console.print(table)
    console.print(
        "exact match: greedy answers to held-out questions, base → adapter. base text loss: change of the loss per "
        "token on the base's own kind of text (what it forgot). seconds: of the shared pass while the job was in it.\n",
        style="dim",
    )
    best = max(result.rows, key=lambda row: row.exact_match_after).method
    answers = Table(title="Some held-out questions, before and after", show_lines=True)
    for column in ("question", "reference", "base", best):
        answers.add_column(column, overflow="fold")
    for sample in result.samples:
        answers.add_row(sample["question"], *(_short(sample[key]) for key in ("reference", "base", best)))
    console.print(answers)
    console.print(f"loss curves: {result.picture}")
    total = result.seconds["total"]
    console.print(f"{total:.0f} s in all, {result.seconds['training']:.0f} s of them training")
    console.print(f"talk to it:  weft chat {result.output_dir} --adapter {best}")


def _short(text: str) -> str:
    return text if len(text) <= 60 else text[:57] + "..."
