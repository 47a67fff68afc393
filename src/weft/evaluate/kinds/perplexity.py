"""Whole texts: how likely they are."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from weft.data import Prompt
from weft.evaluate.encoding import encode, prefix_token
from weft.evaluate.entrants import Entrant
from weft.evaluate.kept_answers import key_of
from weft.evaluate.kinds.base import Answered, TaskWork
from weft.evaluate.kinds.generation import writes
from weft.evaluate.metrics import Reply
from weft.evaluate.panel import Ask, Panel, code_mark
from weft.evaluate.tasks import Exercise, Task
from weft.generation.target import Target

_USUAL_LENGTH = 2048  # of a window, where the base names none, as in lm_eval


class TextPerplexity(TaskWork):
    """Texts are read in windows of what the base reads at once; every token is predicted once."""

    at_once = 64

    def __init__(self, target: Target, task: Task) -> None:
        super().__init__(target, task)
        self.prefix = prefix_token(target.renderer.tokenizer)
        self.length = target.adapters.architecture.max_length or _USUAL_LENGTH

    def refusal(self, entrant: Entrant) -> str:
        return "" if writes(self.target, entrant) else "it writes no text, so that no text has a likelihood"

    def prompt_for(self, entrant: Entrant, exercise: Exercise) -> Prompt:
        return Prompt(encode(self.target.renderer.tokenizer, exercise.prompts[0], special=False))

    def ask(self, panel: Panel, entrants: Sequence[Entrant], exercises: Sequence[Exercise]) -> Iterator[Answered]:
        tokenizer = self.target.renderer.tokenizer
        encoded = [encode(tokenizer, exercise.prompts[0], special=False) for exercise in exercises]
        keys = [key_of("panel.weigh", code_mark(), ids, self.prefix, self.length) for ids in encoded]
        places = [(number, entrant) for number in range(len(exercises)) for entrant in entrants]
        asks = [Ask(entrant.adapter, keys[number], encoded[number]) for number, entrant in places]
        for place, logprob in panel.weigh(asks, self.prefix, self.length):
            number, entrant = places[place]
            exercise, count = exercises[number], len(encoded[number])
            reply = Reply(exercise.prompts[0], fields=exercise.record.fields, logprobs=(logprob,), tokens=max(1, count))
            replies = [reply] * len(self.task.metrics)
            yield self.answered(entrant, exercise, replies, output="", read=count, written=0)
