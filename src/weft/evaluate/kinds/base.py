"""What a kind of task is to the one who runs it: how an exercise is asked, and what an answer is."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import KW_ONLY, dataclass
from typing import ClassVar

from weft.data import Prompt
from weft.evaluate.entrants import Entrant
from weft.evaluate.metrics import Reply
from weft.evaluate.panel import Panel
from weft.evaluate.prompting import Prompter
from weft.evaluate.results import Item
from weft.evaluate.tasks import Exercise, Task
from weft.generation.target import Target

_SHOWN = 2000  # characters of a question that a reader sees


@dataclass(frozen=True)
class Answered:
    """An item, and the reply that each metric of the task scores, in their order."""

    item: Item
    replies: Sequence[Reply]
    _: KW_ONLY
    exercise: Exercise


class TaskWork(ABC):
    """The work of one task for one target.

    Attributes:
        at_once: how many exercises are asked between two times that answers are kept; None: all, which are kept one by
            one.
    """

    at_once: ClassVar[int | None] = None

    def __init__(self, target: Target, task: Task) -> None:
        self.target, self.task = target, task

    @abstractmethod
    def refusal(self, entrant: Entrant) -> str:
        """Why the entrant cannot answer such a task; "": it can."""

    def check(self, entrants: Sequence[Entrant], exercises: Sequence[Exercise]) -> None:  # noqa: B027 - not all refuse
        """Refuse what could not be answered, before anything is computed.

        Raises:
            UserError: An exercise is too long, or cannot be rendered.
        """

    @abstractmethod
    def ask(self, panel: Panel, entrants: Sequence[Entrant], exercises: Sequence[Exercise]) -> Iterator[Answered]:
        """The answers of all entrants to some exercises, in any order.

        Raises:
            UserError: One of them cannot be answered.
        """

    def prompt_for(self, entrant: Entrant, exercise: Exercise) -> Prompt | None:
        """What an entrant reads before its answer; None: nothing that tokens follow.

        Raises:
            UserError: The template refuses it.
        """
        return None

    def answered(
        self, entrant: Entrant, exercise: Exercise, replies: Sequence[Reply], *, output: str, read: int, written: int,
        number: str = "", asked: str = "", reference: str | None = None,
    ) -> Answered:  # fmt: skip
        """An answer with its scores."""
        scores = {
            entry.called: metric.score(reply) for (entry, metric), reply in zip(self.task.metrics, replies, strict=True)
        }
        if reference is None:
            reference = exercise.answer if len(exercise.references) < 2 else "\n".join(exercise.references)
        item = Item(
            contestant=entrant.name, task=self.task.name, item=exercise.item + number, scores=scores, output=output,
            reference=reference, asked=(asked or exercise.prompts[0])[-_SHOWN:], prompt_tokens=read,
            answer_tokens=written,
        )  # fmt: skip
        return Answered(item, replies, exercise=exercise)

    def prompter(self) -> Prompter:
        """What makes its prompts.

        Raises:
            UserError: The task needs a chat template, and none is known.
        """
        return Prompter(self.target, self.task)
