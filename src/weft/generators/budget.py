"""A budget that is never overrun: the worst case of a request is reserved before it goes out, and settled after it."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from weft.errors import UserError
from weft.generators.outcome import Usage

_MILLION = 1_000_000
# A chat template and its markers, beside the text of the turns.
_PER_TURN, _PER_PROMPT = 16, 128


@dataclass(frozen=True, kw_only=True)
class Price:
    """What a million tokens cost, in one currency.

    Raises:
        UserError: A price is negative.
    """

    prompt: float = 0.0
    answer: float = 0.0

    def __post_init__(self) -> None:
        for name in ("prompt", "answer"):
            if not 0 <= getattr(self, name) < math.inf:
                raise UserError(f"the price of {name} tokens is {getattr(self, name)}; it must be 0 or more.")

    def of(self, usage: Usage) -> float:
        """What this use costs."""
        return (usage.prompt_tokens * self.prompt + usage.answer_tokens * self.answer) / _MILLION


@dataclass(frozen=True, kw_only=True)
class Budget:
    """The most that may be spent; None: no limit.

    Attributes:
        money: in the currency of the price.
        tokens: of prompts and answers together, as they are billed.
        requests: that go out, those that fail included.
        seconds: of one call of ``generate_all``. The others count over all calls with the same ledger.

    Raises:
        UserError: A limit is not more than 0.
    """

    money: float | None = None
    tokens: int | None = None
    requests: int | None = None
    seconds: float | None = None

    def __post_init__(self) -> None:
        for name in ("money", "tokens", "requests", "seconds"):
            value = getattr(self, name)
            if value is not None and not value > 0:
                raise UserError(f"the budget of {name} is {value}; it must be more than 0.")


@dataclass(frozen=True)
class Cost:
    """What was, or may be, spent."""

    money: float = 0.0
    tokens: int = 0
    requests: int = 0

    def __add__(self, other: Cost) -> Cost:
        return Cost(self.money + other.money, self.tokens + other.tokens, self.requests + other.requests)

    def __sub__(self, other: Cost) -> Cost:
        return Cost(self.money - other.money, self.tokens - other.tokens, self.requests - other.requests)


def most_prompt_tokens(prompt_bytes: int, turns: int) -> int:
    """More tokens than a prompt can have: a token stands for at least one byte, and a chat template adds a few."""
    return prompt_bytes + _PER_TURN * turns + _PER_PROMPT


class Account:
    """What a generator has spent, and what it has reserved.

    Args:
        budget: The limits.
        spent: What was spent before, by the ledger.
        clock: Seconds, which only rise.
    """

    def __init__(self, budget: Budget, spent: Cost = Cost(), clock: Callable[[], float] = time.monotonic) -> None:
        self.budget, self.spent, self.reserved = budget, spent, Cost()
        self.in_flight = 0
        self._clock, self._began = clock, clock()

    def begin(self) -> None:
        """Start the clock of a call."""
        self._began = self._clock()

    def seconds_left(self) -> float:
        """Until the time is over; infinite without a limit."""
        limit = self.budget.seconds
        return math.inf if limit is None else limit - (self._clock() - self._began)

    def lacks(self, worst: Cost) -> str:
        """The first limit that has no room for ``worst`` beside what is spent and reserved; "": all have."""
        if self.seconds_left() <= 0:
            return f"the {self.budget.seconds:g} seconds are over"
        after = self.spent + self.reserved + worst
        for name in ("money", "tokens", "requests"):
            limit, value = getattr(self.budget, name), getattr(after, name)
            if limit is not None and value > limit:
                spent, wanted = getattr(self.spent, name), getattr(worst, name)
                return f"{spent:,.6g} of {limit:,.6g} ({name}) is spent, and the next request may need {wanted:,.6g}"
        return ""

    def reserve(self, worst: Cost) -> bool:
        """Set aside the worst case of a request, if there is room for it."""
        if self.lacks(worst):
            return False
        self.reserved += worst
        self.in_flight += 1
        return True

    def settle(self, worst: Cost, actual: Cost) -> None:
        """Put what a request has cost in the place of its worst case."""
        self.in_flight -= 1
        # So that no rounding of sums remains when nothing is on its way.
        self.reserved = self.reserved - worst if self.in_flight else Cost()
        self.spent += replace(actual, requests=worst.requests)
