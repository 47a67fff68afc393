"""``weft preview --html``: one page with everything. It has no script and fetches nothing; all text is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from html import escape
from typing import Any

from weft.data.auditing.audit import grouped
from weft.data.auditing.base import Item
from weft.data.auditing.pieces import TokenText, pieces, visible
from weft.preview.text import place_of, rows_of, step_in_words, summary, text_of
from weft.preview.view import View

_LISTED = 50  # findings of a check
_PACKS = 16  # of the first step
_STYLE = """
:root { color-scheme: light dark; --back: #fff; --text: #1c1e21; --faint: #666d75; --line: #d8dce0; --panel: #f5f6f8;
  --learned: #0b6b2e; --learned-1: #d5f2dd; --learned-2: #bce8c9; --other-1: transparent; --other-2: #eceef1;
  --special: #8a1c8f; --error: #b3261e; --warning: #8a5a00; --bar: #5b8def; }
@media (prefers-color-scheme: dark) { :root { --back: #16181b; --text: #e4e6e9; --faint: #9aa2ab; --line: #363b42;
  --panel: #1f2226; --learned: #8fe3a8; --learned-1: #163a22; --learned-2: #1f4e2f; --other-2: #292d33;
  --special: #e59bea; --error: #ff9089; --warning: #f0c060; --bar: #4f7fdc; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem; max-width: 75rem; background: var(--back); color: var(--text);
  font: 15px/1.5 system-ui, sans-serif; }
h1 { font-size: 1.35rem; overflow-wrap: anywhere; } h2 { font-size: 1.1rem; margin-top: 2rem; }
h3 { font-size: 1rem; margin: 1.2rem 0 .3rem; overflow-wrap: anywhere; }
.faint { color: var(--faint); } .error { color: var(--error); } .warning { color: var(--warning); }
.ok { color: var(--learned); }
.tokens { padding: .7rem; background: var(--panel); border: 1px solid var(--line); border-radius: 6px;
  font: 13px/1.75 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
.t { border-radius: 2px; padding: 1px 0; color: var(--faint); } .t:nth-of-type(even) { background: var(--other-2); }
.l { color: var(--learned); font-weight: 600; background: var(--learned-1); }
.l:nth-of-type(even) { background: var(--learned-2); }
.s { color: var(--special); }
sup { font-size: 9px; color: var(--special); }
table { border-collapse: collapse; font-size: 13px; } td, th { padding: 2px 10px 2px 0; text-align: left;
  vertical-align: top; overflow-wrap: anywhere; }
th { font-weight: 600; color: var(--faint); } .n { text-align: right; white-space: nowrap; }
.list { font-family: ui-monospace, monospace; white-space: pre-wrap; } .list td { border-top: 1px solid var(--line); }
.list tr.on td { background: var(--learned-1); }
.bars td { padding: 0 8px 0 0; } .bar { display: inline-block; height: .8em; background: var(--bar); }
.pack { display: flex; height: 1.2rem; border: 1px solid var(--line); border-radius: 3px; overflow: hidden; }
.pack span { background: var(--bar); } .pack span:nth-of-type(even) { background: var(--learned-2); }
.wide { overflow-x: auto; } summary { cursor: pointer; color: var(--faint); margin: .4rem 0; }
.finding { margin: .25rem 0 .25rem 1rem; } code { overflow-wrap: anywhere; }
"""


def page(title: str, views: Sequence[View]) -> str:
    """The whole page."""
    return framed(f"weft preview: {title}", "".join(part for view in views for part in _view(view)))


def framed(title: str, body: str, style: str = "") -> str:
    """A page of this look. ``body`` is HTML, whose texts are escaped; ``style``: CSS besides."""
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        # Even if something passed the escaping, the browser would neither run nor fetch it.
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{escape(title)}</title><style>{_STYLE}{style}</style></head>\n"
        f"<body><h1>{escape(title)}</h1>\n{body}</body></html>\n"
    )


def _view(view: View) -> Iterator[str]:
    names = escape(", ".join(view.data_set.names))
    yield from _findings(view)
    for name, told in (*view.data_set.not_reached.items(), *view.data_set.notes.items()):
        yield f"<p>{escape(f'{name}: {told}')}</p>\n"
    for split, figures in view.figures.items():
        yield f"<h2>{split} data of {names}</h2>\n<table>"
        packings = view.packings if split == "train" else []
        for name, text in rows_of(figures, packings, view.data_set.renderer.max_length):
            yield f"<tr><th>{escape(name)}</th><td>{escape(text)}</td></tr>"
        yield f"</table>\n{_histogram(figures['histogram'])}\n"
    if view.shown:
        yield (
            '<h2>Samples</h2><p><span class="t l">learned tokens</span> <span class="t">other tokens</span> '
            '<span class="t s">special tokens</span> <span class="faint">⏎ line end, ⇥ tab; a weight besides 0 and 1 '
            "stands behind its token; in the table positions count from the sequence's own beginning</span></p>\n"
        )
    for item in view.shown:
        yield _item(item, view)
    for packing in view.packings:
        yield from _first_step(packing)


def _first_step(packing: dict[str, Any]) -> Iterator[str]:
    """The packs of the first step, drawn to scale."""
    yield f"<h2>Packs</h2><p>{escape(step_in_words(packing))}.</p>\n"
    packs = packing["first_step"]
    for number, pack in enumerate(packs[:_PACKS], start=1):
        parts, rows = [], []
        for one in pack:
            share = 100 * (one["end"] - one["begin"]) / packing["largest"]
            span, source = f"{one['begin']:,}–{one['end'] - 1:,}", escape(one["source"])
            parts.append(f'<span style="width:{share:.3f}%" title="rows {span}: {source}"></span>')
            rows.append(f'<tr><td class="n">{span}</td><td>{source}</td></tr>')
        yield (
            f'<p class="faint">pack {number}: {pack[-1]["end"]:,} tokens, {len(pack):,} sequences</p>'
            f'<div class="pack">{"".join(parts)}</div>\n<details><summary>sequences</summary>'
            f"<table><tr><th>rows</th><th>record</th></tr>{''.join(rows)}</table></details>\n"
        )
    if len(packs) > _PACKS:
        yield f'<p class="faint">… and {len(packs) - _PACKS:,} more packs; --json lists all</p>\n'


def _findings(view: View) -> Iterator[str]:
    style = "" if view.findings else ' class="ok"'
    yield f"<h2{style}>Audit: {summary(view.findings)}</h2>\n"
    for group in grouped(view.findings):
        kind, count = group.findings[0].severity, len(group.findings)
        yield (
            f'<h3><span class="{kind}">{kind}: {group.check.code}</span>{f" ({count:,})" if count > 1 else ""} '
            f'{escape(group.check.about)}</h3><p class="faint">Mend: {escape(group.findings[0].mend)}.</p>\n'
        )
        lines = []
        for finding in group.findings[:_LISTED]:
            place = f"<code>{escape(view.line(finding))}</code> " if finding.source else ""
            shown = f'<br><code class="faint">{escape(visible(finding.shown))}</code>' if finding.shown else ""
            lines.append(f'<div class="finding">{place}{escape(visible(finding.message))}{shown}</div>\n')
        yield "".join(lines[:3])
        if count > 3:
            more = f'<p class="faint">… and {count - _LISTED:,} more; --json lists all</p>' if count > _LISTED else ""
            yield f"<details><summary>{count - 3:,} more</summary>{''.join(lines[3:])}{more}</details>\n"


def _histogram(bars: Sequence[dict[str, Any]]) -> str:
    highest = max((bar["count"] for bar in bars), default=0)
    rows = (
        f'<tr><td class="n">{bar["from"]:,}–{bar["to"]:,}</td><td><span class="bar" '
        f'style="width:{20 * bar["count"] / highest:.2f}rem"></span> {bar["count"]:,}</td></tr>'
        for bar in bars
    )
    return f'<table class="bars">{"".join(rows)}</table>' if highest else ""


def _item(item: Item, view: View) -> str:
    label = f", label {escape(item.label)}" if item.label is not None else ""
    parts = [f"<h3>{escape(item.source)}{label}</h3>"]
    if item.problem is not None and not item.samples:
        text = escape(visible(item.text or item.shown))
        parts.append(f'<p class="error">Becomes no sample: {escape(visible(item.problem[1]))}</p>')
        parts.append(f'<div class="tokens">{text}</div>\n')
    for sample in item.samples:
        found, place = pieces(view.data_set.facts.tokenizer, sample), place_of(item, view, sample)
        learned = sum(bool(piece.weight) for piece in found)
        cut = f", cut from {len(sample.input_ids) + sample.cut:,}" if sample.cut else ""
        parts.append(
            f'<p class="faint">{len(found):,} tokens, {learned:,} learned{cut}{"; " * bool(place)}{place}</p>'
            f'<div class="tokens">{"".join(map(_token, found))}</div>\n'
            f"<details><summary>token by token</summary>{_table(found)}</details>\n"
        )
    return "".join(parts)


def _token(piece: TokenText) -> str:
    kind = f"t{' l' if piece.weight else ''}{' s' if piece.special else ''}"
    weight = f"<sup>{piece.weight:g}</sup>" if piece.weight not in (0.0, 1.0) else ""
    title = escape(f"position {piece.position}, id {piece.id}, weight {piece.weight:g}, token {visible(piece.token)}")
    text = escape(visible(piece.text))
    return f'<span class="{kind}" title="{title}">{text}{weight}</span>' + ("\n" if "\n" in piece.text else "")


def _table(found: Sequence[TokenText]) -> str:
    rows = []
    for piece in found:
        token, text = escape(visible(piece.token)), escape(text_of(piece))
        rows.append(
            f'<tr{" class=on" if piece.weight else ""}><td class="n">{piece.position}</td><td class="n">{piece.id}</td>'
            f'<td>{token}</td><td>{text}</td><td class="n">{piece.weight:g}</td></tr>'
        )
    head = "<tr><th>position</th><th>id</th><th>token</th><th>text</th><th>weight</th></tr>"
    return f'<div class="wide"><table class="list">{head}{"".join(rows)}</table></div>'
