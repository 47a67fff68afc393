"""What the figures of a report can say and what not, in sentences that depend on the figures."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weft.evaluate.report.comparison import LEVEL, Comparison, Difference, Figure, is_general
from weft.evaluate.report.sheet import Sheet
from weft.evaluate.results import TaskRecord
from weft.evaluate.statistics import Z95, smallest_found

_FEW = 100  # items, below which an interval is wider than most gains


def cautions(sheet: Sheet, comparison: Comparison) -> list[str]:
    """The sentences, the general ones last."""
    if not comparison.figures:
        return []
    return [
        *_widths(sheet, comparison),
        *_tests(comparison),
        *_no_means(sheet, comparison),
        *_power(sheet, comparison),
        *_winners(sheet, comparison),
        *_no_differences(sheet, comparison),
        *_asked_otherwise(sheet),
        *_not_measured(sheet),
    ]


def share(value: float, digits: int = 1) -> str:
    """A share as percent: ``0.125`` -> ``12.5 %``."""
    return f"{100 * value:.{digits}f} %"


def is_share(figures: Sequence[Figure]) -> bool:
    """Whether these figures of one task are shares, which are shown in percent."""
    return all(0 <= one.value <= 1 for one in figures)


def _of(task: str, figures: Sequence[Figure]) -> list[Figure]:
    return [one for one in figures if one.task == task]


def _widths(sheet: Sheet, comparison: Comparison) -> Iterator[str]:
    """How sure each figure is by itself."""
    told, few = [], []
    for task in sheet.tasks.values():
        own = _of(task.name, comparison.figures)
        errors = [one.stderr for one in own if one.stderr is not None]
        if not errors:
            continue
        count, half = min(one.n for one in own), Z95 * max(errors)
        width = f"{100 * half:.1f} points" if is_share(own) and not is_general(task) else f"{half:.3g}"
        told.append(f"± {width} on {task.name} ({count:,} items)")
        few += [task.name] if count < _FEW else []
    if told:
        yield f"By itself a figure is known, with 95 % confidence, to {_listed(told)}."
    if few:
        yield f"{_listed(few)}: fewer than {_FEW} items are few; only large differences show."


def _listed(words: Sequence[str]) -> str:
    return ", ".join(words[:-1]) + f" and {words[-1]}" if len(words) > 1 else "".join(words)


def _tests(comparison: Comparison) -> Iterator[str]:
    count = comparison.tests
    if not count:
        return
    found = [one for one in comparison.figures if one.difference is not None and one.difference.found]
    if count == 1:
        yield f"One difference was tested, at {share(LEVEL, 0)}: {'it was found' if found else 'it was not found'}."
        return
    yield (
        f"{count} differences were tested. Without a correction about {max(1, round(LEVEL * count))} of so many would "
        f"look real by chance alone; Holm's keeps the chance of any false one at {share(LEVEL, 0)}. {len(found)} of "
        f"them are found with it."
    )


def _no_means(sheet: Sheet, comparison: Comparison) -> Iterator[str]:
    """Tasks whose figure is worked out over all items at once."""
    found = dict.fromkeys(
        one.task for one in comparison.figures if one.difference is not None and not one.difference.of_items
    )
    for task in found:
        yield (
            f"{task}: the {sheet.tasks[task].metric.replace('_', ' ')} is worked out over all items at once. Its test "
            "looks at the items one by one, so a difference has a p-value, but no interval."
        )


def _power(sheet: Sheet, comparison: Comparison) -> Iterator[str]:
    """What the tests would have missed."""
    for task in sheet.tasks.values():
        tested = [one.difference for one in _of(task.name, comparison.figures) if one.difference is not None]
        counted = [one for one in tested if one.counted]
        if not counted:
            continue
        changed, count = _typical([_changed(one) for one in counted]), min(one.n for one in counted)
        least = smallest_found(count, changed)
        missed = [one for one in counted if not one.found]
        if least is None:
            yield (
                f"{task.name}: {share(changed)} of the items came out otherwise. That is so few that the test finds "
                "hardly any difference."
            )
        else:
            yield (
                f"{task.name}: in the middle of the field {share(changed, 0)} of the items came out otherwise than the "
                f"reference's. With so many flips among {count:,} items, and before the correction, a gain below "
                f"{100 * least:.1f} points is missed more than once in five times"
                + (f"; so the {_counted(missed)} not found may still be there." if missed else ".")
            )


def _changed(difference: Difference) -> float:
    return (len(difference.gained) + len(difference.lost)) / difference.n


def _typical(values: Sequence[float]) -> float:
    return sorted(values)[len(values) // 2]


def _counted(missed: Sequence[Difference]) -> str:
    return "one difference that was" if len(missed) == 1 else f"{len(missed)} differences that were"


def _winners(sheet: Sheet, comparison: Comparison) -> Iterator[str]:
    several = [one for one in comparison.leaders if len(_of(one.task, comparison.figures)) > 2]
    for best, near in dict.fromkeys((one.best, one.near) for one in several):
        tasks = _listed([one.task for one in several if (one.best, one.near) == (best, near)])
        yield _near(tasks, best, near)
    if several:
        yield (
            "The best of many is best partly by luck, for the same items chose it and measured it. On fresh items its "
            "figure will be a little lower."
        )


def _near(tasks: str, best: str, near: Sequence[str]) -> str:
    if not near:
        return f"On {tasks} {best} is best, and a paired test tells it from each of the others."
    shown = _listed([*near[:6], *([f"{len(near) - 6} more"] if len(near) > 6 else [])])
    return (
        f"On {tasks} {best} has the best figure, but these items do not tell it from {shown}. Choose between them by "
        "cost or by forgetting, or ask more items."
    )


def _no_differences(sheet: Sheet, comparison: Comparison) -> Iterator[str]:
    if comparison.tests:
        return
    if not sheet.bases():
        yield (
            "No contestant is the plain base, so no difference to it is shown. Evaluate the base, too, or name another "
            "one to compare with: --reference NAME."
        )
    else:
        yield "No two contestants have scores of the same items, so no difference is tested."


def _asked_otherwise(sheet: Sheet) -> Iterator[str]:
    for key, what in (("template", "templates"), ("stops", "end tokens")):
        told = {
            str(one.facts[key]) for one in sheet.contestants.values() if one.kind != "prompt" and one.facts.get(key)
        }
        if len(told) > 1:
            yield (
                f"The contestants were asked with {len(told)} different {what}. Part of a difference may come from "
                "that and not from what was trained."
            )


def _not_measured(sheet: Sheet) -> Iterator[str]:
    tasks: list[TaskRecord] = list(sheet.tasks.values())
    if not any(map(is_general, tasks)):
        yield ("What was forgotten was not measured. A perplexity task on general text (general: true) shows it.")
    if any(one.kind in ("adapter", "checkpoint") for one in sheet.contestants.values()):
        yield (
            "Each adapter was trained once. A difference holds for these adapters; whether it holds for their methods, "
            "only training with other seeds tells."
        )
    yield (
        "No figure here shows whether items of the tasks were in the training data of the base or of an adapter, nor "
        "how answers are to questions of another kind."
    )
