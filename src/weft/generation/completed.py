"""Answers to many requests, each as soon as it has ended."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import islice

from weft.generation.engine import Engine
from weft.generation.request import Answer, Completion, Request


def completed(engine: Engine, requests: Sequence[Request]) -> Iterator[tuple[int, Completion]]:
    """Answer all; gives each completion with its request's place, in the order in which they end.

    The engine is handed a few more requests than it has rows, so that its work for each step does not grow with their
    number.

    Raises:
        UserError: A request cannot be answered. Those before it may have been given.
    """
    todo = iter(enumerate(requests))
    running: dict[int, Answer] = {}
    try:
        while True:
            for place, request in islice(todo, max(0, 2 * engine.limits.max_rows - len(running))):
                running[place] = engine.submit(request)
            if not running:
                return
            engine.step()
            for place in [place for place, answer in running.items() if answer.done]:
                yield place, running.pop(place).result()
    finally:
        for answer in running.values():
            answer.cancel()
