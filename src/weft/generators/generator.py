"""The one way to have text generated: requests in, answers or failures out, through a ledger and a budget."""

from __future__ import annotations

import abc
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Self

from weft.data import Message
from weft.errors import UserError
from weft.generation.sampling import Sampling
from weft.generators.budget import Account, Budget, Cost, Price, most_prompt_tokens
from weft.generators.ledger import Ledger
from weft.generators.outcome import FATAL, Failure, Generated, Usage, schema_checker
from weft.generators.request import Draw, GeneratorRequest, draws_of

Outcome = Generated | Failure
# (place of the request, which of its answers, what became of it)
OnResult = Callable[[int, int, Outcome], None]

# After so many draws that failed, one after the other and without an answer between them, no more is paid for.
_IN_A_ROW = 20


class GeneratorError(UserError):
    """No request can be answered now. What was answered before is in the ledger, and the same call goes on from there.

    Attributes:
        failure: that of the first request that met it.
    """

    def __init__(self, message: str, failure: Failure) -> None:
        super().__init__(message)
        self.failure = failure


@dataclass(frozen=True, kw_only=True)
class Estimate:
    """What a call will take at most.

    Attributes:
        answers, cached: that are wanted, and of them those that the ledger has.
        prompt_tokens, answer_tokens: at most, of those that are not there.
        money: at most, in the currency of the price.
    """

    answers: int
    cached: int
    prompt_tokens: int
    answer_tokens: int
    money: float


class Book:
    """The bookkeeping of one call: what is to do, what is spent, what has come."""

    def __init__(
        self, ledger: Ledger, account: Account, hear: Callable[[Draw, Outcome], None], *, billed: bool
    ) -> None:
        """``billed``: whether a request that is lost may cost something, and so is written down before it goes."""
        self.account, self._ledger, self._hear, self._billed = account, ledger, hear, billed
        self.stopped: Failure | None = None
        self.answered = 0
        self._failed_in_a_row = 0

    def send(self, draw: Draw, worst: Cost) -> None:
        """Write down that a reserved request goes out."""
        if self._billed:
            self._ledger.sent(draw, worst)

    def answer(self, draw: Draw, found: Generated, worst: Cost) -> None:
        """Keep an answer, and settle what it has cost."""
        cost = Cost(found.money, found.usage.tokens, worst.requests)
        self._ledger.answer(draw, found, cost, paid=self._billed)
        self.account.settle(worst, cost)
        self.answered += 1
        self._failed_in_a_row = 0
        self._hear(draw, found)

    def attempt_failed(self, draw: Draw, failure: Failure, worst: Cost, price: Price) -> None:
        """Settle what a failed attempt has cost: what the server says, the worst case, or nothing."""
        if failure.usage is not None:
            cost = Cost(price.of(failure.usage), failure.usage.tokens, worst.requests)
        else:
            cost = worst if failure.billed else Cost(requests=worst.requests)
        if self._billed:
            self._ledger.failure(draw, failure, cost)
        self.account.settle(worst, cost)
        if failure.kind in FATAL:
            self.stop(failure)

    def give_up(self, draw: Draw, failure: Failure) -> None:
        """A draw has failed for good in this call."""
        self._failed_in_a_row += 1
        if failure.kind == "unreachable" or self._failed_in_a_row >= _IN_A_ROW:
            self.stop(failure)
        self._hear(draw, failure)

    def stop(self, failure: Failure) -> None:
        """Begin nothing more."""
        self.stopped = self.stopped or failure


