"""The budget is never overrun: simulated servers, each with its own schedule, on a clock that costs no time."""

from __future__ import annotations

import asyncio
import json
import random
import selectors
from collections.abc import Mapping
from typing import Any

import pytest
from tests.kit.mock_server import MODEL

from weft.errors import UserError
from weft.generators import Budget, Failure, Generated, GeneratorRequest, Ledger, Price, Usage
from weft.generators.budget import Account, Cost
from weft.generators.generator import GeneratorError
from weft.generators.server import Address, Patience, ServedGenerator


class SimulatedLoop(asyncio.SelectorEventLoop):
    """An event loop whose time goes on only while all sleep, and then at once."""

    def __init__(self) -> None:
        super().__init__(_Jumping(self))
        self.now = 0.0

    def time(self) -> float:
        return self.now


class _Jumping(selectors.SelectSelector):
    def __init__(self, loop: SimulatedLoop) -> None:
        super().__init__()
        self.loop = loop

    def select(self, timeout: float | None = None) -> Any:
        self.loop.now += timeout or 0.0
        return super().select(0)


class SimulatedServer:
    """Bills what it generates, also where nothing of it arrives."""

    def __init__(self, generator: random.Random, price: Price) -> None:
        self.random, self.price = generator, price
        self.tokens = self.posts = 0
        self.money = 0.0

    async def post(self, body: Mapping[str, Any], timeout: float) -> Any:
        draw, self.posts = self.random, self.posts + 1
        kind = draw.choices(["fine", "429", "500", "cut", "slow", "empty", "refused"], [60, 8, 8, 6, 6, 6, 6])[0]
        if kind == "refused":
            return Failure("unreachable", "no")
        if kind in ("429", "500"):
            wait = draw.uniform(0, 0.2)
            await asyncio.sleep(min(wait, timeout))
            if wait >= timeout:
                return Failure("timeout", "no", billed=True)
            headers = {"retry-after": str(draw.randrange(4))} if draw.random() < 0.5 else {}
            return int(kind), headers, b"{}"
        prompt = len(body["messages"][-1]["content"]) + draw.randrange(100)
        usage = Usage(prompt, draw.randint(1, body["max_tokens"]))
        self.tokens += usage.tokens
        self.money += self.price.of(usage)
        wait = draw.expovariate(1 / 2)
        await asyncio.sleep(min(wait, timeout))
        if kind == "slow" or wait >= timeout:
            await asyncio.sleep(max(0.0, timeout - wait))
            return Failure("timeout", "no", billed=True)
        if kind == "cut":
            return Failure("cut", "no", billed=True)
        told = {"prompt_tokens": usage.prompt_tokens, "completion_tokens": usage.answer_tokens}
        text = "" if kind == "empty" else "yes"
        answer = {"model": MODEL, "choices": [{"message": {"content": text}, "finish_reason": "stop"}]}
        return 200, {}, json.dumps(answer | ({"usage": told} if draw.random() < 0.9 else {})).encode()

    async def close(self) -> None:
        pass


def simulate(seed: int, monkeypatch: pytest.MonkeyPatch) -> str:
    """One schedule with one limit; returns how it ended."""
    draw = random.Random(seed)
    price = Price(prompt=draw.uniform(0.1, 5), answer=draw.uniform(0.1, 20))
    limit = draw.choice(["money", "tokens", "requests", "seconds"])
    asked = [GeneratorRequest("x" * draw.randrange(1, 200), max_tokens=draw.randrange(1, 300))
             for _ in range(draw.randrange(1, 12))]  # fmt: skip
    server = SimulatedServer(draw, price)
    most = {"money": price.of(Usage(3000, 2000)), "tokens": 5000, "requests": 12, "seconds": 20}[limit]
    value = draw.uniform(0.02, 1) * most
    budget = Budget(**{limit: value if limit in ("money", "seconds") else max(1, int(value))})
    value = getattr(budget, limit)
    loop = SimulatedLoop()
    monkeypatch.setattr(asyncio, "run", lambda call: loop.run_until_complete(call))
    patience = Patience(concurrency=draw.randrange(1, 9), timeout=draw.uniform(1, 8), retries=draw.randrange(5))
    generator = ServedGenerator(Address("http://h/v1", MODEL), patience=patience, price=price, budget=budget,
                                transport=lambda *_: server, clock=loop.time, seed=seed)  # fmt: skip
    try:
        found = [one for row in generator.generate_all(asked) for one in row]
        assert len(found) == len(asked)
        ended = "budget" if any(isinstance(one, Failure) and one.kind == "budget" for one in found) else "whole"
    except GeneratorError:
        ended = "stopped"
    finally:
        loop.close()
    spent = {"money": server.money, "tokens": server.tokens, "requests": server.posts, "seconds": loop.now}[limit]
    assert spent <= value * (1 + 1e-9), (seed, limit, spent, value)
    # Nothing that the server bills goes uncounted.
    assert server.money <= generator.account.spent.money * (1 + 1e-9)
    assert server.tokens <= generator.account.spent.tokens
    assert server.posts == generator.account.spent.requests
    assert generator.account.in_flight == 0
    assert generator.account.reserved == Cost()
    return ended


