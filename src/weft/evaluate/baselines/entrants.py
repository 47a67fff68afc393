"""The words of ``--prompting`` as entrants: the base with other examples, or another instruction, around a question.

Examples come from a task's own (``few_shot: data``, ``--fewshot-data``), never from the questions that are scored,
unless the user says ``same``.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

from weft.errors import UserError
from weft.evaluate.baselines.search import SearchSettings, searched
from weft.evaluate.baselines.similarity import Similarity
from weft.evaluate.baselines.wanted import How, Wanted
from weft.evaluate.entrants import Entrant, facts_of
from weft.evaluate.tasks import Exercise, Frame, Named, Task
from weft.generation.target import Target
from weft.ops.seeds import stable_seed


def pools_of(wanted: Sequence[Wanted], named: Sequence[Named], seed: int = 0) -> dict[str, Sequence[Exercise]]:
    """By task the exercises that examples are taken from, as far as they are needed.

    Raises:
        UserError: A task has none.
    """
    if not any(one.needs_examples for one in wanted):
        return {}
    return {one.settings.name: one.load(num_fewshot=1, seed=seed).pool for one in named}


def prompting_entrants(
    target: Target,
    wanted: Sequence[Wanted],
    tasks: Sequence[Task],
    pools: Mapping[str, Sequence[Exercise]],
    *,
    seed: int = 0,
    search: SearchSettings = SearchSettings(),
    on_note: Callable[[str], None] = lambda note: None,
) -> list[Entrant]:
    """The entrants for what is wanted; a searched instruction is looked for now, one for each task.

    Args:
        pools: By task the exercises that examples are taken from (``pools_of``).
        seed: Of examples that are drawn, and of the search.

    Raises:
        UserError: A task has too few examples, or the base cannot be asked so.
    """
    facts, found = facts_of(target, None), []
    for one in wanted:
        told: dict[str, object] = {"prompting": one.how, "count": one.count}
        frame: Callable[[Task, Exercise], Frame]
        if one.how == "instruction":
            frame, told["instruction"] = Instruction({}, one.text), one.text
        elif one.how == "search":
            own = replace(search, proposals=one.count, seed=seed)
            results = {task.name: searched(target, task, pools[task.name], own, on_note=on_note) for task in tasks}
            frame = Instruction({name: result.instruction for name, result in results.items()})
            told |= {"searched": {name: result.entries() for name, result in results.items()}}
        else:
            frame = Examples(one.how, one.count, pools, seed=seed)
            for task in tasks:
                frame.check(task)
        found.append(Entrant(one.name, None, "prompt", frame=frame, facts={**facts, **told}))
    return found


@dataclass(frozen=True)
class Instruction:
    """A frame with another instruction: by task, or one for all."""

    by_task: Mapping[str, str]
    otherwise: str = ""

    def __call__(self, task: Task, exercise: Exercise) -> Frame:
        """The frame of an exercise."""
        return replace(task.frame(exercise), instruction=self.by_task.get(task.name, self.otherwise))


@dataclass(frozen=True)
class Examples:
    """A frame with other examples: the first ones, drawn ones, or those most like the question, nearest last."""

    how: How
    count: int
    pools: Mapping[str, Sequence[Exercise]]
    _: KW_ONLY
    seed: int = 0
    _known: dict[tuple[str, str], Similarity] = field(default_factory=dict, init=False, repr=False)
    _made: dict[tuple[str, str], tuple[Exercise, ...]] = field(default_factory=dict, init=False, repr=False)

    def __call__(self, task: Task, exercise: Exercise) -> Frame:
        """The frame of an exercise."""
        key = task.name, exercise.item
        if key not in self._made:
            self._made[key] = self._chosen(task, exercise)
        return replace(task.frame(exercise), examples=self._made[key])

    def check(self, task: Task) -> None:
        """Refuse a task with too few examples.

        Raises:
            UserError: It has.
        """
        for group in dict.fromkeys(exercise.group for exercise in task.exercises):
            first = next(exercise for exercise in task.exercises if exercise.group == group)
            if (count := len(self._places(task, first))) < self.count:
                of = f" of {group}" if group else ""
                raise UserError(
                    f"--prompting {self.how}:{self.count}: task {task.name} has {count} examples{of}. Give a smaller "
                    "number, or more of them with --fewshot-data."
                )

    def _places(self, task: Task, exercise: Exercise) -> list[int]:
        """The places in the pool of those that may stand before an exercise."""
        pool = self.pools[task.name]
        return [
            place
            for place, one in enumerate(pool)
            if one.group == exercise.group and one.prompts != exercise.prompts
        ]

    def _chosen(self, task: Task, exercise: Exercise) -> tuple[Exercise, ...]:
        pool, places = self.pools[task.name], self._places(task, exercise)
        if self.how == "random":
            places = random.Random(stable_seed(self.seed, task.name, exercise.item)).sample(places, self.count)
        elif self.how == "similar":
            near = self._similarity(task).likeness(exercise.prompts[0])
            places = sorted(places, key=lambda place: (-near.get(place, 0.0), place))[: self.count][::-1]
        return tuple(pool[place] for place in places[: self.count])

    def _similarity(self, task: Task) -> Similarity:
        key = task.name, self.how
        if key not in self._known:
            self._known[key] = Similarity([one.prompts[0] for one in self.pools[task.name]])
        return self._known[key]
