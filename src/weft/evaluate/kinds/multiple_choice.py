"""Choices by their likelihood."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weft.data import Prompt
from weft.evaluate.entrants import Entrant
from weft.evaluate.kept_answers import key_of
from weft.evaluate.kinds.base import Answered, TaskWork
from weft.evaluate.kinds.generation import writes
from weft.evaluate.metrics import Reply
from weft.evaluate.panel import Ask, Panel, code_mark
from weft.evaluate.questions import Continuation
from weft.evaluate.tasks import Exercise, Task
from weft.generation.target import Target


class MultipleChoice(TaskWork):
    """The choices of all entrants are scored in the same passes; those of a question read it once."""

    at_once = 256

    def __init__(self, target: Target, task: Task) -> None:
        super().__init__(target, task)
        self.prompts = self.prompter()

    def refusal(self, entrant: Entrant) -> str:
        return "" if writes(self.target, entrant) else "it writes no text, so that no choice has a likelihood"

    def check(self, entrants: Sequence[Entrant], exercises: Sequence[Exercise]) -> None:
        for entrant in entrants:
            frames = [entrant.frame(self.task, exercise) for exercise in exercises]
            for exercise, _ in self.prompts.longest(exercises, frames):
                self._continuations(entrant, exercise)

    def _continuations(self, entrant: Entrant, exercise: Exercise) -> list[Continuation]:
        frame = entrant.frame(self.task, exercise)
        found = self.prompts.continuations(frame, exercise)
        longest = max(found, key=lambda one: len(one.context) + len(one.ids))
        # The last token is predicted and not read.
        self.prompts.check_length(entrant.adapter, exercise, frame, len(longest.context), len(longest.ids) - 1)
        return found

    def prompt_for(self, entrant: Entrant, exercise: Exercise) -> Prompt:
        return self.prompts.prompt(entrant.frame(self.task, exercise), exercise)

    def ask(self, panel: Panel, entrants: Sequence[Entrant], exercises: Sequence[Exercise]) -> Iterator[Answered]:
        places: list[tuple[Entrant, Exercise]] = []
        asks: list[Ask] = []
        for exercise in exercises:
            known: list[tuple[object, list[Continuation], str]] = []  # of each frame, which entrants may share
            for entrant in entrants:
                frame = entrant.frame(self.task, exercise)
                same = next((one for one in known if one[0] == frame), None)
                if same is None:
                    found = self._continuations(entrant, exercise)
                    parts = [(list(one.context), list(one.ids), list(one.slots)) for one in found]
                    key = key_of("panel.choose", code_mark(), parts[0][0], parts[0][2], [one[:2] for one in parts])
                    same = (frame, found, key)
                    known.append(same)
                places.append((entrant, exercise))
                asks.append(Ask(entrant.adapter, same[2], same[1]))
        for place, logprobs in panel.choose(asks):
            entrant, exercise = places[place]
            reply = Reply(
                None, exercise.references, fields=exercise.record.fields, choices=exercise.choices,
                right=exercise.right, logprobs=logprobs,
            )  # fmt: skip
            chosen = max(range(len(logprobs)), key=lambda n: logprobs[n])
            found = asks[place].what
            yield self.answered(
                entrant, exercise, [reply] * len(self.task.metrics), output=exercise.choices[chosen],
                read=len(found[0].context), written=sum(len(one.ids) for one in found),
            )  # fmt: skip