def test_no_simulated_schedule_is_over_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    ends = [simulate(seed, monkeypatch) for seed in range(500)]
    assert {"budget", "whole", "stopped"} == set(ends)


@pytest.mark.slow
def test_none_of_ten_thousand_simulated_schedules_is_over_its_budget(monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(10_000):
        simulate(seed, monkeypatch)


def test_what_is_on_its_way_is_waited_for_before_a_request_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """A budget for all answers is enough, however many are asked at once: reservations are given back."""
    asked = [GeneratorRequest(f"question {i}", max_tokens=100) for i in range(10)]
    plain = ServedGenerator(Address("http://h/v1", MODEL), transport=lambda *_: Quick())

    class Quick:
        async def post(self, body: Mapping[str, Any], timeout: float) -> Any:
            answer = {"choices": [{"message": {"content": "yes"}, "finish_reason": "stop"}],
                      "usage": {"prompt_tokens": 5, "completion_tokens": 1}}  # fmt: skip
            return 200, {}, json.dumps(answer).encode()

        async def close(self) -> None:
            pass

    worst = plain.worst_usage(asked[0]).tokens
    budget = Budget(tokens=worst + 9 * 6)
    generator = ServedGenerator(Address("http://h/v1", MODEL), transport=lambda *_: Quick(), budget=budget)
    assert all(isinstance(one, Generated) for (one,) in generator.generate_all(asked))
    less = ServedGenerator(
        Address("http://h/v1", MODEL), transport=lambda *_: Quick(), budget=Budget(tokens=worst + 8 * 6)
    )
    assert [type(one) for (one,) in less.generate_all(asked)].count(Failure) == 1


def test_the_estimate_is_an_upper_bound_and_leaves_out_what_the_ledger_has() -> None:
    price = Price(prompt=1, answer=2)
    generator = ServedGenerator(Address("http://h/v1", MODEL), price=price, ledger=Ledger())
    found = generator.estimate([GeneratorRequest("a" * 1000, 3, max_tokens=10)])
    assert (found.answers, found.cached, found.answer_tokens) == (3, 0, 30)
    assert found.prompt_tokens >= 3000
    assert found.money == pytest.approx((found.prompt_tokens + 60) / 1e6)


@pytest.mark.parametrize("wrong", [{"money": 0}, {"tokens": -1}, {"requests": 0}, {"seconds": float("nan")}])
def test_a_budget_of_nothing_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(UserError, match="more than 0"):
        Budget(**wrong)


def test_an_account_says_which_limit_is_reached() -> None:
    account = Account(Budget(money=1.0, tokens=100), Cost(0.9, 10, 1))
    assert "(money)" in account.lacks(Cost(0.2, 5, 1))
    assert "(tokens)" in account.lacks(Cost(0.05, 95, 1))
    assert account.reserve(Cost(0.05, 50, 1))
    assert not account.reserve(Cost(0.01, 50, 1))
    account.settle(Cost(0.05, 50, 1), Cost(0.01, 10, 1))
    assert account.reserve(Cost(0.01, 50, 1))
