"""Forgetting: text of a base's own kind, for its loss before and after; tasks that it could do; what it refuses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from weft.data import PlainText, Renderer, Sample
from weft.errors import UserError
from weft.evaluate.behaviour import refusal
from weft.evaluate.results import Item, Results, TaskRecord

# From this score on an answer is right; most scores are 0 or 1.
_RIGHT = 0.5


def read_documents(path: str | Path) -> list[str]:
    """One document per line; a line break inside one is written as ``\\n``."""
    lines = Path(path).read_text(encoding="utf-8").splitlines()
    return [line.replace("\\n", "\n") for line in lines if line.strip()]


def text_samples(renderer: Renderer, documents: Sequence[str]) -> list[Sample]:
    """Plain-text samples in which every token counts."""
    return [renderer.sample(PlainText(text, f"document {i + 1}")) for i, text in enumerate(documents)]


@dataclass(frozen=True, kw_only=True)
class TaskChange:
    """What one contestant makes of a task beside another, the base, on the items that both were asked.

    Attributes:
        items: how many these are.
        base_right: how many the base had right.
        lost, gained: the items that the base had right and the other has not, and the other way round.
        base_refusals, refusals: how many answers refuse; None: the task asks for no text.
        refused, unrefused: the items that only the other refuses, and those that only the base does.
    """

    task: str
    items: int
    base_right: int
    lost: tuple[str, ...]
    gained: tuple[str, ...]
    base_refusals: int | None
    refusals: int | None
    refused: tuple[str, ...]
    unrefused: tuple[str, ...]

    @property
    def share_lost(self) -> float | None:
        """Of the items that the base had right, the share that is lost; None: it had none."""
        return len(self.lost) / self.base_right if self.base_right else None

    @property
    def share_lost_stderr(self) -> float | None:
        """The binomial standard error of ``share_lost``."""
        share = self.share_lost
        return None if share is None else math.sqrt(share * (1 - share) / self.base_right)

    @property
    def refusal_change(self) -> float | None:
        """The rate of refusals minus the base's, on the same items."""
        if self.refusals is None or self.base_refusals is None:
            return None
        return (self.refusals - self.base_refusals) / self.items

    @property
    def refusal_change_stderr(self) -> float | None:
        """Its standard error, of paired differences."""
        change = self.refusal_change
        if change is None or self.items < 2:
            return None
        squares = len(self.refused) + len(self.unrefused)
        return math.sqrt(max(0.0, squares / self.items - change**2) / (self.items - 1))


def task_changes(results: Results, base: str, other: str, *, phrases: Sequence[str] | None = None) -> list[TaskChange]:
    """What a contestant has lost of each task that the base could do, and how much more it refuses.

    An item is right if the task's own metric gives it a half or more. Tasks of losses have no right items and are left
    out. ``phrases`` are those of a refusal, as ``weft.evaluate.behaviour.read_phrases`` gives them.

    Raises:
        UserError: A contestant is not there, both are the same, or no item was asked of both.
    """
    names = [one.name for one in results.contestants]
    for name in (base, other):
        if name not in names:
            raise UserError(f"there is no contestant '{name}'. There are: {', '.join(names)}.")
    if base == other:
        raise UserError(f"'{base}' cannot be compared with itself.")
    found = []
    for task in results.tasks:
        if task.kind == "perplexity" or not task.higher_is_better:
            continue
        first, second = (
            {item.item: item for item in results.items if (item.contestant, item.task) == (name, task.name)}
            for name in (base, other)
        )
        if shared := [key for key in first if key in second]:
            found.append(_change(task, [(first[key], second[key]) for key in shared], phrases))
    if not found:
        raise UserError(f"no item with a right answer was asked of both '{base}' and '{other}'.")
    return found


def _change(task: TaskRecord, pairs: Sequence[tuple[Item, Item]], phrases: Sequence[str] | None) -> TaskChange:
    def only(marks: Sequence[tuple[bool, bool]], wanted: tuple[bool, bool]) -> tuple[str, ...]:
        return tuple(pair[0].item for pair, mark in zip(pairs, marks, strict=True) if mark == wanted)

    right = [(_is_right(one, task), _is_right(two, task)) for one, two in pairs]
    writes = task.kind == "generation"
    refusing = [tuple(refusal(item.output, phrases=phrases) > 0 for item in pair) for pair in pairs if writes]
    marks = [(one, two) for one, two in refusing] if writes else [(False, False)] * len(pairs)
    return TaskChange(
        task=task.name,
        items=len(pairs),
        base_right=sum(one for one, _ in right),
        lost=only(right, (True, False)),
        gained=only(right, (False, True)),
        base_refusals=sum(one for one, _ in marks) if writes else None,
        refusals=sum(two for _, two in marks) if writes else None,
        refused=only(marks, (False, True)),
        unrefused=only(marks, (True, False)),
    )


def _is_right(item: Item, task: TaskRecord) -> bool:
    if task.metric not in item.scores:
        raise UserError(
            f"item {item.item} of task {task.name} has no score '{task.metric}'; it has: {', '.join(item.scores)}."
        )
    return item.scores[task.metric] >= _RIGHT
