"""Our own engine as a generator: the base or any adapter of a target answers, many requests in one batch."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
import time
from collections.abc import Sequence
from functools import partial
from typing import Any

from weft.data import Prompt
from weft.errors import UserError
from weft.generation import Request
from weft.generation.completed import completed
from weft.generation.constraint import Constraint
from weft.generation.contents import contents
from weft.generation.limits import limits_for
from weft.generation.request import Completion
from weft.generation.target import Target
from weft.generators.budget import Cost
from weft.generators.generator import Book, Generator
from weft.generators.outcome import Failure, Generated, Usage, checked
from weft.generators.request import Draw, GeneratorRequest

_KEPT = 100_000  # rendered prompts


class LocalGenerator(Generator):
    """The base of a target, or one of its adapters.

    Args:
        target: What is open. The generator does not close it.
        adapter: Who answers; None: the base.
        rows: Answers that are written at once.
        options: Those of ``Generator``.

    Raises:
        UserError: There is no such adapter.
    """

    billed = False

    def __init__(self, target: Target, adapter: str | None = None, *, rows: int = 64, **options: Any) -> None:
        self.target, self.adapter, self._rows = target, target.adapter(adapter), rows
        self._prompts: dict[int, tuple[GeneratorRequest, Prompt]] = {}
        parts = {**contents(target, [self.adapter]), "template": target.renderer.template.text}
        mark = hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]
        super().__init__(f"{target.base.name}#{self.adapter or 'base'}@{mark}", **options)
        self.keeps_schemas = importlib.util.find_spec("llguidance") is not None

    @property
    def said(self) -> str:
        return self.model.rpartition("@")[0]

    def worst_usage(self, request: GeneratorRequest) -> Usage:
        return Usage(len(self._prompt(request).ids), request.max_tokens)

    def _prompt(self, request: GeneratorRequest) -> Prompt:
        """The prompt of a request, which is asked for several times and rendered once."""
        kept = self._prompts.get(id(request))
        if kept is None or kept[0] is not request:
            if len(self._prompts) >= _KEPT:
                self._prompts.clear()
            kept = self._prompts[id(request)] = request, self.target.prompt(request.turns)
        return kept[1]

    def _check(self, request: GeneratorRequest, what: str) -> None:
        self.target.room(len(self._prompt(request).ids), self.adapter, request.max_tokens, what=what)
        if request.schema is not None and not self.keeps_schemas:
            raise UserError('constrained answers need llguidance: pip install "weft[constrain]".')

    def _produce(self, draws: Sequence[Draw], book: Book) -> None:
        left = list(draws)
        while left and book.stopped is None:
            part: list[tuple[Draw, Cost]] = []
            while left and self.account.reserve(worst := self._worst(left[0].request)):
                part.append((left.pop(0), worst))
            if not part:
                book.stop(self._out_of_budget(worst))
                return
            self._write(part, book)

    def _write(self, part: Sequence[tuple[Draw, Cost]], book: Book) -> None:
        """Answer draws whose worst case is reserved."""
        requests = [self._request(draw) for draw, _ in part]
        with self.target.engine(limits_for(self.target.adapters, requests, self._rows)) as engine:
            for place, done in completed(engine, requests):
                draw, worst = part[place]
                outcome = self._read(draw, done)
                if isinstance(outcome, Failure):
                    book.attempt_failed(draw, outcome, worst, self.price)
                    (book.stop if outcome.kind == "budget" else partial(book.give_up, draw))(outcome)
                else:
                    book.answer(draw, outcome, worst)

    def _request(self, draw: Draw) -> Request:
        request, prompt = draw.request, self._prompt(draw.request)
        left = self.account.seconds_left()
        return Request(
            prompt.ids,
            self.adapter,
            request.max_tokens,
            sampling=draw.sampling(),
            slots=prompt.slots,
            stop=request.stop,
            constraint=None if request.schema is None else Constraint.json_schema(request.schema),
            deadline=None if math.isinf(left) else time.monotonic() + left,
        )

    def _read(self, draw: Draw, done: Completion) -> Generated | Failure:
        usage = Usage(done.prompt_tokens, len(done.ids))
        if done.finish_reason == "deadline":
            return Failure("budget", "the budget is used up: its seconds are over", usage=usage, billed=True)
        reason = done.finish_reason if done.finish_reason in ("stop", "length") else "none"
        made = Generated(done.text.strip(), reason, usage=usage, model=self.said, money=self.price.of(usage))
        return checked(draw.request, made)
