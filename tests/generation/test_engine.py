"""What the engine promises whoever calls it: the order of answers, why each ended, and that it does not trust a cache
that gives something else."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from tests import kit

from weft.api import Adapters
from weft.generation import Engine, Request, generate
from weft.generation.pool import Pool
from weft.generation.ways import goes_on
from weft.models import describe


@pytest.fixture(scope="module")
def adapters() -> Adapters:
    found = Adapters(model := kit.make_model("llama", torch.float64), describe(model))
    for index, name in enumerate(("lora", "prefix_tuning", "prompt_tuning")):
        kit.randomize(found.add(name, kit.method_config(name)), index)
    return found


def asked(count: int = 3) -> list[Request]:
    """The adapters come again and again, so the engine has to sort them."""
    names = [None, "prompt_tuning", "lora", "prefix_tuning"]
    return [Request(ids, names[i % 4], 3 + i % 5) for i, ids in enumerate(kit.texts(4 * count, 1, 12))]


def test_answers_come_in_the_order_of_the_requests(adapters: Adapters) -> None:
    requests = asked()
    alone = [generate(adapters, [request], stop_ids=())[0].ids for request in requests]
    assert len({tuple(ids) for ids in alone}) > 4, "all alike would prove nothing"
    for size in (64, 5, 1):
        assert [c.ids for c in generate(adapters, requests, stop_ids=(), batch_size=size)] == alone


def test_why_an_answer_ended_and_what_was_told_on_the_way(adapters: Adapters) -> None:
    requests = asked()
    free = generate(adapters, requests, stop_ids=())
    assert {c.finish_reason for c in free} == {"length"}
    stop = free[5].ids[1]
    told: dict[int, list[int]] = {i: [] for i in range(len(requests))}
    cut = generate(adapters, requests, stop_ids=[stop], on_token=lambda index, token: told[index].append(token))
    for whole, found, seen in zip(free, cut, told.values(), strict=True):
        end = whole.ids.index(stop) if stop in whole.ids else None
        assert found.ids == seen == whole.ids[:end]
        assert found.finish_reason == ("length" if end is None else "stop")
    assert cut[5].finish_reason == "stop"


def test_a_call_is_seen_while_it_runs_and_counts_as_a_step(adapters: Adapters) -> None:
    with Engine(adapters) as engine:
        begun, seen = engine.stats().last_step, []
        engine.apply(lambda: seen.append(engine.stats().calls))
        assert (seen, engine.stats().calls) == ([1], 0)
        assert engine.stats().last_step > begun


def test_a_cache_that_gives_something_else_is_not_used(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    """As of a layer that attends twice: the proof sees it, and the answers are those of the whole text."""
    assert goes_on(adapters)
    requests = asked(1)
    wanted = [c.ids for c in generate(adapters, requests, stop_ids=())]
    plain = Pool.store

    def twice(self: Any, layer: int, places: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> Any:
        return plain(self, layer, places, k, 2 * v)

    monkeypatch.setattr(Pool, "store", twice)
    other = Adapters(model := kit.make_model("llama", torch.float64), describe(model))
    for index, name in enumerate(("lora", "prefix_tuning", "prompt_tuning")):
        kit.randomize(other.add(name, kit.method_config(name)), index)
    assert not goes_on(other)
    assert [c.ids for c in generate(other, requests, stop_ids=())] == wanted
