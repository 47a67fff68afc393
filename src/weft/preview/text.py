"""``weft preview`` in the terminal."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.table import Table
from rich.text import Text

from weft.data.auditing.audit import grouped
from weft.data.auditing.base import Finding, Item
from weft.data.auditing.pieces import TokenText, pieces, visible
from weft.data.rendering.sample import Sample
from weft.preview.view import View

_LISTED = 3  # findings of a check that are shown
_WIDEST = 120  # tokens in longer lines are hard to follow
_LINES = 60  # of one sample
_PACKS, _SEQUENCES = 4, 8  # of the first step
# Neighbouring tokens differ in colour, which shows where each begins.
_LEARNED, _UNLEARNED, _SPECIAL = ("bold green", "bold cyan"), ("dim", "bright_black"), ("magenta", "bold magenta")


def show(view: View, out: Console, *, tokens: bool = False) -> None:
    """Print samples, figures and findings of one data set, in this order: what matters most stands last."""
    renderer = view.data_set.renderer
    if view.shown:
        out.print(Text("learned tokens", "bold green"), Text("other tokens", "dim"), Text("special tokens", "magenta"))
    for item in view.shown:
        _sample(item, view, out, tokens)
    for packing in view.packings[:1]:  # those of the other jobs are in the page and in --json
        _first_step(packing, out)
    for split, figures in view.figures.items():
        out.print(Text(f"{split} data of {', '.join(view.data_set.names)}", "bold"))
        _figures(figures, view.packings if split == "train" else [], out, renderer.max_length)
    for name, told in (*view.data_set.not_reached.items(), *view.data_set.notes.items()):
        out.print(Text(f"{name}: {told}", "yellow"), soft_wrap=not out.is_terminal)
    _findings(view, out)


def _sample(item: Item, view: View, out: Console, tokens: bool) -> None:
    label = f"  label {item.label}" if item.label is not None else ""
    if item.problem is not None and not item.samples:
        out.print(Text(f"── {item.source}", "bold"))
        out.print(Text(f"becomes no sample: {visible(item.problem[1])}", "red"), soft_wrap=not out.is_terminal)
        out.print(Text(visible(item.text or item.shown)))
    for sample in item.samples:
        found = pieces(view.data_set.facts.tokenizer, sample)
        cut = f"  cut from {len(sample.input_ids) + sample.cut:,} tokens" if sample.cut else ""
        place = place_of(item, view, sample)
        head = (
            f"── {item.source}{label}  {sample.size} tokens, {sample.learned} learned{cut}{'  ' * bool(place)}{place}"
        )
        out.print(Text(head, "bold"), soft_wrap=not out.is_terminal)
        _lines(found, out)
        if tokens:
            _table(found, out)
    out.print()


def place_of(item: Item, view: View, sample: Sample) -> str:
    """When training reads a sample, in words."""
    place = view.place(sample)
    if place is not None:
        return f"step {place.step:,}, pack {place.pack}, rows {place.begin:,}–{place.end - 1:,}"
    if item.split == "eval":
        return f"to evaluate on: {item.eval_set}".removesuffix(": ")
    return "" if view.data_set.windows else "not in the first epoch"


def _first_step(packing: dict[str, Any], out: Console) -> None:
    """Draw the packs of the first step to scale, and list their sequences."""
    packs, width = packing["first_step"], min(out.width, _WIDEST) - 30
    out.print(Text(step_in_words(packing), "bold"))
    for number, pack in enumerate(packs[:_PACKS], start=1):
        bar, drawn = Text(), 0
        for place, one in enumerate(pack):
            until = round(width * one["end"] / packing["largest"])
            bar.append("█▒"[place % 2] * (until - drawn), ("cyan", "blue")[place % 2])
            drawn = until
        bar.append("·" * (width - drawn), "dim")
        out.print(Text(f"  pack {number:<3} ", "dim") + bar + Text(f" {pack[-1]['end']:,} tokens"), no_wrap=True)
        for one in pack[:_SEQUENCES]:
            rows = f"{one['begin']:,}–{one['end'] - 1:,}"
            out.print(Text(f"  {rows:>14}  {one['source']}", "dim"), soft_wrap=not out.is_terminal)
        if len(pack) > _SEQUENCES:
            out.print(Text(f"{'…':>16}  and {len(pack) - _SEQUENCES:,} more (--json lists all)", "dim"))
    if len(packs) > _PACKS:
        out.print(Text(f"  … and {len(packs) - _PACKS:,} more packs (--json lists all)", "dim"))
    out.print()


def step_in_words(packing: dict[str, Any]) -> str:
    """The contents of the first step."""
    packs = packing["first_step"]
    what = f"{count_of(sum(map(len, packs)), 'sequence')} in {count_of(len(packs), 'pack')}"
    return (
        f"first step of {', '.join(packing['jobs'])}: {what} of at most {packing['capacity']:,} tokens; none is cut, "
        "none padded, none sees another"
    )


def _lines(found: Sequence[TokenText], out: Console) -> None:
    width = min(out.width, _WIDEST)
    for number, (position, weight, text) in enumerate(laid_out(found, width - 16)):
        if number == _LINES:
            out.print(Text(f"… (tokens {position} to {len(found) - 1}: see --tokens, or --html)", "dim"))
            return
        margin = Text(f"{position:>6}  {f'{weight:g}' if weight else '·':>6}  ", "dim")
        out.print(margin + text, no_wrap=True, crop=False, overflow="ignore")


def laid_out(found: Sequence[TokenText], width: int) -> Iterator[tuple[int, float, Text]]:
    """Lines of at most ``width`` columns, each of one loss weight: (its first token's position, the weight, the text).

    A line ends with the token that holds a line end. A token that is wider than a line is broken.
    """
    line, start, weight = Text(), 0, 0.0
    for number, piece in enumerate(found):
        text = visible(piece.text)
        wide = line.cell_len + cell_len(text) > width
        if line.cell_len and (wide or piece.weight != weight or piece.position < start):
            yield start, weight, line
            line = Text()
        if not line.cell_len:
            start, weight = piece.position, piece.weight
        for part in _broken(text, width):
            if line.cell_len and line.cell_len + cell_len(part) > width:
                yield start, weight, line
                line, start = Text(), piece.position
            line.append(part, style_of(piece, number))
        if "\n" in piece.text:
            yield start, weight, line
            line = Text()
    if line.cell_len:
        yield start, weight, line


def _broken(text: str, width: int) -> list[str]:
    parts, part = [], ""
    for letter in text:
        if part and cell_len(part + letter) > width:
            parts.append(part)
            part = ""
        part += letter
    return [*parts, part]


def style_of(piece: TokenText, number: int) -> str:
    """The style of a token: learned ones stand out, special ones have their own colour."""
    if piece.special:
        return _SPECIAL[bool(piece.weight)]
    return (_LEARNED if piece.weight else _UNLEARNED)[number % 2]


def text_of(piece: TokenText) -> str:
    """A token's text, in which nothing is hidden."""
    return visible(piece.text) if piece.text else "(part of a character)" if piece.part else ""


def _table(found: Sequence[TokenText], out: Console) -> None:
    table = Table(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for heading in ("position", "id", "weight"):
        table.add_column(heading, justify="right", no_wrap=True)
    for heading in ("token", "text"):
        table.add_column(heading, overflow="fold")
    for number, piece in enumerate(found):
        row = (str(piece.position), str(piece.id), f"{piece.weight:g}" if piece.weight else "·")
        table.add_row(*map(Text, row), Text(visible(piece.token)), Text(text_of(piece)), style=style_of(piece, number))
    out.print(table)


# -------------------------------------------------------------------------------------------------------------- figures


def _figures(figures: dict[str, Any], packings: Sequence[dict[str, Any]], out: Console, limit: int | None) -> None:
    table = Table(box=None, show_header=False, pad_edge=False, padding=(0, 2, 0, 0))
    table.add_column(no_wrap=True, style="dim")
    table.add_column(overflow="fold")
    for name, text in rows_of(figures, packings, limit):
        table.add_row(Text(name), Text(text))
    out.print(table)
    highest = max((bar["count"] for bar in figures["histogram"]), default=0)
    for bar in figures["histogram"]:
        length = max(1, round(40 * bar["count"] / highest)) if bar["count"] else 0
        out.print(Text(f"{bar['from']:>6}–{bar['to']:<6} {'█' * length:<40} {bar['count']:,}"), no_wrap=True)
    out.print()


def rows_of(
    figures: dict[str, Any], packings: Sequence[dict[str, Any]], limit: int | None
) -> Iterator[tuple[str, str]]:
    """The figures as (name, text), for the terminal and for the page."""
    unusable = f", {figures['unusable']:,} of them unusable" if figures["unusable"] else ""
    left_out = "".join(f", {count:,} {why}" for why, count in figures.get("left_out", {}).items())
    yield "records", f"{figures['records']:,}{unusable}{left_out}"
    if figures["lengths"]:
        marks = ", ".join(f"{name} {value:,}" for name, value in figures["lengths"].items())
        yield "length in tokens", f"{marks}{f' (max_length {limit:,})' if limit else ''}"
    yield (
        "tokens",
        f"{figures['tokens']:,}, learned {figures['learned_tokens']:,} ({_percent(figures['learned_share'])})",
    )
    weights = {weight: count for weight, count in figures["weights"].items() if weight not in ("0", "1")}
    if weights:
        yield "other weights", ", ".join(f"{weight}: {count:,} tokens" for weight, count in weights.items())
    for packing in packings:
        whose = f" of {', '.join(packing['jobs'])}" if len(packings) > 1 else ""
        yield f"packs{whose}", _packs(packing)
        yield f"padding saved{whose}", _saved(packing)
    yield "cut", f"{figures['truncated']:,}"
    yield "duplicates", f"{figures['duplicates']:,} exact, {figures['near_duplicates']:,} near"
    counted = sum(figures["languages"].values())
    yield "languages", ", ".join(f"{n} {_percent(count / counted)}" for n, count in figures["languages"].items())
    if "labels" in figures:
        ranked = list(figures["labels"].items())
        more = f", and {len(ranked) - 10} more" if len(ranked) > 10 else ""
        yield "labels", ", ".join(f"{label}: {count:,}" for label, count in ranked[:10]) + more
    for file, found in figures["sources"].items():
        yield "source", f"{file}: {count_of(found['records'], 'record')}, {found['tokens']:,} tokens"


def _packs(packing: dict[str, Any]) -> str:
    packs, steps = count_of(packing["packs"], "pack"), count_of(packing["steps"], "step")
    return f"{packs} of at most {packing['capacity']:,} tokens in {steps} an epoch, {_percent(packing['fill'])} full"


def _saved(packing: dict[str, Any]) -> str:
    held = f"batches of {packing['batch_size']}" if packing["batch_size"] else "packs padded to their longest"
    padding = packing["padding"]
    return f"{padding['tokens']:,} pad tokens ({_percent(padding['share'])}) that {held} would hold"


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"


# ------------------------------------------------------------------------------------------------------------- findings


def _findings(view: View, out: Console) -> None:
    for group in grouped(view.findings):
        kind = group.findings[0].severity
        colour = "bold red" if kind == "error" else "bold yellow"
        head = Text.assemble((f"{kind}: {group.check.code}", colour), f"  {group.check.about}")
        count = Text(f"  {len(group.findings):,}×" if len(group.findings) > 1 else "", colour)
        out.print(head + count, soft_wrap=not out.is_terminal)
        for finding in group.findings[:_LISTED]:
            line = Text(f"  {place + ': ' if (place := view.line(finding)) else ''}{visible(finding.message)}")
            out.print(line, soft_wrap=not out.is_terminal)  # a search finds a whole line in a file
            if finding.shown:
                shown = Text(f"    {visible(finding.shown)}", "dim")
                shown.truncate(out.width, overflow="ellipsis")
                out.print(shown, no_wrap=True)
        if len(group.findings) > _LISTED:
            out.print(Text(f"  … and {len(group.findings) - _LISTED:,} more (--json lists all)", "dim"))
        out.print(Text(f"  mend: {group.findings[0].mend}.", "italic"), soft_wrap=not out.is_terminal)
    errors = any(finding.severity == "error" for finding in view.findings)
    colour = "bold red" if errors else "bold yellow" if view.findings else "bold green"
    out.print(Text(f"audit: {summary(view.findings)}", colour))


def summary(findings: Sequence[Finding]) -> str:
    """``2 errors, 1 warning``."""
    errors = sum(finding.severity == "error" for finding in findings)
    what = f"{count_of(errors, 'error')}, {count_of(len(findings) - errors, 'warning')}"
    return what if findings else "nothing found"


def count_of(number: int, what: str) -> str:
    """``2 errors``, ``1 error``."""
    return f"{number:,} {what}{'s' * (number != 1)}"
