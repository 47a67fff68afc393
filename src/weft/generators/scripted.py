"""A generator that a function is: rules in the place of a model, for tests and for trials of a pipeline."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from weft.data import Message
from weft.generators.generator import Book, Generator
from weft.generators.outcome import Failure, Generated, Usage, checked
from weft.generators.request import Draw

# (the conversation, the seed of the answer) -> its text
Script = Callable[[Sequence[Message], int], str]


class ScriptedGenerator(Generator):
    """Lets a function answer. ``options`` are those of ``Generator``. A token is a word here."""

    def __init__(self, script: Script, model: str = "script", **options: Any) -> None:
        super().__init__(model, **options)
        self._script = script

    def _produce(self, draws: Sequence[Draw], book: Book) -> None:
        for draw in draws:
            worst = self._worst(draw.request)
            if not self.account.reserve(worst):
                book.stop(self._out_of_budget(worst))
                return
            book.send(draw, worst)
            outcome = self._answer(draw)
            if isinstance(outcome, Failure):
                book.attempt_failed(draw, outcome, worst, self.price)
                book.give_up(draw, outcome)
            else:
                book.answer(draw, outcome, worst)
            if book.stopped is not None:
                return

    def _answer(self, draw: Draw) -> Generated | Failure:
        text = self._script(draw.request.turns, draw.sampling().seed)
        usage = Usage(sum(len(turn.content.split()) for turn in draw.request.turns), len(text.split()))
        return checked(draw.request, Generated(text, usage=usage, model=self.model, money=self.price.of(usage)))
