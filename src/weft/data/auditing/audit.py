"""The audit: every check over all records, before a week of training is spent on them.

``audit`` makes all checks; ``audit_before_training`` makes the few that cost next to nothing. A check is one function
in ``tokens``, ``text``, ``judged``, ``template`` or ``whole``.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Collection, Iterable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Literal

from weft.data.auditing import judged, template, text, tokens, whole
from weft.data.auditing.base import CHECKS, Check, Ends, Facts, Finding, Hit, Item, Records, Texts
from weft.data.auditing.stream import chunks
from weft.data.rendering.render import Renderer, Sample
from weft.data.views import chained, distinct, sizes
from weft.errors import UserError, nearest

_CHECKERS = (tokens, text, whole, judged, template)  # importing them fills CHECKS
logger = logging.getLogger(__name__)

_PART = 1 << 18  # tokens that the early checks look at together
_FIRST = 10_000  # samples
_KEPT = 1000  # findings of each early check that are kept; the others are counted
AuditMode = Literal["error", "warn", "off"]


@dataclass(frozen=True, slots=True)
class Group:
    """The findings of one check. ``count`` is their number; ``findings`` may be only the first of them."""

    check: Check
    findings: tuple[Finding, ...]
    count: int


def audit(
    items: Sequence[Item], facts: Facts, *, ignore: Collection[str] = (), only: Collection[str] | None = None
) -> list[Finding]:
    """The findings about the records: errors first, then by check in the order of CHECKS.

    Args:
        items: the records (``weft.data.auditing.items.collect``), training and evaluation together.
        facts: the renderer, and what else checks need to know.
        ignore: codes of checks to leave out.
        only: codes of the only checks to make.

    Raises:
        UserError: ``ignore`` or ``only`` name an unknown check.
    """
    for code in (*ignore, *(only or ())):
        if code not in CHECKS:
            raise UserError(f"there is no check {code!r}.{nearest(code, CHECKS)} Checks: {', '.join(CHECKS)}.")
    return _findings(Records(items, facts), ignore, only)


def _findings(records: Records, ignore: Collection[str], only: Collection[str] | None) -> list[Finding]:
    wanted = [check for check in CHECKS.values() if check.code not in ignore and (only is None or check.code in only)]
    found = [_finding(check, hit, records.facts.skips_bad_records) for check in wanted for hit in check.run(records)]
    return sorted(found, key=lambda finding: finding.severity != "error")


def _finding(check: Check, hit: Hit, skips_bad_records: bool = False) -> Finding:
    severity, message = check.severity, hit.message
    source, number, split = ("", 0, None) if hit.item is None else (hit.item.source, hit.item.number, hit.item.split)
    if skips_bad_records and hit.item is not None and hit.item.problem is not None:
        severity, message = "warning", f"left out (on_bad_record): {hit.message}"
    return Finding(
        check.code,
        severity,
        source,
        number=number,
        split=split,
        message=message,
        shown=hit.shown,
        mend=check.mend,
    )


def grouped(findings: Iterable[Finding]) -> list[Group]:
    """The findings by check, in their order."""
    groups: dict[str, list[Finding]] = {}
    for finding in findings:
        groups.setdefault(finding.code, []).append(finding)
    return [Group(CHECKS[code], tuple(found), len(found)) for code, found in groups.items()]


def audit_before_training(
    renderer: Renderer,
    train: Sequence[Sample],
    held: Sequence[Sample],
    mode: AuditMode = "error",
    *,
    part: int = _PART,
) -> list[Finding]:
    """Check the rendered tokens, for a few percent of the cost of rendering. A sample given twice counts once.

    The checks look at ``part`` tokens at a time. The result holds the first 1,000 findings of each check. Warnings are
    logged, a line per check. With ``error``, findings of a check that refuses (nothing to learn, an end that is not
    learned, two BOS …) end the run; with ``warn`` they are logged as well; with ``off`` nothing is done.

    Raises:
        UserError: The data would train wrongly; names the first records, and what to do.
    """
    if mode == "off":
        return []
    groups = early_findings(Facts(renderer), train, held, part)
    refused = []
    for group in groups:
        if group.check.early == "refuse" and mode == "error":
            refused.append(_line(group))
        else:
            logger.warning("%s", _line(group))
    if refused:
        raise UserError(
            "the data would train wrongly:\n  "
            + "\n  ".join(refused)
            + "\n`weft preview` shows the records; `audit: warn` trains all the same."
        )
    return [finding for group in groups for finding in group.findings]


def early_findings(facts: Facts, train: Sequence[Sample], held: Sequence[Sample], part: int = _PART) -> list[Group]:
    """What the early checks find, errors first. They look at ``part`` tokens at a time; any number finds the same."""
    train, held = distinct(train, held)
    ends, texts = _ends(facts, train, held, part), _texts(facts, train, held, part)
    checks = [check for check in CHECKS.values() if check.early]
    found: dict[str, list[Finding]] = {check.code: [] for check in checks}
    counts = Counter[str]()
    for samples in _parts(train, held, part):
        records = Records((), facts, samples, ends, texts)
        for check in checks:
            if check.once and counts[check.code]:
                continue
            for hit in check.run(records):
                counts[check.code] += 1
                if counts[check.code] <= _KEPT:
                    found[check.code].append(_finding(check, hit))
    groups = [Group(c, tuple(found[c.code]), counts[c.code]) for c in checks if counts[c.code]]
    return sorted(groups, key=lambda group: group.check.severity != "error")


def _ends(facts: Facts, train: Sequence[Sample], held: Sequence[Sample], part: int) -> Ends:
    """The ends of all the data. Good data tells them in its first part."""
    first = None
    for samples in _parts(train, held, part):
        ends = Records((), facts, samples).ends
        first = ends.first if first is None else first
        if ends.learned:
            return Ends(len(train) + len(held), True, None)
    return Ends(len(train) + len(held), False, first)


def _texts(facts: Facts, train: Sequence[Sample], held: Sequence[Sample], part: int) -> Texts:
    """The plain texts in the first thousands of samples, which tell enough."""
    texts, seen = Texts(), 0
    for samples in _parts(train, held, part):
        texts = texts.plus(Records((), facts, samples).texts)
        seen += sum(map(len, samples))
        if seen >= _FIRST:
            break
    return texts


def _parts(
    train: Sequence[Sample], held: Sequence[Sample], size: int
) -> Iterator[tuple[Sequence[Sample], Sequence[Sample]]]:
    """Parts of both sequences in order, of about ``size`` tokens; at least one part."""
    count = len(train)
    for start, stop in list(chunks(sizes(chained([train, held])), size)) or [(0, 0)]:
        yield train[start:stop], held[max(start - count, 0) : max(stop - count, 0)]


def _line(group: Group) -> str:
    first = group.findings[0]
    count = f" ({group.count:,} records)" if group.count > 1 else ""
    place = f"{first.source}: " if first.source else ""
    return f"{group.check.code}{count}: {place}{first.message}. {first.mend[:1].upper()}{first.mend[1:]}."


def findings_json(findings: Iterable[Finding]) -> list[dict[str, Any]]:
    """The findings as JSON holds them."""
    return [asdict(finding) for finding in findings]
