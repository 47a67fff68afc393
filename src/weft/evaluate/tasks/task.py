"""A task that can be asked: its settings with its exercises, and the examples that stand before each."""

from __future__ import annotations

import random
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from itertools import islice
from typing import Any

from weft.errors import UserError
from weft.evaluate.kept_answers import key_of
from weft.evaluate.metrics import Metric
from weft.evaluate.results import TaskRecord
from weft.evaluate.tasks.exercises import Exercise
from weft.evaluate.tasks.settings import MetricEntry, TaskSettings
from weft.ops.seeds import stable_seed


@dataclass(frozen=True)
class Frame:
    """What stands around a question: a system message, an instruction before all, and examples with their answers."""

    examples: tuple[Exercise, ...] = ()
    _: KW_ONLY
    instruction: str = ""
    system: str = ""


@dataclass(frozen=True, kw_only=True)
class Task:
    """A task with its exercises.

    Attributes:
        pool: the exercises that examples are taken from.
        shots: how many examples stand before each question.
        seed: of examples that are drawn.
        source: where its data came from, as the user knows it.
    """

    settings: TaskSettings
    exercises: Sequence[Exercise]
    pool: Sequence[Exercise] = ()
    shots: int = 0
    seed: int = 0
    source: str = ""
    _by_group: dict[str, list[Exercise]] = field(default_factory=dict, init=False)
    _frames: dict[str, Frame] = field(default_factory=dict, init=False)

    def __post_init__(self) -> None:
        for exercise in self.pool:
            self._by_group.setdefault(exercise.group, []).append(exercise)
        self._check_pool()

    @property
    def name(self) -> str:
        """What it is called."""
        return self.settings.name

    @cached_property
    def metrics(self) -> list[tuple[MetricEntry, Metric]]:
        """Its metrics, each with its entry; the first counts first."""
        return [(entry, entry.made(self.name)) for entry in self.settings.metrics]

    def frame(self, exercise: Exercise) -> Frame:
        """What the task itself puts around a question."""
        if exercise.item not in self._frames:
            examples = self._examples(exercise)
            made = Frame(examples, instruction=exercise.instruction, system=exercise.system)
            self._frames[exercise.item] = made
        return self._frames[exercise.item]

    def _others(self, exercise: Exercise) -> Iterator[Exercise]:
        """The exercises that may be examples before this one: those of its group that do not ask the same."""
        return (one for one in self._by_group.get(exercise.group, ()) if one.prompts != exercise.prompts)

    def _examples(self, exercise: Exercise) -> tuple[Exercise, ...]:
        if self.settings.few_shot.pick == "first" or not self.shots:
            return tuple(islice(self._others(exercise), self.shots))
        known = list(self._others(exercise))
        return tuple(random.Random(stable_seed(self.seed, self.name, exercise.item)).sample(known, self.shots))

    def _check_pool(self) -> None:
        if not self.shots:
            return
        for group in dict.fromkeys(exercise.group for exercise in self.exercises):
            first = next(exercise for exercise in self.exercises if exercise.group == group)
            if (count := sum(1 for _ in self._others(first))) < self.shots:
                of = f" of {group}" if group else ""
                raise UserError(
                    f"task {self.name}: {self.shots} examples{of} are wanted, and there are {count}. Give a smaller "
                    "--num-fewshot, or other data for examples (few_shot: data)."
                )

    def limited(self, limit: int | None) -> list[Exercise]:
        """The first exercises; where there are groups, taken in turn from each of them, in the order of the files."""
        if limit is None or limit >= len(self.exercises):
            return list(self.exercises)
        by_group: dict[str, list[int]] = {}
        for place, exercise in enumerate(self.exercises):
            by_group.setdefault(exercise.group, []).append(place)
        order = sorted((turn, place) for places in by_group.values() for turn, place in enumerate(places))
        return [self.exercises[place] for place in sorted(place for _, place in order[:limit])]

    @cached_property
    def data_hash(self) -> str:
        """A hash of all that it asks, of its answers and of its examples."""
        return key_of([one.content() for one in self.exercises], [one.content() for one in self.pool])

    def record(self, limit: int | None) -> TaskRecord:
        """What it is, for the results."""
        entry, metric = self.metrics[0]
        return TaskRecord(
            name=self.name,
            kind=self.settings.kind,
            metric=entry.called,
            higher_is_better=metric.higher_is_better,
            facts={
                "by": "weft",
                "source": self.source,
                "limit": limit,
                "data_sha256": self.data_hash,
                "num_fewshot": self.shots,
                **({"seed": self.seed} if self.settings.few_shot.pick == "random" else {}),
                "chat_template": self.settings.chat,
                "config": self._config(),
            },
        )

    def _config(self) -> Mapping[str, Any]:
        """Its settings, but for places of files."""
        found = self.settings.model_dump(mode="json", exclude={"name", "description", "data", "files"})
        found["few_shot"].pop("data")
        return found
