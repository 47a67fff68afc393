"""Write docs/methods.md from the methods' own docstrings and the measured table.

    python benchmarks/methods.py --output benchmarks/results/methods.json
    python benchmarks/methods.py --speed --output benchmarks/results/methods_speed.json
    python benchmarks/methods_on_alpaca.py --output benchmarks/results/methods_alpaca.json
    python tools/methods_page.py > docs/methods.md
"""

from __future__ import annotations

import inspect
import json
from pathlib import Path
from typing import Any

from weft.assets import EMBEDDED_MODELS
from weft.methods import METHODS

RESULTS = Path(__file__).parents[1] / "benchmarks" / "results"
_INTRO = """\
# The methods

<!-- Written by `python tools/methods_page.py`; a test compares. Do not edit. -->

Every method with its default settings and its default learning rate, on the two embedded bases (a million
parameters, width 128): {steps} steps of {batch_size} instructions, all methods at once in one pass per base, one
seed. Exact match is that of greedy answers to 200 held-out questions; *forgets* is how much the loss per token rises
on held-out text of the kind the base was pre-trained on. *Memory* is what training adds to the base: the numbers,
their gradients and two moments, and the activations of one step. *Speed* is tokens per CPU second beside LoRA's, each
alone, by turns. Made by `benchmarks/methods.py` on {date}.

These are small models and one kind of task: the table says that the defaults work and what each method costs, not which
is best for yours. `weft train` with your data and `method: [lora, bitfit, …]` answers that, in one pass.

"""


_ALPACA = """\
## On real instructions

stories260K (260,032 parameters, width 64, pre-trained on TinyStories) after {steps} steps of {batch_size} records of
Alpaca, all methods at once with their defaults. Far too small to answer anything, so the figures are losses per token:
on 100 held-out records (learned tokens only), and on C4, which is neither's kind of text and gains too, for the base
knew children's stories only. Made by `benchmarks/methods_on_alpaca.py` on {date}.

| method | parameters | learning rate | held-out Alpaca | C4 |
|---|---|---|---|---|"""


def page(table: dict[str, Any], speed: dict[str, Any], alpaca: dict[str, Any]) -> str:
    """The whole page."""
    parts = [_INTRO.format(**table)]
    for model in EMBEDDED_MODELS:
        parts.append(f"## On {model}\n")
        parts.append("| method | parameters | file | exact match | forgets | memory | speed |")
        parts[-1] += "\n|---|---|---|---|---|---|---|"
        for row in table[model]:
            parts.append(_row(row, speed.get(model, {}).get(row["job"], {})))
        parts.append("")
    parts.append(_ALPACA.format(**alpaca))
    parts += map(_loss_row, alpaca["rows"])
    parts.append("")
    parts.append("## What each one trains\n")
    for name, cls in METHODS.items():
        text = " ".join((inspect.getdoc(inspect.getmodule(cls)) or "").split("\n\n")[0].split())
        small, large = cls.learning_rate(128), cls.learning_rate(2048)
        rate = f"{small:g}" if small == large else f"{large:g} at width 2048 and more, {small:g} at 128 and less"
        parts.append(f"**`{name}`**: {text.replace('``', '`')} Learning rate: {rate}.\n")
    return "\n".join(parts)


def _row(row: dict[str, Any], speed: dict[str, float]) -> str:
    name = f"`{row['job']}`" if row["job"] else "(the base)"
    if not row["job"]:
        return f"| {name} | | | {row['exact_match']:.1%} | | | |"
    cells = [
        name,
        f"{row['parameters']:,}",
        f"{row['file_bytes'] / 1024:,.0f} KiB",
        f"{row['exact_match']:.1%}",
        f"{row['text_loss_change']:+.2f}",
        f"{speed['training_mb']:.1f} MiB" if speed else "",
        f"{speed['speed_of_lora']:.2f}" if speed else "",
    ]
    return "| " + " | ".join(cells) + " |"


def _loss_row(row: dict[str, Any]) -> str:
    trained = f"{row['parameters']:,} | {row['learning_rate']:.2g}" if row["job"] else " | "
    name = f"`{row['job']}`" if row["job"] else "(the base)"
    return f"| {name} | {trained} | {row['eval_loss']:.2f} | {row['text_loss']:.2f} |"


def results() -> tuple[dict[str, Any], ...]:
    """What ``page`` is made of."""
    return tuple(json.loads((RESULTS / f"methods{which}.json").read_text()) for which in ("", "_speed", "_alpaca"))


def main() -> None:
    print(page(*results()), end="")


if __name__ == "__main__":
    main()
