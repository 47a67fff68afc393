"""All answers on one sheet: contestants of several results told apart, tasks joined where they are the same."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

from weft.errors import UserError
from weft.evaluate.report.sources import Source
from weft.evaluate.results import Contestant, Item, Results, Score, TaskRecord

# Facts of a task that may differ without its items being others: where they lie, how many were asked, what it took.
_PLACES = frozenset({
    "file", "files", "path", "paths", "source", "data_files", "limit", "items", "n", "seconds", "time", "cached",
})  # fmt: skip
_LONG = 60  # characters of a fact in a message


@dataclass
class Sheet:
    """Who answered what.

    Attributes:
        contestants: by the name that is theirs alone here; ``sources``: the label of the folder of each.
        tasks: by the name that is theirs alone here.
        answers: (contestant, task) -> the answers by item; ``scores``: (contestant, task, metric) -> the figure.
        facts: of each evaluation, by the label of its folder.
        notes: what was left out or told apart, as sentences.
    """

    _: KW_ONLY
    contestants: dict[str, Contestant] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    tasks: dict[str, TaskRecord] = field(default_factory=dict)
    answers: dict[tuple[str, str], dict[str, Item]] = field(default_factory=dict)
    scores: dict[tuple[str, str, str], Score] = field(default_factory=dict)
    facts: dict[str, Mapping[str, object]] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    def asked(self, task: str) -> list[str]:
        """Those who answered a task, in their order."""
        return [name for name in self.contestants if (name, task) in self.answers]

    def bases(self) -> list[str]:
        """The contestants that are a plain base."""
        return [name for name, one in self.contestants.items() if one.kind == "base"]

    def reference(self, contestant: str, wanted: str | None = None) -> str | None:
        """Whom a contestant is compared with: the one that is wanted, the base of its own folder, or the only base."""
        if wanted is not None:
            return wanted if wanted != contestant else None
        bases = self.bases()
        own = [name for name in bases if self.sources[name] == self.sources[contestant]]
        found = own if own else bases
        return found[0] if len(found) == 1 and contestant not in bases else None


@dataclass(frozen=True)
class _Part:
    """The results of one folder, and whose they are."""

    source: Source
    place: str
    results: Results

    def answers(self) -> dict[tuple[str, str], dict[str, Item]]:
        """(contestant, task) -> the answers by item.

        Raises:
            UserError: An item names nobody and nothing that the summary knows, or has two answers of one contestant.
        """
        names, tasks = ({one.name for one in group} for group in (self.results.contestants, self.results.tasks))
        found: dict[tuple[str, str], dict[str, Item]] = {}
        for item in self.results.items:
            if item.contestant not in names or item.task not in tasks:
                raise UserError(
                    f"{self.place}: an item is of contestant '{item.contestant}' and task '{item.task}', which its "
                    "summary.json does not name. The two files are not of one evaluation."
                )
            group = found.setdefault((item.contestant, item.task), {})
            if group.setdefault(item.item, item) != item:
                raise UserError(
                    f"{self.place}: '{item.contestant}' has two different answers to item {item.item} of task "
                    f"'{item.task}'. Evaluate again."
                )
        return found


def lay_out(sources: Sequence[Source]) -> Sheet:
    """The results of all sources on one sheet.

    Raises:
        UserError: A file is damaged, or two sources have no task in common.
    """
    parts = [
        _Part(source, str(folder), results)
        for source in sources
        for folder, results in zip(source.results, source.read(), strict=True)
    ]
    sheet = Sheet()
    tasks = _joined_tasks(parts, sheet)
    _check_common(sources, parts, tasks)
    taken = _names(parts)
    for number, part in enumerate(parts):
        sheet.facts[_short(part)] = part.results.facts
        _add(part, sheet, taken, {task: tasks[number, task] for task in (one.name for one in part.results.tasks)})
    _join_bases(sheet)
    return sheet


def _short(part: _Part) -> str:
    folder = part.place.rsplit("/", 1)[-1]
    return part.source.label if len(part.source.results) == 1 else f"{part.source.label}: {folder}"


def _names(parts: Sequence[_Part]) -> dict[tuple[str, str], str]:
    """(label of the source, name) -> the name on the sheet, with the label where several sources have that name."""
    owners: dict[str, set[str]] = {}
    for part in parts:
        for one in part.results.contestants:
            owners.setdefault(one.name, set()).add(part.source.label)
    return {
        (label, name): name if len(labels) == 1 else f"{name} ({label})"
        for name, labels in owners.items()
        for label in labels
    }


def _add(part: _Part, sheet: Sheet, taken: Mapping[tuple[str, str], str], tasks: Mapping[str, str]) -> None:
    label = part.source.label
    names = {one.name: taken[label, one.name] for one in part.results.contestants}
    for one in part.results.contestants:
        name = names[one.name]
        known = sheet.contestants.get(name)
        if known is not None and known.kind != one.kind:
            raise UserError(
                f"{part.place}: '{one.name}' is a {one.kind}, and a {known.kind} in another evaluation there."
            )
        sheet.contestants[name] = replace(one, name=name, facts={**(known.facts if known else {}), **one.facts})
        sheet.sources[name] = label
    again = set()
    for (contestant, task), items in part.answers().items():
        key = (names[contestant], tasks[task])
        if key in sheet.answers:
            again.add((contestant, task))
        else:
            sheet.answers[key] = items
    for score in part.results.scores:
        if score.contestant not in names or score.task not in tasks:
            raise UserError(
                f"{part.place}: a score is of '{score.contestant}' and '{score.task}', which it does not name."
            )
        if (score.contestant, score.task) not in again:
            sheet.scores[names[score.contestant], tasks[score.task], score.metric] = score
    if again:
        who = ", ".join(sorted({f"'{name}' on {task}" for name, task in again}))
        sheet.notes.append(
            f"{part.place} repeats what another evaluation of this run holds; the first one counts: {who}."
        )


# ---------------------------------------------------------------------------------------------------------------- tasks


def _joined_tasks(parts: Sequence[_Part], sheet: Sheet) -> dict[tuple[int, str], str]:
    """(number of the part, its task) -> the name on the sheet; equal tasks have one, different ones are told apart."""
    variants: dict[str, list[tuple[int, TaskRecord]]] = {}
    joined: dict[tuple[int, str], int] = {}
    for number, part in enumerate(parts):
        for task in part.results.tasks:
            known = variants.setdefault(task.name, [])
            why = [_difference(parts[first], one, part, task) for first, one in known]
            place = next((index for index, reason in enumerate(why) if reason is None), None)
            if place is None:
                if known:
                    first = parts[known[0][0]]
                    sheet.notes.append(
                        f"Task {task.name} of {_short(part)} is not compared with that of {_short(first)}: {why[0]}."
                    )
                known.append((number, task))
                place = len(known) - 1
            joined[number, task.name] = place
    found = {}
    for (number, name), place in joined.items():
        owner, task = variants[name][place]
        shown = name if len(variants[name]) == 1 else f"{name} ({_short(parts[owner])})"
        sheet.tasks[shown] = replace(task, name=shown)
        found[number, name] = shown
    return found


def _difference(first: _Part, one: TaskRecord, second: _Part, other: TaskRecord) -> str | None:
    """What makes two tasks of one name different; None if they are the same."""
    for key in ("kind", "metric", "higher_is_better"):
        if getattr(one, key) != getattr(other, key):
            return _apart(key.replace("_", " "), second, getattr(other, key), first, getattr(one, key))
    mine, theirs = _flat(one.facts), _flat(other.facts)
    for key in sorted({*mine, *theirs}):
        if mine.get(key) != theirs.get(key):
            return _apart(key, second, theirs.get(key), first, mine.get(key))
    references = {item.item: item.reference for item in first.results.items if item.task == one.name}
    for item in second.results.items:
        if item.task == other.name and references.get(item.item, item.reference) != item.reference:
            return f"item {item.item} has another reference"
    if not any(item.item in references for item in second.results.items if item.task == other.name):
        return "they have no item in common"
    return None


def _flat(facts: Mapping[str, object], before: str = "") -> dict[str, object]:
    """The facts that make a task what it is; those in others by the way to them, as ``config.num_fewshot``."""
    found: dict[str, object] = {}
    for key, value in facts.items():
        if key not in _PLACES:
            found |= _flat(value, f"{before}{key}.") if isinstance(value, Mapping) else {f"{before}{key}": value}
    return found


def _apart(key: str, second: _Part, this: object, first: _Part, that: object) -> str:
    return f"{key} is {_shown(this)} in {_short(second)} and {_shown(that)} in {_short(first)}"


def _shown(value: object) -> str:
    text = "not told" if value is None else str(value)
    text = text if len(text) <= _LONG else f"{text[:_LONG]}…"
    return repr(text) if isinstance(value, str) else text


def _check_common(sources: Sequence[Source], parts: Sequence[_Part], tasks: Mapping[tuple[int, str], str]) -> None:
    """Refuse sources of which one shares no task with any other.

    Raises:
        UserError: There is such a one.
    """
    have: dict[str, set[str]] = {source.label: set() for source in sources if source.results}
    for (number, _), shown in tasks.items():
        have[parts[number].source.label].add(shown)
    for source in sources if len(have) > 1 else ():
        others = set().union(*(names for label, names in have.items() if label != source.label))
        if source.results and not have[source.label] & others:
            told = "; ".join(f"{label}: {', '.join(sorted(names)) or 'no results'}" for label, names in have.items())
            raise UserError(
                f"{source.path} has no task in common with the others, so there is nothing to compare ({told}). "
                "Evaluate all with the same --tasks and settings."
            )


# ---------------------------------------------------------------------------------------------------------------- bases


def _join_bases(sheet: Sheet) -> None:
    """Make one of the bases that gave the same answers wherever they were asked the same."""
    first, *others = sheet.bases() or [""]
    for name in others:
        if not _agree(sheet, first, name):
            continue
        for task in sheet.tasks:
            if (name, task) in sheet.answers:
                found = sheet.answers.pop((name, task))
                kept = sheet.answers.setdefault((first, task), found)
                sheet.answers[first, task] = {**found, **kept}
        for key in [key for key in sheet.scores if key[0] == name]:
            score = sheet.scores.pop(key)
            known = sheet.scores.get((first, *key[1:]))
            if known is None or score.n > known.n:
                sheet.scores[first, key[1], key[2]] = score
        del sheet.contestants[name], sheet.sources[name]
    if first and len(sheet.bases()) == 1 and others:
        _rename(sheet, first, first.removesuffix(f" ({sheet.sources[first]})"))


def _agree(sheet: Sheet, one: str, other: str) -> bool:
    shared = [
        (mine, theirs[item])
        for task in sheet.tasks
        for theirs in [sheet.answers.get((other, task), {})]
        for item, mine in sheet.answers.get((one, task), {}).items()
        if item in theirs
    ]
    return bool(shared) and all(a.output == b.output and _as_good(a.scores, b.scores) for a, b in shared)


def _as_good(mine: Mapping[str, float], theirs: Mapping[str, float]) -> bool:
    """Whether two answers have the same scores; another machine rounds a loss otherwise in its last digits."""
    return mine.keys() == theirs.keys() and all(math.isclose(mine[k], theirs[k], rel_tol=1e-5) for k in mine)


def _rename(sheet: Sheet, old: str, new: str) -> None:
    if new in sheet.contestants:
        return

    def renamed(name: str) -> str:
        return new if name == old else name

    sheet.contestants = {renamed(k): replace(one, name=renamed(k)) for k, one in sheet.contestants.items()}
    sheet.sources = {renamed(k): label for k, label in sheet.sources.items()}
    sheet.answers = {(renamed(who), task): found for (who, task), found in sheet.answers.items()}
    sheet.scores = {(renamed(key[0]), key[1], key[2]): found for key, found in sheet.scores.items()}
