"""An evaluation: all entrants answer all tasks together, and every answer is scored.

``evaluate_target`` is for a target as it stands; ``evaluate_entrants`` for any who can be asked, such as prompts beside
adapters.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field
from pathlib import Path
from typing import Any

from weft.data import Prompt
from weft.errors import UserError
from weft.evaluate.entrants import Entrant, entrants_of
from weft.evaluate.items_file import ItemsFile
from weft.evaluate.kinds import KINDS, Answered, TaskWork
from weft.evaluate.kinds.generation import writes
from weft.evaluate.no_op import largest_changes
from weft.evaluate.panel import Panel
from weft.evaluate.results import Contestant, Item, Results, Score
from weft.evaluate.tasks import Exercise, Task
from weft.generation.target import Target
from weft.methods.dense import how_kept
from weft.objectives.passes import EVALUATION_TOKENS
from weft.version import __version__

_LOOKED_AT = 4  # prompts on which it is seen whether an adapter changes anything

# (name of the task, answers so far, answers there will be), as they come.
OnProgress = Callable[[str, int, int], None]


@dataclass(frozen=True, kw_only=True)
class EvaluationSettings:
    """How an evaluation runs; none of it changes an answer but ``limit``.

    Attributes:
        limit: items of each task; None: all.
        max_rows: answers that are written at once.
        max_tokens: rows of a pass that scores.
        seed: of bootstraps.
    """

    limit: int | None = None
    max_rows: int = 64
    max_tokens: int = EVALUATION_TOKENS
    seed: int = 0

    def __post_init__(self) -> None:
        for name in ("limit", "max_rows", "max_tokens"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise UserError(f"{name} is {value}; at least 1 is needed.")


@dataclass
class _TaskRun:
    """One task with those who answer it, and their answers."""

    work: TaskWork
    entrants: list[Entrant]
    exercises: list[Exercise]
    _: KW_ONLY
    answers: dict[str, dict[str, Answered]] = field(default_factory=lambda: defaultdict(dict))

    @property
    def task(self) -> Task:
        return self.work.task


def evaluate_target(
    target: Target,
    tasks: Sequence[Task],
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    names: Sequence[str] | None = None,
    folder: Path | None = None,
    answers: Path | None = None,
    on_progress: OnProgress = lambda task, done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Results:
    """Evaluate the base and the adapters of a target.

    Args:
        names: those who answer; None: the base and all adapters.
        folder: where the results go; None: nowhere.
        answers: where answers are kept, so that a second call goes on and computes none again; None: in the folder's
            own ``answers``.
        on_progress: hears how far a task is.
        on_note: hears who cannot answer a task.

    Raises:
        UserError: A task cannot be answered, or the folder holds something else.
        WriteError: The machine refuses to write.
    """
    return evaluate_entrants(
        target, entrants_of(target, names), tasks, settings, folder=folder, answers=answers, on_progress=on_progress,
        on_note=on_note,
    )  # fmt: skip


def evaluate_entrants(
    target: Target,
    entrants: Sequence[Entrant],
    tasks: Sequence[Task],
    settings: EvaluationSettings = EvaluationSettings(),
    *,
    folder: Path | None = None,
    answers: Path | None = None,
    on_progress: OnProgress = lambda task, done, total: None,
    on_note: Callable[[str], None] = lambda note: None,
) -> Results:
    """Evaluate entrants of one target, of which each has a name of its own. The rest is as in ``evaluate_target``.

    Raises:
        UserError: Two entrants have one name, a task cannot be answered, or the folder holds something else.
        WriteError: The machine refuses to write.
    """
    names = [one.name for one in entrants]
    if doubled := [name for name in names if names.count(name) > 1]:
        raise UserError(f"two contestants are called '{doubled[0]}'; results would be mixed.")
    file = ItemsFile(folder)
    runs = [_begun(target, task, entrants, settings, on_note) for task in tasks]
    adapters = [one.adapter for one in entrants]
    kept = answers or file.answers
    panel = Panel(target, adapters, folder=kept, max_rows=settings.max_rows, max_tokens=settings.max_tokens)
    for run in runs:
        run.work.check(run.entrants, run.exercises)
    changes = _changes(target, runs)
    for run in runs:
        _answer(run, panel, file, on_progress)
    results = Results(
        contestants=[_contestant(one, panel, runs, changes) for one in entrants],
        tasks=[run.task.record(settings.limit) for run in runs],
        items=[item for run in runs for item in _items(run)],
        scores=[score for run in runs for score in _scores(run, settings.seed)],
        facts=_facts(target, runs, panel, settings),
    )
    file.close(results)
    return results


def _begun(
    target: Target, task: Task, entrants: Sequence[Entrant], settings: EvaluationSettings, note: Callable[[str], None]
) -> _TaskRun:
    """The task with those who can answer it.

    Raises:
        UserError: Nobody can.
    """
    work = KINDS[task.settings.kind](target, task)
    why = {entrant.name: work.refusal(entrant) for entrant in entrants}
    able = [entrant for entrant in entrants if not why[entrant.name]]
    if not able:
        name, reason = next(iter(why.items()))
        raise UserError(f"nobody can answer task {task.name}, which is {task.settings.kind}: of '{name}', {reason}.")
    for name, reason in why.items():
        if reason:
            note(f"'{name}' does not answer task {task.name}: {reason}")
    return _TaskRun(work, able, task.limited(settings.limit))


def _answer(run: _TaskRun, panel: Panel, file: ItemsFile, on_progress: OnProgress) -> None:
    at_once = run.work.at_once or len(run.exercises)
    done, total = 0, len(run.entrants) * sum(max(1, len(one.prompts)) for one in run.exercises)
    for begin in range(0, len(run.exercises), at_once):
        for answered in run.work.ask(panel, run.entrants, run.exercises[begin : begin + at_once]):
            run.answers[answered.item.contestant][answered.item.item] = answered
            file.add(answered.item)
            done += 1
            on_progress(run.task.name, done, total)


def _items(run: _TaskRun) -> list[Item]:
    """The items, by exercise and of each by entrant."""
    order = {exercise.item: place for place, exercise in enumerate(run.exercises)}
    found = [answered for own in run.answers.values() for answered in own.values()]
    names = [one.name for one in run.entrants]
    found.sort(key=lambda one: (order[one.exercise.item], one.item.item, names.index(one.item.contestant)))
    return [one.item for one in found]


def _scores(run: _TaskRun, seed: int) -> list[Score]:
    found = []
    for entrant in run.entrants:
        answers = [one for one in _in_order(run, entrant)]
        for number, (entry, metric) in enumerate(run.task.metrics):
            replies = [one.replies[number] for one in answers]
            own = [one.item.scores[entry.called] for one in answers]
            figure = metric.figure(replies, own, seed)
            one = Score(
                contestant=entrant.name, task=run.task.name, metric=entry.called, value=figure.value,
                stderr=figure.stderr, n=len(answers),
            )  # fmt: skip
            found.append(one)
    return found


def _in_order(run: _TaskRun, entrant: Entrant) -> list[Answered]:
    """The answers of an entrant in the order of the exercises: a bootstrap draws by places."""
    order = {exercise.item: place for place, exercise in enumerate(run.exercises)}
    return sorted(run.answers[entrant.name].values(), key=lambda one: (order[one.exercise.item], one.item.item))


def _changes(target: Target, runs: Sequence[_TaskRun]) -> dict[str, float]:
    """Of each adapter that writes, the largest change of a logit behind the first questions."""
    prompts: list[Prompt] = []
    names: dict[str, None] = {}
    for run in runs:
        writing = [one for one in run.entrants if writes(target, one)]
        names |= {one.adapter: None for one in writing if one.adapter is not None}
        for exercise in run.exercises[:_LOOKED_AT] if writing else ():
            made = run.work.prompt_for(writing[0], exercise)
            if made is not None and made.ids:
                prompts.append(made)
    return largest_changes(target.adapters, list(names), prompts[:_LOOKED_AT])


def _contestant(entrant: Entrant, panel: Panel, runs: Sequence[_TaskRun], changes: dict[str, float]) -> Contestant:
    items = [one.item for run in runs for one in run.answers[entrant.name].values()]
    facts = {
        **entrant.facts,
        "mark": panel.marks[entrant.adapter],
        "prompt_tokens": sum(item.prompt_tokens for item in items),
        "answer_tokens": sum(item.answer_tokens for item in items),
    }
    if entrant.adapter in changes:
        facts["largest_change"] = changes[entrant.adapter]
    return Contestant(name=entrant.name, kind=entrant.kind, facts=facts)


def _facts(target: Target, runs: Sequence[_TaskRun], panel: Panel, settings: EvaluationSettings) -> dict[str, Any]:
    """The facts of the whole. What was taken from kept answers took no time."""
    spent, base = panel.spent, target.base
    kept = how_kept(base.model, target.adapters.dtype)
    details = {
        run.task.name: {entrant.name: more for entrant in run.entrants if (more := _details(run, entrant))}
        for run in runs
    }
    return {
        "weft": __version__,
        "base": base.name,
        "dtype": kept["dtype"],
        "quantization": kept["quantization"],
        "device": str(target.adapters.device),
        "limit": settings.limit,
        "seed": settings.seed,
        "seconds": round(spent.seconds, 3),
        "tokens_read": spent.read,
        "tokens_written": spent.written,
        "tokens_per_second": round((spent.read + spent.written) / spent.seconds, 1) if spent.seconds else None,
        **({"details": details} if any(details.values()) else {}),
    }


def _details(run: _TaskRun, entrant: Entrant) -> dict[str, Any]:
    """What else metrics tell, and the first figure of every group."""
    answers = _in_order(run, entrant)
    found: dict[str, Any] = {}
    for number, (_, metric) in enumerate(run.task.metrics):
        found |= metric.details([one.replies[number] for one in answers])
    groups: dict[str, list[Answered]] = {}
    for one in answers:
        groups.setdefault(one.exercise.group, []).append(one)
    if len(groups) > 1:
        entry, metric = run.task.metrics[0]

        def figure(own: Sequence[Answered]) -> float:
            scores = [one.item.scores[entry.called] for one in own]
            return metric.figure([one.replies[0] for one in own], scores, 0).value

        found["groups"] = {name: figure(own) for name, own in groups.items()}
    return found
