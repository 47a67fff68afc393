"""A report: everything that its page, its Markdown and its JSON show, worked out once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, asdict, dataclass
from pathlib import Path
from typing import Any

from weft.errors import UserError, nearest
from weft.evaluate.report.cautions import cautions
from weft.evaluate.report.comparison import Comparison, Difference, Figure, compare, is_general
from weft.evaluate.report.forgetting import Forgetting, Trade, forgetting_of, trades
from weft.evaluate.report.runs import JobRecord, RunRecord, read_run
from weft.evaluate.report.sheet import Sheet, lay_out
from weft.evaluate.report.sources import Source
from weft.evaluate.results import Item
from weft.version import __version__

FORMAT = 1
FLIPS = 12  # shown with their texts, each way, for each contestant and task


@dataclass(frozen=True)
class Cost:
    """What a contestant takes; None where nobody told. ``prompt_tokens`` and ``answer_tokens`` are means of an item."""

    contestant: str
    method: str
    _: KW_ONLY
    trainable_parameters: int | None
    bytes: int | None
    seconds: float | None
    tokens_per_second: float | None
    peak_bytes: int | None
    prompt_tokens: float | None
    answer_tokens: float | None


@dataclass(frozen=True)
class Flip:
    """One item that came out otherwise than the reference's."""

    contestant: str
    task: str
    item: str
    _: KW_ONLY
    gained: bool
    asked: str
    before: str
    after: str
    expected: str
    score_before: float
    score_after: float


@dataclass(frozen=True)
class Report:
    """What one page shows.

    Attributes:
        idle: contestants that change nothing, and why that is known.
        says: what the figures can and cannot say.
        notes: what was left out, told apart or not compared.
    """

    title: str
    _: KW_ONLY
    sources: tuple[Source, ...]
    sheet: Sheet
    runs: tuple[RunRecord, ...]
    comparison: Comparison
    costs: tuple[Cost, ...]
    forgetting: tuple[Forgetting, ...]
    trades: tuple[Trade, ...]
    flips: tuple[Flip, ...]
    idle: Mapping[str, str]
    says: tuple[str, ...]
    notes: tuple[str, ...]

    def summary(self) -> dict[str, Any]:
        """It as JSON holds it."""
        return {
            "format": FORMAT,
            "title": self.title,
            "weft": __version__,
            "sources": [
                {"label": one.label, "path": str(one.path), "results": [str(folder) for folder in one.results]}
                for one in self.sources
            ],
            "contestants": [
                {**asdict(one), "source": self.sheet.sources[one.name], "changes_nothing": self.idle.get(one.name)}
                for one in self.sheet.contestants.values()
            ],
            "tasks": [{**asdict(one), "general": is_general(one)} for one in self.sheet.tasks.values()],
            "figures": [asdict(one) for one in self.comparison.figures],
            "other_figures": [_plain(one) for one in self.comparison.others],
            "leaders": [asdict(one) for one in self.comparison.leaders],
            "forgetting": [asdict(one) for one in self.forgetting],
            "gain_against_forgetting": [asdict(one) for one in self.trades],
            "costs": [asdict(one) for one in self.costs],
            "flips": [asdict(one) for one in self.flips],
            "runs": [{**asdict(one), "path": str(one.path)} for one in self.runs],
            "evaluations": {label: dict(facts) for label, facts in self.sheet.facts.items()},
            "says": list(self.says),
            "notes": list(self.notes),
        }


def _plain(figure: Figure) -> dict[str, Any]:
    return {key: value for key, value in asdict(figure).items() if key != "difference"}


def make_report(sources: Sequence[Source], *, reference: str | None = None) -> Report:
    """The report of all that lies in these folders.

    Raises:
        UserError: A file is damaged, there is nothing to compare, or there is no contestant ``reference``.
    """
    sheet = lay_out(sources)
    if reference is not None and reference not in sheet.contestants:
        known = ", ".join(sheet.contestants) or "none, for nothing was evaluated"
        raise UserError(
            f"no contestant is named '{reference}'.{nearest(reference, sheet.contestants)} There are: {known}."
        )
    runs = tuple(_runs(sources))
    comparison = compare(sheet, reference)
    changes = forgetting_of(sheet, comparison)
    return Report(
        _title(sources),
        sources=tuple(sources),
        sheet=sheet,
        runs=runs,
        comparison=comparison,
        costs=tuple(_costs(sheet, runs)),
        forgetting=tuple(changes),
        trades=tuple(trades(sheet, comparison, changes)),
        flips=tuple(_flips(sheet, comparison)),
        idle=_idle(sheet, comparison),
        says=tuple(cautions(sheet, comparison)),
        notes=(*_unfinished(sources), *sheet.notes),
    )