class Generator(abc.ABC):
    """Who writes text.

    Args:
        model: By which the ledger knows who answered.
        ledger: Keeps answers and costs; default: in memory alone.
        budget: The most that may be spent.
        price: Of tokens.
        clock: Seconds, which only rise.
    """

    # Whether a request that is lost may have cost money.
    billed = True
    # Whether answers can be held to a JSON schema.
    keeps_schemas = True

    def __init__(
        self,
        model: str,
        *,
        ledger: Ledger | None = None,
        budget: Budget = Budget(),
        price: Price = Price(),
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.model, self.price = model, price
        self.ledger = Ledger() if ledger is None else ledger
        self.account = Account(budget, self.ledger.spent, clock)

    @abc.abstractmethod
    def _produce(self, draws: Sequence[Draw], book: Book) -> None:
        """Answer draws, each of which the book hears of once, or stop the book."""

    @property
    def said(self) -> str:
        """Who answers, for people."""
        return self.model

    def generate(
        self,
        messages: Sequence[Message] | str,
        n: int = 1,
        sampling: Sampling | None = None,
        schema: Mapping[str, object] | None = None,
        seed: int = 0,
        max_tokens: int = 512,
    ) -> list[Outcome]:
        """Answer one conversation ``n`` times. ``seed`` counts where no ``sampling`` is given.

        Raises:
            UserError: The request cannot be asked.
            GeneratorError: Nothing can be answered now.
        """
        drawn = Sampling(seed=seed) if sampling is None else sampling
        return self.generate_all([GeneratorRequest(messages, n, sampling=drawn, schema=schema, max_tokens=max_tokens)])[
            0
        ]

    def generate_all(
        self, requests: Sequence[GeneratorRequest], *, on_result: OnResult | None = None
    ) -> list[list[Outcome]]:
        """Answer all, for each request in its order ``n`` answers or failures.

        Args:
            requests: What is asked.
            on_result: Hears of every answer and failure as it comes; first of those that the ledger has. It is called
                by the thread that asks.

        Raises:
            UserError: A request cannot be asked; none is then.
            GeneratorError: Nothing can be answered now: the address does not answer, the key is refused, the model does
                not exist, or all of many answers fail. What has come is in the ledger.
        """
        draws = draws_of(requests, self.model)
        for number, request in enumerate(requests, 1):
            if request.schema is not None:
                schema_checker(request.schema)
            self._check(request, f"request {number}")
        found: dict[tuple[int, int], Outcome] = {}

        def hear(draw: Draw, outcome: Outcome) -> None:
            found[draw.place, draw.sample] = outcome
            if on_result is not None:
                on_result(draw.place, draw.sample, outcome)

        todo = []
        for draw in draws:
            kept = self.ledger.get(draw)
            if kept is None:
                todo.append(draw)
            else:
                hear(draw, kept)
        book = Book(self.ledger, self.account, hear, billed=self.billed)
        if todo:
            self.account.begin()
            self._produce(todo, book)
        stopped = book.stopped
        if stopped is not None and stopped.kind != "budget":
            raise GeneratorError(self._told(stopped, len(draws) - len(todo) + book.answered, len(draws)), stopped)
        for draw in todo:
            if (draw.place, draw.sample) not in found:
                assert stopped is not None
                hear(draw, stopped)
        return [[found[place, sample] for sample in range(one.n)] for place, one in enumerate(requests)]

    def estimate(self, requests: Sequence[GeneratorRequest]) -> Estimate:
        """What a call with these requests will take at most, if each is answered at the first attempt; asks nobody."""
        draws = draws_of(requests, self.model)
        todo = [draw for draw in draws if self.ledger.get(draw) is None]
        worst = [self.worst_usage(draw.request) for draw in todo]
        prompts, answers = sum(one.prompt_tokens for one in worst), sum(one.answer_tokens for one in worst)
        return Estimate(
            answers=len(draws),
            cached=len(draws) - len(todo),
            prompt_tokens=prompts,
            answer_tokens=answers,
            money=self.price.of(Usage(prompts, answers)),
        )

    def worst_usage(self, request: GeneratorRequest) -> Usage:
        """The most tokens that one answer can take."""
        return Usage(most_prompt_tokens(request.prompt_bytes(), len(request.turns)), request.max_tokens)

    def _worst(self, request: GeneratorRequest) -> Cost:
        usage = self.worst_usage(request)
        return Cost(self.price.of(usage), usage.tokens, 1)

    def _check(self, request: GeneratorRequest, what: str) -> None:  # noqa: B027 - one may take all
        """Refuse what this generator cannot be asked; ``what`` is its name in messages."""

    def _out_of_budget(self, worst: Cost) -> Failure:
        return Failure("budget", f"the budget is used up: {self.account.lacks(worst)}")

    def _told(self, failure: Failure, answered: int, wanted: int) -> str:
        """What stopped a call, for people, with what to do."""
        kept = f"{answered:,} of {wanted:,} answers are there"
        if self.ledger.path is not None:
            kept += f", in {self.ledger.path}; the same call goes on from there"
        return f"{self.said}: {failure.message}. {kept}."

    def close(self) -> None:
        """Let others have the ledger."""
        self.ledger.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.close()
