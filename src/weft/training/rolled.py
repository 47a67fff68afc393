"""Answers that a policy wrote, as its job learns from them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, replace
from typing import Any

from weft.data import Sample


@dataclass(frozen=True)
class Ask:
    """A prompt that an adapter is to answer."""

    adapter: str | None
    prompt: Sequence[int]
    _: KW_ONLY
    slots: Sequence[int]
    max_new_tokens: int
    temperature: float
    top_p: float
    top_k: int
    seed: int


@dataclass(frozen=True)
class Written:
    """An answer: its ids with the end token, if it has one, each with its log-probability; and its text."""

    ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    ended: bool
    text: str


Write = Callable[[Sequence[Ask]], list[Written]]


@dataclass(frozen=True, slots=True)
class Rolled(Sample):
    """A prompt with the answers that the policy wrote.

    All have an entry per learned token of all answers: ``advantages``, how much better than expected it was; ``old``,
    its log-probability when it was written (empty: under the policy as it is now); for a value function ``values``,
    what was expected then, and ``returns``, what came.
    """

    advantages: tuple[float, ...] = ()
    old: tuple[float, ...] = ()
    values: tuple[float, ...] = ()
    returns: tuple[float, ...] = ()


_TOLD = ("advantages", "old", "values", "returns")


class RolledBatches:
    """The passes of a job's step over answers of its own, and the step at which they were written.

    They stay for ``num_iterations`` steps; a checkpoint in between holds them.
    """

    def __init__(self) -> None:
        self.written_at: int | None = None
        self.passes: list[list[Rolled]] = []
        self.figures: dict[str, float] = {}

    def put(self, step: int, passes: list[list[Rolled]], figures: Mapping[str, float]) -> None:
        """Take the answers that were written at a step, and what there is to watch of them."""
        self.written_at, self.passes, self.figures = step, passes, dict(figures)

    def micro_batches(self, step: int) -> list[list[Sample]]:
        """The passes of a step. At the first one the policy still is the one that wrote: its ratios are exactly 1."""
        first = step == self.written_at
        return [[replace(one, old=()) if first else one for one in micro] for micro in self.passes]

    def state(self) -> dict[str, Any]:
        """All of it as JSON holds it."""
        names = ("input_ids", "weights", "slots", "branches", *_TOLD)
        rows = [[{name: list(getattr(one, name)) for name in names} for one in micro] for micro in self.passes]
        return {"written_at": self.written_at, "passes": rows, "figures": self.figures}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Put back what ``state`` gave."""
        passes = [
            [
                Rolled(
                    row["input_ids"],
                    row["weights"],
                    "an answer of its own",
                    slots=tuple(row["slots"]),
                    branches=tuple(row["branches"]),
                    advantages=tuple(row["advantages"]),
                    old=tuple(row["old"]),
                    values=tuple(row["values"]),
                    returns=tuple(row["returns"]),
                )
                for row in micro
            ]
            for micro in state["passes"]
        ]
        self.written_at, self.passes, self.figures = state["written_at"], passes, dict(state["figures"])
