"""``weft demo``: five methods, one frozen base, one pass; with the answers before and after."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.table import Table

if TYPE_CHECKING:
    from weft.evaluate.demo import DemoResult


def show(result: DemoResult, console: Console) -> None:
    """Print the table and some answers."""
    table = Table(title=f"Five methods, one pass over one frozen {result.model}")
    for column in ("method", "trainable", "file", "exact match", "base text loss", "seconds"):
        table.add_column(column, justify="left" if column == "method" else "right")
    for row in result.rows:
        table.add_row(
            row.method,
            f"{row.trainable_parameters:,}",
            f"{row.file_bytes / 1024:.0f} KiB",
            f"{row.exact_match_before:.1%} → {row.exact_match_after:.1%}",
            f"{row.base_text_loss_change:+.3f}",
            f"{row.seconds:.1f}",
        )
    console.print(table)
    console.print(
        "exact match: greedy answers to held-out questions, base → adapter. base text loss: change of the loss per token "
        "on the base's own kind of text (what it forgot). seconds: of the shared pass while the job was in it.\n",
        style="dim",
    )
    answers = Table(title="Some held-out questions", show_lines=True)
    answers.add_column("question")
    for column in ("reference", "base", *(row.method for row in result.rows)):
        answers.add_column(column, overflow="fold")
    for sample in result.samples:
        short = [sample[c] if len(sample[c]) <= 60 else sample[c][:57] + "…" for c in list(sample)[1:]]
        answers.add_row(sample["question"], *short)
    console.print(answers)
    console.print(f"loss curves: {result.picture}")
    console.print(f"talk to it:  weft chat {result.output_dir} --adapter {result.rows[0].method}")


def as_json(result: DemoResult) -> dict[str, object]:
    """The machine-readable result."""
    return asdict(result)