def _title(sources: Sequence[Source]) -> str:
    return " and ".join(one.label for one in sources) if len(sources) < 3 else f"{len(sources)} folders"


def _runs(sources: Sequence[Source]) -> list[RunRecord]:
    found: dict[Path, RunRecord] = {}
    for source in sources:
        if source.run is not None and source.run.resolve() not in found:
            found[source.run.resolve()] = read_run(source.run, source.label)
    return list(found.values())


def _unfinished(sources: Sequence[Source]) -> list[str]:
    bare = [one for one in sources if not one.results] if any(one.results for one in sources) else []
    return [f"{one.path} has no results yet: `weft eval {one.path} --tasks …` makes them." for one in bare] + [
        f"{folder} is an evaluation that was cut, and is left out. The same `weft eval` goes on with it."
        for source in sources
        for folder in source.unfinished
    ]


# ---------------------------------------------------------------------------------------------------------------- costs


def _costs(sheet: Sheet, runs: Sequence[RunRecord]) -> list[Cost]:
    jobs = {(run.label, job.name): job for run in runs for job in run.jobs}
    if not sheet.contestants:
        return [_cost(job.name if len(runs) == 1 else f"{job.name} ({run.label})", {}, job, []) for run in runs
                for job in run.jobs]  # fmt: skip
    found = []
    for name, one in sheet.contestants.items():
        label = sheet.sources[name]
        job = jobs.get((label, name.removesuffix(f" ({label})"))) if one.kind == "adapter" else None
        tasks = [task.name for task in sheet.tasks.values() if not is_general(task)]
        items = [item for task in tasks for item in sheet.answers.get((name, task), {}).values()]
        found.append(_cost(name, one.facts, job, items))
    return found


def _cost(name: str, facts: Mapping[str, object], job: JobRecord | None, items: Sequence[Item]) -> Cost:
    def told(key: str, field: str | None = None) -> Any:
        value = facts.get(key)
        return value if isinstance(value, (int, float)) else getattr(job, field or key, None)

    return Cost(
        name,
        str(facts.get("method") or (job.method if job else "")),
        trainable_parameters=told("trainable_parameters", "parameters"),
        bytes=told("bytes"),
        seconds=told("seconds"),
        tokens_per_second=told("tokens_per_second"),
        peak_bytes=told("peak_bytes"),
        prompt_tokens=_mean([item.prompt_tokens for item in items]),
        answer_tokens=_mean([item.answer_tokens for item in items if item.answer_tokens]),
    )


def _mean(values: Sequence[int]) -> float | None:
    return sum(values) / len(values) if any(values) else None


# ---------------------------------------------------------------------------------------------------------------- flips


def _flips(sheet: Sheet, comparison: Comparison) -> list[Flip]:
    """Items with texts that came out otherwise; the clearest first where scores are not right or wrong."""
    found = []
    for figure in comparison.figures:
        task = sheet.tasks[figure.task]
        if figure.difference is None or task.kind == "perplexity":
            continue
        for gained, items in ((True, figure.difference.gained), (False, figure.difference.lost)):
            flips = [_flip(sheet, figure, figure.difference, item, gained=gained) for item in items]
            flips.sort(key=lambda one: -abs(one.score_after - one.score_before))
            found += flips[:FLIPS]
    return found


def _flip(sheet: Sheet, figure: Figure, difference: Difference, item: str, *, gained: bool) -> Flip:
    before = sheet.answers[difference.reference, figure.task][item]
    after = sheet.answers[figure.contestant, figure.task][item]
    return Flip(
        figure.contestant,
        figure.task,
        item,
        gained=gained,
        asked=after.asked or before.asked,
        before=before.output,
        after=after.output,
        expected=after.reference,
        score_before=before.scores[figure.metric],
        score_after=after.scores[figure.metric],
    )


def _idle(sheet: Sheet, comparison: Comparison) -> dict[str, str]:
    """Contestants that change nothing: an adapter that was not loaded looks like the base that it was put on."""
    found = {}
    for name, one in sheet.contestants.items():
        if one.facts.get("largest_change") == 0:
            found[name] = "no logit differs from the base's: the adapter changes nothing"
            continue
        own = [figure for figure in comparison.figures if figure.contestant == name and figure.difference is not None]
        if one.kind in ("adapter", "checkpoint") and own and all(_same(sheet, figure) for figure in own):
            count = sum(figure.difference.n for figure in own if figure.difference is not None)
            found[name] = f"all {count:,} answers are the reference's, to the last digit"
    return found


def _same(sheet: Sheet, figure: Figure) -> bool:
    assert figure.difference is not None
    before, after = (
        sheet.answers[figure.difference.reference, figure.task],
        sheet.answers[figure.contestant, figure.task],
    )
    return all(
        item.output == before[key].output and item.scores == before[key].scores
        for key, item in after.items()
        if key in before
    )
