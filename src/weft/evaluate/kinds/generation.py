"""Texts that are written, turn by turn where a question has several."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from weft.data import Prompt
from weft.evaluate.entrants import Entrant
from weft.evaluate.kinds.base import Answered, TaskWork
from weft.evaluate.metrics import Reply
from weft.evaluate.panel import Ask, Panel, request_key
from weft.evaluate.tasks import Exercise, Task
from weft.evaluate.tasks.extraction import extracted
from weft.generation.request import Request
from weft.generation.target import Target


class Generation(TaskWork):
    """All entrants write in the same engine; every answer is kept as soon as it has ended."""

    def __init__(self, target: Target, task: Task) -> None:
        super().__init__(target, task)
        self.prompts = self.prompter()

    def refusal(self, entrant: Entrant) -> str:
        return "" if writes(self.target, entrant) else "it writes no text"

    def check(self, entrants: Sequence[Entrant], exercises: Sequence[Exercise]) -> None:
        for entrant in entrants:
            frames = [entrant.frame(self.task, exercise) for exercise in exercises]
            for exercise, frame in self.prompts.longest(exercises, frames):
                read = len(self.prompts.prompt(frame, exercise).ids)
                limit = self.task.settings.max_new_tokens
                self.prompts.check_length(entrant.adapter, exercise, frame, read, limit)

    def prompt_for(self, entrant: Entrant, exercise: Exercise) -> Prompt:
        return self.prompts.prompt(entrant.frame(self.task, exercise), exercise)

    def ask(self, panel: Panel, entrants: Sequence[Entrant], exercises: Sequence[Exercise]) -> Iterator[Answered]:
        said: dict[tuple[str, str], tuple[str, ...]] = {}
        for turn in range(max(len(exercise.prompts) for exercise in exercises)):
            places = [
                (exercise, entrant) for exercise in exercises if turn < len(exercise.prompts) for entrant in entrants
            ]
            asks = [self._asked(e, x, said.get((e.name, x.item), ())) for x, e in places]
            for place, (text, read, written) in panel.write(asks):
                exercise, entrant = places[place]
                key = (entrant.name, exercise.item)
                said[key] = (*said.get(key, ()), text)
                yield self._answered(entrant, exercise, text, turn, read=read, written=written)

    def _asked(self, entrant: Entrant, exercise: Exercise, said: Sequence[str]) -> Ask:
        frame, settings = entrant.frame(self.task, exercise), self.task.settings
        prompt = self.prompts.prompt(frame, exercise, said)
        self.prompts.check_length(entrant.adapter, exercise, frame, len(prompt.ids), settings.max_new_tokens)
        request = Request(
            prompt.ids, entrant.adapter, settings.max_new_tokens, slots=prompt.slots, stop=tuple(settings.stop)
        )
        return Ask(entrant.adapter, request_key(request), request)

    def _answered(
        self, entrant: Entrant, exercise: Exercise, text: str, turn: int, *, read: int, written: int
    ) -> Answered:
        reply = Reply(text, exercise.references, fields=exercise.record.fields)
        replies = [
            replace(reply, text=extracted(text, entry.extract or self.task.settings.extract))
            for entry, _ in self.task.metrics
        ]
        number = f"/{turn + 1}" if self.task.settings.turns is not None else ""
        return self.answered(
            entrant, exercise, replies, output=text, read=read, written=written, number=number,
            asked=exercise.prompts[turn],
        )  # fmt: skip


def writes(target: Target, entrant: Entrant) -> bool:
    """Whether an entrant writes text."""
    return target.adapters.architecture.writes and target.adapters.head(entrant.adapter).writes
