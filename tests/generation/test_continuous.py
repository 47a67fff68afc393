"""Rows join and leave at every step, share what they begin with, and are pushed out; no token depends on any of it."""

from __future__ import annotations

import asyncio
import random
import resource
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch
from tests import kit

from weft.api import Adapters
from weft.core.stream import Part
from weft.errors import UserError
from weft.generation import Engine, Limits, Request
from weft.generation.request import Answer, Completion
from weft.generation.sampling import Sampling
from weft.models import describe

NAMES = [None, *kit.ALL]


@pytest.fixture(scope="module")
def adapters() -> Adapters:
    return kit.open_with_all(kit.make_model("llama", torch.float64))


def expected(adapters: Adapters, request: Request) -> Completion:
    """The answer of an engine of its own."""
    with Engine(adapters) as engine:
        return engine.generate([request])[0]


def passed(adapters: Adapters, patch: pytest.MonkeyPatch) -> list[int]:
    """How many tokens go through every pass, from now on."""
    seen: list[int] = []
    forward = type(adapters).forward

    def counted(self: Adapters, stream: object) -> torch.Tensor:
        seen.append(len(stream.input_ids))  # type: ignore[attr-defined]
        return forward(self, stream)  # type: ignore[arg-type]

    patch.setattr(type(adapters), "forward", counted)
    return seen


@pytest.mark.parametrize(("tokens", "prefill", "block"), [(4096, 256, 16), (160, 5, 4), (96, 7, 3)])
def test_who_comes_and_goes_changes_no_token(adapters: Adapters, tokens: int, prefill: int, block: int) -> None:
    """Small caches push rows out, small pieces cut prompts, and equal beginnings meet: every method, at any time."""
    draw = random.Random(tokens)
    opening = kit.texts(1, 20, 20, seed=3)[0]
    requests = []
    for index in range(60):
        (own,) = kit.texts(1, 1, 12, seed=index)
        prompt = [*opening[: draw.choice([0, 0, 7, 16, 20])], *own]
        warm = Sampling(0.9 * (index % 3 == 0), seed=index)
        requests.append(Request(prompt, NAMES[index % len(NAMES)], draw.randint(1, 14), sampling=warm))
    wanted = [expected(adapters, request).ids for request in requests]
    assert len({tuple(ids) for ids in wanted}) > 40, "all alike would prove nothing"
    engine = Engine(
        adapters, limits=Limits(max_rows=9, prefill_tokens=prefill, cache_tokens=tokens, block_tokens=block)
    )
    answers: list[Answer] = []
    cancelled = set[int]()
    waiting = list(requests)
    while waiting or not all(answer.done for answer in answers):
        for _ in range(draw.randint(0, 4)):
            if waiting:
                answers.append(engine.submit(waiting.pop(0)))
        if answers and draw.random() < 0.1:
            chosen = draw.randrange(len(answers))
            if not answers[chosen].done:
                answers[chosen].cancel()
                cancelled.add(chosen)
        engine.step()
    for index, (answer, ids) in enumerate(zip(answers, wanted, strict=True)):
        found = answer.result()
        if index in cancelled:
            assert found.finish_reason == "cancelled"
            assert found.ids == ids[: len(found.ids)]
        else:
            assert found.ids == ids, (index, requests[index].adapter)
    stats = engine.stats()
    assert (stats.waiting, stats.running, stats.blocks_used) == (0, 0, 0)


