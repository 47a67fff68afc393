"""The matrix of ``architectures.py`` as Markdown: a summary, what is wrong, the matrix, the refusals' sentences."""

from __future__ import annotations

import platform
from collections import Counter
from collections.abc import Iterator, Mapping
from datetime import date
from importlib.metadata import version
from typing import Any

from benchmarks.architecture_configs import EXCEPTIONS, LENGTHS, VARIANTS

Cells = Mapping[str, Any]
KINDS = ("stream", "padded", "refused", "WRONG", "CRASH")
# The base has nothing that the column is about (experts).
NOTHING = "–"


def kind_of(outcome: str) -> str:
    """``stream``, ``padded``, ``refused``, ``WRONG`` or ``CRASH``."""
    return outcome.split(":")[0]


def report(found: Mapping[str, Cells], methods: list[str], command: str, seconds: float) -> tuple[str, int]:
    """The Markdown, and how many cells are WRONG or CRASH."""
    columns = ["base", *methods]
    made = {name: cells for name, cells in found.items() if "not_made" not in cells}
    counts = Counter(kind_of(o) for cells in made.values() for _, o, _ in each(cells, columns))
    bad = counts["WRONG"] + counts["CRASH"]
    lines = [*head(command, seconds), *summary(found, made, columns, counts), *faults(made, columns)]
    lines += [*matrix(made, columns), *not_made(found), *refusals(made, columns), *notes(made, columns)]
    lines += exceptions(made)
    return "\n".join(lines) + "\n", bad


def each(cells: Cells, columns: list[str]) -> Iterator[tuple[str, str, list[str]]]:
    """(column, outcome, notes); a process that died has no cell but its base's."""
    for column in columns:
        cell = cells.get(column, cells["base"])
        yield column, cell["outcome"], cell["notes"]


def head(command: str, seconds: float) -> list[str]:
    """What was run, where and with what."""
    libraries = ", ".join(f"{name} {version(name)}" for name in ("transformers", "torch", "peft"))
    return [
        "# Every causal language model of transformers through Weft",
        "",
        f"`{command}`, {date.today()}: {seconds / 60:.1f} minutes, all processes together. "
        f"{libraries}; Python {platform.python_version()}, "
        f"{platform.machine()}, float32, one thread a process.",
        "",
        f"Each configuration is a folder with random weights, none of them neutral. Texts of {LENGTHS} tokens; the "
        "truth is transformers' untouched model, one text at a time. `stream` and `padded`: all that is asked holds "
        "there (logits mixed and alone, loss, generation, identity at init, a gradient for every trained tensor, "
        "neighbours unchanged, merged and peft's logits where there are such, the model after `close`), to 1e-5 of the "
        "largest logit and ten times what float32 loses.",
        "",
    ]


def types_of(names: Any) -> set[str]:
    """The model types among names of configurations."""
    return {name.split(":")[0] for name in names}


def summary(
    found: Mapping[str, Cells], made: Mapping[str, Cells], columns: list[str], counts: Counter[str]
) -> list[str]:
    """Types, configurations and cells by outcome."""
    by_base = {kind: [n for n, c in made.items() if kind_of(c["base"]["outcome"]) == kind] for kind in KINDS}
    faulty = [n for n, c in made.items() if any(kind_of(o) in ("WRONG", "CRASH") for _, o, _ in each(c, columns))]
    rows = [f"| {kind} | {len(types_of(by_base[kind]))} | {len(by_base[kind])} | {counts[kind]} |" for kind in KINDS]
    return [
        f"**{len(types_of(found))} types, {len(found)} configurations; {len(types_of(made))} types, {len(made)} "
        f"configurations made tiny.** With a fault somewhere: {len(types_of(faulty))} types, {len(faulty)} "
        "configurations.",
        "",
        "| plain base | types | configurations | all cells |",
        "|---|---|---|---|",
        *rows,
        "",
    ]


def faults(made: Mapping[str, Cells], columns: list[str]) -> list[str]:
    """Every WRONG and CRASH, configurations with the same words together."""
    grouped: dict[str, dict[str, list[str]]] = {}
    for name, cells in made.items():
        for column, outcome, _ in each(cells, columns):
            if kind_of(outcome) in ("WRONG", "CRASH"):
                grouped.setdefault(name, {}).setdefault(outcome, []).append(column)
    if not grouped:
        return ["No cell is WRONG or CRASH.", ""]
    lines = ["## Wrong or crashed", ""]
    for name, outcomes in grouped.items():
        lines += [f"- `{name}` {', '.join(where)}: {plain(text)}" for text, where in outcomes.items()]
    return [*lines, ""]


def matrix(made: Mapping[str, Cells], columns: list[str]) -> list[str]:
    """A row per configuration."""
    lines = ["## The matrix", "", f"| configuration | {' | '.join(columns)} |", "|---" * (len(columns) + 1) + "|"]
    for name, cells in made.items():
        shown = [kind_of(outcome) for _, outcome, _ in each(cells, columns)]
        lines.append(f"| {name} | {' | '.join(f'**{s}**' if s.isupper() else s for s in shown)} |")
    return [*lines, ""]


def not_made(found: Mapping[str, Cells]) -> list[str]:
    """What cannot be made tiny, and why."""
    rows = [f"- `{name}`: {plain(cells['not_made'])}" for name, cells in found.items() if "not_made" in cells]
    return ["## Not made", "", *rows, ""] if rows else []


def refusals(made: Mapping[str, Cells], columns: list[str]) -> list[str]:
    """The sentences, each with where it was said."""
    lines = []
    for name, cells in made.items():
        said: dict[str, list[str]] = {}
        for column, outcome, _ in each(cells, columns):
            if kind_of(outcome) == "refused":
                said.setdefault(outcome.removeprefix("refused: "), []).append(column)
        for text, where in said.items():
            everywhere = "all" if len(where) == len(columns) else ", ".join(where)
            lines.append(f"- `{name}` {everywhere}: {plain(text)}")
    return ["## Refused", "", *lines, ""] if lines else []


def notes(made: Mapping[str, Cells], columns: list[str]) -> list[str]:
    """What could not be compared, the same words of many configurations in one line."""
    said: dict[str, list[str]] = {}
    for name, cells in made.items():
        for column, _, noted in each(cells, columns):
            for text in dict.fromkeys(noted):
                short = text.split("(")[0].replace(name.split(":")[0], "TYPE")
                said.setdefault(f"{column}: {short}", []).append(name)
    lines = [f"- {plain(text)} – {', '.join(dict.fromkeys(names))}" for text, names in said.items()]
    return ["## Not compared, not merged", "", *lines, ""] if lines else []


def exceptions(made: Mapping[str, Cells]) -> list[str]:
    """What the configurations hold besides what is derived."""
    lines = [f"- `{name}`: {EXCEPTIONS[name][1]}" for name in made if name in EXCEPTIONS]
    lines += [f"- `{name}`: `{VARIANTS[name]}`" for name in made if name in VARIANTS]
    return ["## Configurations that are not their class' defaults, made small", "", *lines, ""] if lines else []


def plain(text: str) -> str:
    """Text that stays in its line and in its cell."""
    return " ".join(text.replace("|", "\\|").split())
