"""A report as one page. It has no script and fetches nothing; all text is escaped."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from html import escape

from weft.evaluate.report.comparison import Difference, Figure
from weft.evaluate.report.plots import dot_plots, loss_curves, settings_of, trade_plot
from weft.evaluate.report.report import FLIPS, Flip, Report
from weft.evaluate.report.style import STYLE
from weft.evaluate.report.wording import (
    COSTS,
    NONE,
    Scale,
    costs_mean,
    costs_shown,
    flips,
    how_to_evaluate,
    losses,
    metric_of,
    p_value,
    scale,
    task_line,
    templates,
    told,
)
from weft.preview.html import framed
from weft.version import __version__

_TEXT = 2_000  # characters of a text of an item


def page(report: Report) -> str:
    """The whole page."""
    parts = [
        _lead(report), _alarms(report), _figures(report), _says(report), _notes(report), dot_plots(report),
        trade_plot(report), _losses(report), _costs(report), loss_curves(report), _flips(report), _others(report),
        _settings(report),
    ]  # fmt: skip
    return framed(f"weft report: {report.title}", "".join(piece for part in parts for piece in part), STYLE)


def _lead(report: Report) -> Iterator[str]:
    facts = []
    if report.sheet.contestants:
        facts.append(f"{len(report.sheet.contestants)} contestants, {len(report.sheet.tasks)} tasks")
    bases = dict.fromkeys(run.model for run in report.runs)
    bases |= {told(one["base"]): None for one in report.sheet.facts.values() if one.get("base")}
    if bases:
        facts.append(f"base {', '.join(bases)}")
    facts.append(f"Weft {__version__}")
    yield f'<p class="lead">{escape(" · ".join(facts))}</p>\n'
    if not report.sheet.contestants:
        yield f'<p class="alarm">{_code(how_to_evaluate(report))}</p>\n'


def _alarms(report: Report) -> Iterator[str]:
    for name, why in report.idle.items():
        yield f'<p class="alarm"><b>{escape(name)}</b> is a no-op: {escape(why)}.</p>\n'


def _code(text: str) -> str:
    """Text with the parts between backticks as code."""
    pieces = escape(text).split("`")
    return "".join(f"<code>{piece}</code>" if number % 2 else piece for number, piece in enumerate(pieces))


# -------------------------------------------------------------------------------------------------------------- figures


def _figures(report: Report) -> Iterator[str]:
    """One row for each contestant, one group of cells for each task."""
    shown = {one.task for one in report.comparison.figures}
    tasks = [task for task in report.sheet.tasks.values() if task.name in shown]
    if not tasks:
        return
    scales = {task.name: scale(task, report.comparison) for task in tasks}
    found = {(one.contestant, one.task): one for one in report.comparison.figures}
    head = "".join(
        f'<th class="n task" title="{escape(task_line(report, task))}">{escape(task.name)} {scales[task.name].best}'
        f"<small>{escape(metric_of(task))}{scales[task.name].unit}</small></th>"
        "<th class=n>Δ<small>p, flips</small></th>"
        for task in tasks
    )
    rows = "".join(
        f"<tr><th>{_name(report, name)}</th>"
        + "".join(
            _cells(found.get((name, task.name)), scales[task.name], _leads(report, name, task.name)) for task in tasks
        )
        + "</tr>\n"
        for name in report.sheet.contestants
    )
    references = ", ".join(
        dict.fromkeys(one.difference.reference for one in report.comparison.figures if one.difference)
    )
    beside = f"Δ is the paired difference to <b>{escape(references)}</b>. " if references else ""
    yield (
        f'<section><h2>Who is best</h2>\n<p class="lead">± is the standard error. {beside}A Δ in colour is found at '
        "5 % after Holm's correction for all tests of this page; p is corrected. Flips: items that became right (+) "
        "and wrong (−). ★ has the best figure, ☆ is not told from it by these items.</p>\n"
        f'<div class="wide"><table class="figures"><thead><tr><th>contestant</th>{head}</tr></thead>'
        f"<tbody>{rows}</tbody></table></div></section>\n"
    )


def _name(report: Report, name: str) -> str:
    one = report.sheet.contestants[name]
    method = str(one.facts.get("method") or ("" if one.kind == "adapter" else one.kind))
    badge = '<span class="badge bad">no-op</span>' if name in report.idle else ""
    below = f"<small>{escape(method)}</small>" if method and method != name else ""
    return f"{_broken(name)}{badge}{below}"


def _broken(name: str) -> str:
    """A name that may be broken where its words end."""
    return escape(name).replace("_", "_<wbr>").replace("/", "/<wbr>")


def _leads(report: Report, name: str, task: str) -> str:
    for one in report.comparison.leaders:
        if one.task == task:
            return "★ " if name == one.best else "☆ " if name in one.near else ""
    return ""


def _cells(figure: Figure | None, written: Scale, star: str) -> str:
    if figure is None:
        return f'<td class="n task faint">{NONE}</td><td></td>'
    error = f"<small>± {written.number(figure.stderr)}</small>" if figure.stderr is not None else ""
    cell = f'<td class="n task"><span class="faint">{star}</span><b>{written.number(figure.value)}</b>{error}</td>'
    return cell + (_difference(figure.difference, written) if figure.difference is not None else "<td></td>")


def _difference(one: Difference, written: Scale) -> str:
    better = written.better(one) if one.found else None
    kind = "faint" if better is None else "good" if better else "bad"
    between = f"95 %: {written.between(one)}; {one.test}; {one.n:,} items"
    p, turned = p_value(one.p_holm), f" · {flips(one)}" if one.counted else ""
    return (
        f'<td class="n" title="{escape(between)}"><span class="{kind}">{written.change(one.value)}</span>'
        f"<small>p {p if p[0] == '<' else f'= {p}'}{turned}</small></td>"
    )


def _says(report: Report) -> Iterator[str]:
    if report.says:
        lines = "".join(f"<li>{escape(one)}</li>" for one in report.says)
        yield f'<section><h2>What the figures can and cannot say</h2>\n<ul class="says">{lines}</ul></section>\n'


def _others(report: Report) -> Iterator[str]:
    """The metrics that come second, without tests."""
    groups: dict[str, dict[str, dict[str, Figure]]] = {}
    for one in report.comparison.others:
        groups.setdefault(one.task, {}).setdefault(one.contestant, {})[one.metric] = one
    if not groups:
        return
    yield '<section><h2>Other metrics</h2>\n<p class="lead">Not tested: more tests would make each one weaker.</p>\n'
    for task, rows in groups.items():
        metrics = list(dict.fromkeys(metric for row in rows.values() for metric in row))
        head = "".join(f'<th class="n">{escape(metric)}</th>' for metric in metrics)
        lines = "".join(
            f"<tr><th>{_broken(name)}</th>"
            + "".join(f'<td class="n">{_plain(row.get(m))}</td>' for m in metrics)
            + "</tr>"
            for name, row in rows.items()
        )
        yield (
            f'<details><summary>{escape(task)}: {escape(", ".join(metrics))}</summary><div class="wide">'
            f'<table class="figures narrow"><thead><tr><th>contestant</th>{head}</tr></thead><tbody>{lines}</tbody>'
            "</table></div></details>\n"
        )
    yield "</section>\n"


def _plain(figure: Figure | None) -> str:
    if figure is None:
        return NONE
    return f"{figure.value:.4f}" + (f" ± {figure.stderr:.4f}" if figure.stderr is not None else "")


# ----------------------------------------------------------------------------------------------------- costs and losses


def _costs(report: Report) -> Iterator[str]:
    shown = costs_shown(report)
    if not shown:
        return
    head = "".join(f"<th{'' if name == 'method' else ' class=n'}>{escape(name)}</th>" for name in shown)
    rows = "".join(
        f"<tr><th>{_broken(cost.contestant)}</th>"
        + "".join(f"<td{'' if name == 'method' else ' class=n'}>{escape(COSTS[name](cost))}</td>" for name in shown)
        + "</tr>\n"
        for cost in report.costs
    )
    who = "contestant" if report.sheet.contestants else "job"
    yield (
        f'<section><h2>Costs</h2>\n<p class="lead">{escape(costs_mean(report))}</p>\n<div class="wide">'
        f'<table class="figures"><thead><tr><th>{who}</th>{head}</tr></thead><tbody>{rows}</tbody></table></div>'
        "</section>\n"
    )


def _losses(report: Report) -> Iterator[str]:
    """The losses of training, as a table where nothing else tells who is best."""
    rows = list(losses(report))
    if report.sheet.contestants or not rows:
        return
    named = any(of for _, _, of, *_ in rows)
    lines = "".join(
        f"<tr><th>{_broken(name)}</th>{f'<td>{escape(of)}</td>' if named else ''}"
        + "".join(f'<td class="n">{NONE if value is None else f"{value:.4f}"}</td>' for value in values)
        + "</tr>\n"
        for name, _, of, *values in rows
    )
    head = ("<th>set</th>" if named else "") + "".join(
        f'<th class="n">{text}</th>' for text in ("eval first", "eval best", "eval last", "train last")
    )
    yield (
        '<section><h2>What training left</h2>\n<div class="wide"><table class="figures"><thead><tr><th>job</th>'
        f"{head}</tr></thead><tbody>{lines}</tbody></table></div></section>\n"
    )


# ---------------------------------------------------------------------------------------------------------------- flips


def _flips(report: Report) -> Iterator[str]:
    """A folded part for each contestant, with its tasks one after the other."""
    groups: dict[str, dict[str, list[Flip]]] = {}
    for flip in report.flips:
        groups.setdefault(flip.contestant, {}).setdefault(flip.task, []).append(flip)
    if not groups:
        return
    yield (
        f'<section><h2>Items that came out otherwise</h2>\n<p class="lead">Up to {FLIPS} each way; report.json names '
        "all. Read the lost ones first: they show what an adapter breaks.</p>\n"
    )
    for contestant, tasks in groups.items():
        counts, bodies = [], []
        for task, found in tasks.items():
            figure = report.comparison.figure(contestant, task)
            assert figure is not None
            assert figure.difference is not None
            gained, lost = len(figure.difference.gained), len(figure.difference.lost)
            count = f'<span class="good">+{gained}</span> <span class="bad">−{lost}</span>'
            counts.append(f'<span class="faint"> · {escape(task)}</span> {count}')
            bodies.append(f"<h3>{escape(task)}</h3>{_way(found, False, lost)}{_way(found, True, gained)}")
        yield f"<details><summary><b>{escape(contestant)}</b>{''.join(counts)}</summary>{''.join(bodies)}</details>\n"
    yield "</section>\n"


def _way(found: Sequence[Flip], gained: bool, count: int) -> str:
    own = [one for one in found if one.gained == gained]
    if not own:
        return ""
    kind, word = ("good", "gained") if gained else ("bad", "lost")
    names = ("item", "asked (its end)", "expected", "before", "after")
    head = f'<div class="flip head">{"".join(f"<div>{name}</div>" for name in names)}</div>'
    rows = "".join(
        '<div class="flip">'
        + "".join(f"<div><label>{name}: </label>{text}</div>" for name, text in zip(names, _texts(one), strict=True))
        + "</div>\n"
        for one in own
    )
    shown = f"{len(own)} of {count:,}" if len(own) < count else f"{count:,}"
    return f'<h4 class="{kind}">{word}: {shown}</h4>{head}{rows}'


def _texts(one: Flip) -> list[str]:
    asked = one.asked if len(one.asked) <= _TEXT else f"…{one.asked[-_TEXT:]}"
    cut = (text if len(text) <= _TEXT else f"{text[:_TEXT]}…" for text in (one.expected, one.before, one.after))
    return [escape(text) if text else '<span class="faint">nothing</span>' for text in (one.item, asked, *cut)]


# ------------------------------------------------------------------------------------------------------------- settings


def _settings(report: Report) -> Iterator[str]:
    yield "<section><h2>Settings</h2>\n"
    for task in report.sheet.tasks.values():
        yield _facts(f"task {task.name}", {"kind": task.kind, "metric": task.metric, **task.facts})
    for label, facts in report.sheet.facts.items():
        yield _facts(f"evaluation {label}", facts)
    for run in report.runs:
        yield _facts(f"training {run.label}", dict(settings_of(run)))
    for text, names in templates(report).items():
        yield f"<h3>Template and end tokens of {escape(', '.join(names))}</h3><pre>{escape(text)}</pre>\n"
    yield "</section>\n"


def _facts(title: str, facts: Mapping[str, object]) -> str:
    rows = "".join(f"<tr><th>{escape(str(k))}</th><td>{escape(told(v))}</td></tr>" for k, v in facts.items())
    return f'<h3>{escape(title)}</h3><table class="facts">{rows}</table>\n'


def _notes(report: Report) -> Iterator[str]:
    if report.notes:
        lines = "".join(f"<li>{_code(one)}</li>" for one in report.notes)
        yield f'<section><h2>What was left out or told apart</h2>\n<ul class="says">{lines}</ul></section>\n'