@pytest.mark.parametrize("name", [None, "lora", "prefix_tuning", "prompt_tuning"])
def test_what_rows_begin_with_is_computed_once(
    adapters: Adapters, name: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    shared = kit.texts(1, 40, 40)[0]
    learned = 0 if name is None else adapters[name].num_virtual_tokens
    requests = [Request([*shared, 5 + row], name, 2) for row in range(6)]
    wanted = [expected(adapters, request).ids for request in requests]
    engine = Engine(adapters, limits=Limits(block_tokens=4))
    seen = passed(adapters, monkeypatch)
    answers = engine.generate(requests)
    assert [answer.ids for answer in answers] == wanted
    # The first computes all; the others the last, open block and their own token, and each then one token more.
    whole = 41 + learned
    assert sum(seen) <= whole + 5 * (whole - (whole - 1) // 4 * 4 + 4) + 6
    assert [answer.cached_tokens for answer in answers][1:] == [40 - (40 + learned) % 4 if learned else 40] * 5
    before = sum(seen)
    assert engine.generate(requests[:1])[0].ids == wanted[0], "it is found again when nobody holds it"
    assert sum(seen) - before <= 8
    engine.close()


def test_values_that_have_changed_share_nothing(adapters: Adapters) -> None:
    """Training between two answers, and another adapter under the same name: neither meets old keys."""
    model = kit.make_model("llama", torch.float64)
    own = kit.open_with_all(model)
    request = Request(kit.texts(1, 30, 30)[0], "lora", 8)
    engine = Engine(own, limits=Limits(block_tokens=4))
    first = engine.generate([request])[0]
    with torch.no_grad():
        for parameter in own["lora"].parameters():
            parameter.mul_(-3)
    second = engine.generate([request])[0]
    assert second.cached_tokens == 0
    assert second.ids == expected(own, request).ids != first.ids
    config = own["lora"].config
    for seed in (5, 6):
        own.remove("lora")
        kit.randomize(own.add("lora", config), seed)
        third = engine.generate([request])[0]
        assert third.cached_tokens == 0
        assert third.ids == expected(own, request).ids
    own.close()


def test_a_prompt_in_pieces_stops_nobody(adapters: Adapters) -> None:
    """While a long prompt is read, the others write one token per step."""
    engine = Engine(adapters, limits=Limits(prefill_tokens=8))
    short = engine.submit(Request([7], "lora", 30))
    engine.step()
    long = engine.submit(Request(kit.texts(1, 60, 60)[0], "bitfit", 2))
    before = engine.stats().tokens
    for step in range(1, 8):
        engine.step()
        assert engine.stats().tokens == before + step
    assert not long.done
    assert long.result().ids == expected(adapters, long.request).ids
    assert short.result().ids == expected(adapters, short.request).ids


def test_one_that_waits_goes_on_when_the_one_that_computes_leaves(adapters: Adapters) -> None:
    engine = Engine(adapters, limits=Limits(prefill_tokens=8, block_tokens=4))
    for leaves in (False, True):
        # Whole blocks: of the others only one token is left, which could go at once.
        (prompt,) = kit.texts(1, 48, 48, seed=leaves)
        # And some of one and the same text, with and without a whole block.
        same = [prompt[1:]] * 3 + [prompt[:3]] * 3
        texts = [*([*prompt, row] for row in range(4)), *same]
        answers = [engine.submit(Request(ids, None, 3)) for ids in texts]
        for _ in range(2 if leaves else 12):
            engine.step()
        gone = (0, 4, 7) if leaves else ()
        for index in gone:
            answers[index].cancel()
        for _ in range(100):
            engine.step()
        for index, answer in enumerate(answers):
            assert answer.done, index
            if index not in gone:
                assert answer.result().ids == expected(adapters, answer.request).ids
        assert engine.stats().blocks_used == 0


def test_learned_keys_over_the_border_of_a_block(adapters: Adapters) -> None:
    """Of four keys a block of three tokens holds three: the next row finds these, and needs the fourth."""
    engine = Engine(adapters, limits=Limits(block_tokens=3))
    for ids in kit.texts(3, 4, 9):
        request = Request(ids, "prefix_tuning", 6, logprobs=0)
        (found,), wanted = engine.generate([request]), expected(adapters, request)
        assert [token.logprob for token in found.tokens] == pytest.approx([t.logprob for t in wanted.tokens], abs=1e-9)


def test_threads_an_event_loop_and_a_thread_of_its_own(adapters: Adapters) -> None:
    requests = [Request(ids, NAMES[i % len(NAMES)], 5) for i, ids in enumerate(kit.texts(24, 1, 9))]
    wanted = [expected(adapters, request).ids for request in requests]

    def in_threads(engine: Engine) -> list[list[int]]:
        found: dict[int, list[int]] = {}

        def ask(index: int) -> None:
            found[index] = [token.id for token in engine.submit(requests[index])]

        threads = [threading.Thread(target=ask, args=(index,)) for index in range(len(requests))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return [found[index] for index in range(len(requests))]

    def in_a_loop(engine: Engine) -> list[list[int]]:
        async def ask(request: Request) -> list[int]:
            return [token.id async for token in engine.submit(request)]

        async def everyone() -> list[list[int]]:
            return await asyncio.gather(*map(ask, requests))

        return asyncio.run(everyone())

    def at_once(engine: Engine) -> list[list[int]]:
        return [completion.ids for completion in engine.generate(requests)]

    ways: tuple[Callable[[Engine], list[list[int]]], ...] = (in_threads, in_a_loop, at_once)
    for ask in ways:
        for started in (False, True):
            with Engine(adapters) as engine:
                if started:
                    engine.start()
                assert ask(engine) == wanted, (ask.__name__, started)


def test_adapters_come_and_go_while_others_answer(adapters: Adapters) -> None:
    model = kit.make_model("llama", torch.float64)
    own = kit.open_with_all(model)
    request = Request([5, 6, 7], "bitfit", 40)
    wanted = expected(own, request).ids
    with Engine(own) as engine:
        engine.start()
        answer = engine.submit(request)
        for turn in range(8):
            name = f"guest{turn}"
            added = engine.apply(lambda name=name: own.add(name, kit.method_config("lora")))  # type: ignore[misc]
            added.result(timeout=30)
            assert len(engine.submit(Request([9, 9], name, 3)).result(timeout=30).ids) == 3
            engine.apply(lambda name=name: own.remove(name)).result(timeout=30)  # type: ignore[misc]
        assert answer.result(timeout=30).ids == wanted
        failing = engine.apply(lambda: own.remove("nobody"))
        with pytest.raises(UserError, match="nobody"):
            failing.result(timeout=30)
    own.close()


def test_a_step_of_training_in_the_middle_of_an_answer() -> None:
    """From the next token on the new values count. (Only the last block's output depends on them, and so no keys.)"""
    own = Adapters(model := kit.make_model("llama", torch.float64), describe(model))
    last = own.architecture.num_layers - 1
    config = kit.method_config("lora", target_modules=["down_proj"], layers_to_transform=[last])
    kit.randomize(own.add("lora", config), 3, scale=0.5)
    with Engine(own) as engine:
        answer = engine.submit(Request([5, 6, 7], "lora", 6, logprobs=0))
        waits = engine.submit(Request([5, 6, 7, 8], "lora", 2, logprobs=0))
        for _ in range(3):
            engine.step()
        kit.randomize(own["lora"], 4, scale=0.5)
        done = answer.result()
        for token, (index, before) in zip(done.tokens[3:], enumerate(done.ids[3:], 3), strict=True):
            assert token.logprob == pytest.approx(forced(own, [5, 6, 7, *done.ids[:index]], before), abs=1e-9)
        assert done.tokens[1].logprob != pytest.approx(forced(own, [5, 6, 7, *done.ids[:1]], done.ids[1]), abs=1e-3)
        waits.result()
    own.close()


def forced(adapters: Adapters, text: list[int], token: int) -> float:
    """log p(token) after the text, by a pass over all of it."""
    with torch.no_grad():
        (hidden,) = kit.hidden_of(adapters, [Part("lora", [text])])
        return float(adapters.logits(hidden[-1:], [("lora", 1)]).log_softmax(-1)[0, token])


@pytest.mark.parametrize("padded", [False, True])
def test_an_adapter_that_is_taken_away_ends_its_own_answers_alone(padded: bool) -> None:
    own = kit.open_with_all(kit.make_model("llama", torch.float64), padded=padded)
    with Engine(own) as engine:
        names = ["lora", "bitfit", None, "ia3"]
        answers = [engine.submit(Request([5, 6, 7], name, 8)) for name in names]
        wanted = expected(own, answers[2].request).ids
        for _ in range(2):
            engine.step()
        own.remove("lora")
        own.remove("bitfit")
        kit.randomize(own.add("bitfit", kit.method_config("bitfit")), 9)  # another under the same name
        for answer in answers[:2]:
            with pytest.raises(UserError, match="was taken away, or another took its name"):
                answer.result()
        assert answers[2].result().ids == wanted
        assert len(answers[3].result().ids) == 8
        assert engine.stats().running == 0
    own.close()


def test_ends(adapters: Adapters) -> None:
    """A deadline, a cancelled answer that has not begun, and an engine that closes."""
    engine = Engine(adapters, limits=Limits(max_rows=1))
    late = engine.submit(Request([5], None, 50, deadline=time.monotonic() - 1))
    first = engine.submit(Request([5], None, 50))
    second = engine.submit(Request([6], None, 50))
    for _ in range(3):
        engine.step()
    assert (late.result().finish_reason, late.result().ids) == ("deadline", [])
    second.cancel()
    engine.step()
    assert second.result().finish_reason == "cancelled"
    with pytest.raises(TimeoutError):
        first.result(timeout=0)
    engine.close()
    assert first.result().finish_reason == "cancelled"
    assert len(first.result().ids) >= 3
    with pytest.raises(UserError, match="closed"):
        engine.submit(Request([5]))


def test_a_request_larger_than_the_cache_is_refused(adapters: Adapters) -> None:
    engine = Engine(adapters, limits=Limits(cache_tokens=32))
    with pytest.raises(UserError, match="room for 60 tokens"):
        engine.submit(Request([5] * 20, None, 40))
    with pytest.raises(UserError, match="cache_bytes is 10"):
        Engine(adapters, limits=Limits(cache_bytes=10))


def test_an_error_of_the_machine_reaches_everyone(adapters: Adapters, monkeypatch: pytest.MonkeyPatch) -> None:
    with Engine(adapters) as engine:
        answers: Iterator[Answer] = map(engine.submit, [Request([5], None, 5), Request([6], "lora", 5)])
        held = list(answers)

        def broken(*_: object) -> None:
            raise MemoryError("no more")

        with monkeypatch.context() as patch:
            patch.setattr(type(adapters), "forward", broken)
            engine.start()
            for answer in held:
                with pytest.raises(MemoryError):
                    answer.result(timeout=30)
        assert len(engine.submit(Request([5], None, 5)).result(timeout=30).ids) == 5


def test_texts_and_stop_strings(tiny_llama_dir: str) -> None:
    """Pieces make the text, a stop string ends it over the borders of tokens, an end token that is ignored does not."""
    from weft.models import load_base

    base = load_base(str(tiny_llama_dir))
    own = Adapters(base.model, base.architecture)
    ids = base.tokenizer("The quick brown")["input_ids"]
    with Engine(own, tokenizer=base.tokenizer) as engine:
        (plain,) = engine.generate([Request(ids, None, 24)])
        assert "".join(token.text for token in plain.tokens) + plain.tail == plain.text
        assert plain.text == base.tokenizer.decode(plain.ids, skip_special_tokens=True).rstrip("�")
        stop = plain.text[5:9]
        (cut,) = engine.generate([Request(ids, None, 24, stop=(stop, "never"))])
        assert (cut.finish_reason, cut.stop) == ("stop", stop)
        assert cut.text == plain.text[: plain.text.index(stop)]
    end = plain.ids[3]
    with Engine(own, tokenizer=base.tokenizer, stop_ids=[end]) as engine:
        ended, ignored = engine.generate([Request(ids, None, 24), Request(ids, None, 24, ignore_stop_ids=True)])
        assert ended.ids == plain.ids[: plain.ids.index(end)]
        assert ignored.ids == plain.ids
    with pytest.raises(UserError, match="tokenizer"):
        Engine(own).submit(Request(ids, None, 4, stop=("x",)))
    own.close()


@pytest.mark.parametrize("count", [120, pytest.param(1000, marks=pytest.mark.slow)])
def test_traffic_of_all_methods_while_adapters_come_and_go(count: int) -> None:
    """Every answer, token for token, as alone; names come again with other methods and other values."""
    adapters = kit.open_with_all(kit.make_model("llama"))
    report = kit.run_traffic(adapters, count, seed=count)
    assert report.answers == count
    assert report.wrong == []
    assert min(report.loads, report.reloaded_names) >= 2


def test_constrained_answers(tiny_llama_dir: str) -> None:
    """Rows with grammars beside rows without: each ends as its grammar says, and neighbours do not change."""
    pytest.importorskip("llguidance")
    from weft.generation.constraint import Constraint
    from weft.models import load_base

    base = load_base(str(tiny_llama_dir))
    own = Adapters(base.model, base.architecture)
    ids = base.tokenizer("Answer:")["input_ids"]
    warm = Sampling(1.0, seed=4)
    with Engine(own, tokenizer=base.tokenizer, stop_ids=[base.tokenizer.eos_token_id]) as engine:
        (free,) = engine.generate([Request(ids, None, 12, sampling=warm)])
        beside, choice, number = engine.generate([
            Request(ids, None, 12, sampling=warm),
            Request(ids, None, 40, sampling=warm, constraint=Constraint.choice(["yes, indeed", "no"])),
            Request(ids, None, 40, sampling=warm, constraint=Constraint.regex("[0-9]{3}-[a-c]+z")),
        ])  # fmt: skip
        assert beside.ids == free.ids
        assert (choice.finish_reason, choice.text) in {("stop", "yes, indeed"), ("stop", "no")}
        assert number.finish_reason != "stop" or number.text.endswith("z")
        with pytest.raises(UserError, match="regex"):
            engine.submit(Request(ids, None, 4, constraint=Constraint.regex("(")))
    with pytest.raises(UserError, match="tokenizer"):
        Engine(own).submit(Request(ids, None, 4, constraint=Constraint.json_object()))
    own.close()


@pytest.mark.skipif(not Path("/proc/self/statm").is_file(), reason="no /proc to read the memory from")
def test_a_short_text_takes_a_little_of_a_large_cache(adapters: Adapters) -> None:
    """With pages of 2 MiB it took one for each head, layer and side."""

    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()

    expected(adapters, Request([5, 6, 7], None, 2))  # what is made once
    with Engine(adapters, limits=Limits(cache_tokens=4_000_000)) as engine:
        before = resident()
        engine.generate([Request([5, 6, 7], None, 2)])
        assert resident() - before < 4 << 20
