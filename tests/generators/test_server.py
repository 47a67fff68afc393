"""A served model: every fault has its name, what is paid for is kept, and nothing goes over the budget."""

from __future__ import annotations

import os
import random
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from tests.kit.mock_server import FAULTS, MODEL, MockServer, mock_server, random_faults, right_answer

from weft.errors import UserError
from weft.files import whole
from weft.generation.sampling import Sampling
from weft.generators import Budget, Failure, Generated, GeneratorError, GeneratorRequest, Ledger, Price
from weft.generators.answers import is_model, retry_after
from weft.generators.server import Address, Patience, ServedGenerator

SCHEMA = {
    "type": "object",
    "properties": {"answer": {"type": "string"}},
    "required": ["answer"],
    "additionalProperties": False,
}
FAST = Patience(concurrency=4, timeout=0.15, retries=8, redraws=8, first_wait=0.001, longest_wait=0.004)
PRICE = Price(prompt=1.0, answer=3.0)


def requests_of(count: int, n: int = 1) -> list[GeneratorRequest]:
    return [GeneratorRequest(f"question {i}", n, schema=SCHEMA, max_tokens=20) for i in range(count)]


def served(mock: MockServer, **options: Any) -> ServedGenerator:
    options = {"patience": FAST, "price": PRICE, **options}
    return ServedGenerator(Address(mock.url, MODEL, "secret-key"), **options)


def texts(found: list[list[Any]]) -> list[list[str]]:
    assert all(isinstance(one, Generated) for row in found for one in row), found
    return [[one.text for one in row] for row in found]


class KilledError(BaseException):
    """The process is ended here."""


@pytest.mark.parametrize("fault", FAULTS)
def test_each_fault_is_overcome_and_its_cost_is_at_least_what_the_server_bills(fault: str) -> None:
    faults = iter([fault, fault])
    with mock_server(lambda _: next(faults, None)) as mock, served(mock) as generator:
        found = generator.generate_all(requests_of(1))
        assert texts(found) == [[right_answer("question 0")]]
        assert generator.account.spent.tokens >= mock.tokens
        assert generator.account.spent.requests == mock.posts
        assert generator.account.in_flight == 0
        assert mock.headers[0]["authorization"] == "Bearer secret-key"


@pytest.mark.parametrize(
    ("fault", "kind"),
    [("429", "rate_limited"), ("502_html", "server_error"), ("cut_body", "cut"), ("bad_json", "not_json"),
     ("not_chat", "not_chat"), ("wrong_schema", "wrong_schema"), ("refusal", "refusal"),
     ("content_filter", "refusal"), ("length", "length"), ("wrong_model", "wrong_model"), ("empty", "empty"),
     ("drip", "timeout")],
)  # fmt: skip
def test_a_fault_that_stays_is_a_failure_with_its_name_and_never_a_result(
    fault: str, kind: str, tmp_path: Path
) -> None:
    hurried = Patience(concurrency=2, timeout=0.1, retries=1, redraws=1, first_wait=0.001)
    stays = True
    with mock_server(lambda _: fault if stays else None) as mock:
        with served(mock, patience=hurried, ledger=Ledger(tmp_path / "ledger.jsonl")) as generator:
            ((failure,),) = generator.generate_all(requests_of(1))
            assert isinstance(failure, Failure)
            assert failure.kind == kind
            assert mock.posts == 2
        stays = False
        with served(mock, ledger=Ledger(tmp_path / "ledger.jsonl")) as generator:
            assert texts(generator.generate_all(requests_of(1))) == [[right_answer("question 0")]]


def test_a_cut_answer_is_kept_where_the_request_says_so() -> None:
    with mock_server(lambda _: "length") as mock, served(mock) as generator:
        ((found,),) = generator.generate_all([GeneratorRequest("x", keep_cut=True, max_tokens=20)])
        assert (found.text, found.finish_reason) == ('{"ans', "length")


@pytest.mark.parametrize(
    ("status", "code", "kind", "said"),
    [(401, "wrong secret-key", "key_refused", "the key is refused"), (403, "no", "key_refused", "key is refused"),
     (404, "model_not_found", "no_model", f"there is no model '{MODEL}'"),
     (429, "insufficient_quota", "no_quota", "insufficient_quota"), (402, "pay", "no_quota", "pay")],
)  # fmt: skip
def test_what_every_request_would_meet_stops_the_call_at_once(status: int, code: str, kind: str, said: str) -> None:
    with mock_server() as mock:
        mock.status = status, code
        with served(mock) as generator, pytest.raises(GeneratorError, match=said) as caught:
            generator.generate_all(requests_of(40))
        assert caught.value.failure.kind == kind
        assert mock.posts <= FAST.concurrency
        assert "secret-key" not in str(caught.value)
        assert "0 of 40 answers are there" in str(caught.value)


def test_a_bad_request_costs_its_own_draw_and_no_retry() -> None:
    with mock_server() as mock:
        mock.status = 400, "too long"
        with served(mock) as generator:
            ((failure,),) = generator.generate_all(requests_of(1))
        assert isinstance(failure, Failure)
        assert failure.kind == "bad_request"
        assert mock.posts == 1


def test_an_address_that_does_not_answer_is_named_and_the_call_goes_on_later(tmp_path: Path) -> None:
    ledger = tmp_path / "ledger.jsonl"
    with mock_server() as mock:
        with served(mock, ledger=Ledger(ledger)) as generator:
            generator.generate_all(requests_of(3))
        url = mock.url
    hurried = Patience(retries=1, first_wait=0.001)
    address = Address(url, MODEL)
    with (
        ServedGenerator(address, patience=hurried, ledger=Ledger(ledger)) as generator,
        pytest.raises(GeneratorError, match="does not answer") as caught,
    ):
        generator.generate_all(requests_of(5))
    assert url in str(caught.value)
    assert "3 of 5 answers are there" in str(caught.value)
    assert "the same call goes on from there" in str(caught.value)


def test_when_all_answers_fail_no_more_is_paid_for() -> None:
    with mock_server(lambda _: "empty") as mock, served(mock, patience=Patience(redraws=0)) as generator:
        with pytest.raises(GeneratorError, match="the answer is empty"):
            generator.generate_all(requests_of(500))
        assert mock.posts < 60


def test_repeats_have_seeds_of_their_own_and_are_asked_once(tmp_path: Path) -> None:
    heard: list[tuple[int, int]] = []
    asked = [
        GeneratorRequest("a", 2, sampling=Sampling(1.0, seed=7)),
        GeneratorRequest("a", sampling=Sampling(1.0, seed=7)),
    ]
    with mock_server() as mock:
        for _ in range(2):
            with served(mock, ledger=Ledger(tmp_path / "l.jsonl")) as generator:
                found = generator.generate_all(asked, on_result=lambda place, sample, _: heard.append((place, sample)))
        seeds = [one["seed"] for one in mock.told]
        assert len(seeds) == len(set(seeds)) == 3
        assert 7 in seeds
    assert [[one.cached for one in row] for row in found] == [[True, True], [True]]
    assert sorted(heard) == sorted([(0, 0), (0, 1), (1, 0)] * 2)
    assert "secret-key" not in (tmp_path / "l.jsonl").read_text()


def test_another_model_sampling_or_prompt_is_another_answer(tmp_path: Path) -> None:
    one = GeneratorRequest("a", sampling=Sampling(1.0))
    others = [GeneratorRequest("b", sampling=Sampling(1.0)), GeneratorRequest("a"),
              GeneratorRequest("a", sampling=Sampling(1.0), max_tokens=9),
              GeneratorRequest("a", sampling=Sampling(1.0), schema=SCHEMA)]  # fmt: skip
    keys = {one.key("m"), one.key("n"), *(other.key("m") for other in others)}
    assert len(keys) == 6
    assert one.key("m") == GeneratorRequest("a", 5, sampling=Sampling(1.0)).key("m")


def test_a_call_within_an_event_loop_works() -> None:
    import asyncio

    async def inside() -> Any:
        return generator.generate("question 0")

    with mock_server() as mock, served(mock) as generator:
        (found,) = asyncio.run(inside())
        assert isinstance(found, Generated)


def test_retry_after_is_obeyed_by_all_requests() -> None:
    import time

    faults = iter(["wait"])
    with mock_server(lambda _: next(faults, None)) as mock:
        handler: Any = mock
        sent: list[float] = []
        original = mock.fault_of

        def fault_of(prompt: str) -> str | None:
            sent.append(time.monotonic())
            return "429_long" if original(prompt) else None

        handler.fault_of = fault_of
        with served(mock, patience=Patience(concurrency=1, first_wait=0.001)) as generator:
            generator.generate_all(requests_of(3))
    assert sent[1] - sent[0] >= 0.3


@pytest.mark.parametrize(
    ("headers", "seconds"),
    [({"retry-after": "2"}, 2.0), ({"retry-after": "0.5"}, 0.5), ({"retry-after-ms": "250"}, 0.25), ({}, None),
     ({"retry-after": "soon"}, None), ({"retry-after": "-3"}, 0.0), ({"retry-after": "nan"}, None),
     ({"retry-after": "Thu, 01 Jan 1970 00:01:40 GMT"}, 60.0)],
)  # fmt: skip
def test_retry_after_is_seconds_or_a_date(headers: dict[str, str], seconds: float | None) -> None:
    assert retry_after(headers, now=40.0) == seconds


def test_a_model_may_answer_with_its_version_and_with_nothing_else() -> None:
    for said in ("gpt-9", "GPT-9", "owner/gpt-9", "gpt-9-2026-08-06", "gpt-9:latest", "gpt-9-0613"):
        assert is_model(said, "gpt-9"), said
    for said in ("gpt-9-mini", "gpt-8", "gpt-90x", "other"):
        assert not is_model(said, "gpt-9"), said


# The address and its key.


@pytest.mark.parametrize("text", ["here", "http://#m", "http://h/v1", "ftp://h/v1#m", "http://me:pw@h/v1#m"])
def test_an_address_that_cannot_be_used_is_refused(text: str) -> None:
    with pytest.raises(UserError) as caught:
        Address.of(text)
    assert "pw" not in str(caught.value).replace("http://127", "")


def test_a_key_comes_from_a_variable_or_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MY_KEY", "k1")
    (tmp_path / "key").write_text("k2\n")
    assert Address.of("http://h/v1#m", key_env="MY_KEY").key == "k1"
    assert Address.of("http://h/v1#m", key_file=tmp_path / "key").key == "k2"
    assert "k1" not in repr(Address.of("http://h/v1#m", key_env="MY_KEY"))
    with pytest.raises(UserError, match="MISSING_KEY is not set"):
        Address.of("http://h/v1#m", key_env="MISSING_KEY")
    (tmp_path / "key").write_text("two words")
    with pytest.raises(UserError, match="expected a key"):
        Address.of("http://h/v1#m", key_file=tmp_path / "key")


def test_without_the_package_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "openai", None)
    with pytest.raises(UserError, match=r'pip install "weft\[openai\]"'):
        ServedGenerator(Address("http://h/v1", "m"))


# Kills.


def killing(generator: random.Random, writes: int, monkeypatch: pytest.MonkeyPatch) -> Callable[[], bool]:
    """From a random one of the next writes on, nothing reaches the disk but a part of that line; gives whether so."""
    left, dead = generator.randrange(writes), False

    def append(path: Path, line: str) -> None:
        nonlocal left, dead
        if dead:
            raise KilledError
        left -= 1
        if left < 0:
            dead = True
            with open(path, "ab") as file:
                file.write((line + "\n").encode()[: generator.randrange(len(line) + 1)])
            raise KilledError
        whole.append_line(path, line)

    monkeypatch.setattr("weft.generators.ledger.append_line", append)
    return lambda: dead


def schedule(seed: int, folder: Path, monkeypatch: pytest.MonkeyPatch, *, count: int, kills: int) -> int:
    """One run with faults and kills; returns how many answers were billed more than once."""
    generator = random.Random(seed)
    asked, path = requests_of(count), folder / f"{seed}.jsonl"
    worst = served_worst(asked[0])
    in_flight = heard = 0
    monkeypatch.setattr("weft.generators.ledger.sync", lambda path: None)
    with mock_server(random_faults(generator, 0.3, 3)) as mock:
        mock.slow = 0.2
        patience = Patience(concurrency=4, timeout=0.15, retries=12, redraws=12, first_wait=0.001, longest_wait=0.003)
        cap = (count * 8 + 4 * kills) * worst if seed % 2 else count * worst
        most = 10_000 if seed % 2 else count + 2
        budget = Budget(tokens=cap, requests=most)
        for life in range(kills + 1):
            with monkeypatch.context() as patched:
                dead = (lambda: False) if life == kills else killing(generator, 2 * count, patched)
                try:
                    with served(mock, ledger=Ledger(path), patience=patience, budget=budget) as one:
                        try:
                            found = one.generate_all(asked)
                        finally:
                            in_flight += one.account.in_flight
                except KilledError:
                    pass
                if not dead():
                    break
        outcomes = [row[0] for row in found]
        for place, outcome in enumerate(outcomes):  # none is lost, and none is another's
            if isinstance(outcome, Failure):
                assert outcome.kind == "budget", outcome
                assert not seed % 2, "the budget was large"
            else:
                assert outcome.text == right_answer(f"question {place}")
                heard += 1
        with Ledger(path) as ledger:
            assert len(ledger) == heard, "doubled, or lost"
        assert mock.tokens <= cap
        assert mock.posts <= most
        twice = sum(mock.good.values()) - heard
        # On a machine that is busy a right answer may come after the limit: not a kill's doing.
        late = path.read_text().count('"kind": "timeout"') - mock.dealt["slow"] - mock.dealt["drip"]
        assert 0 <= twice <= in_flight + max(0, late)
    return twice


def served_worst(request: GeneratorRequest) -> int:
    return ServedGenerator(Address("http://h/v1", MODEL), price=PRICE).worst_usage(request).tokens


def test_no_answer_is_lost_or_doubled_in_random_schedules_with_kills(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    twice = [schedule(seed, tmp_path, monkeypatch, count=3, kills=seed % 4) for seed in range(100)]
    assert any(twice), "no kill met an answer on its way, so that the test shows little"


@pytest.mark.slow
def test_no_answer_is_lost_or_doubled_in_many_random_schedules(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for seed in range(1000, 1100):
        schedule(seed, tmp_path, monkeypatch, count=40, kills=10)


# What a process does that is ended while it asks: it prints each answer that has come.
PROCESS = """
import sys
from pathlib import Path
from tests.generators.test_server import FAST, PRICE, requests_of
from tests.kit.mock_server import MODEL
from weft.generators import Ledger
from weft.generators.server import Address, ServedGenerator
url, path, count = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
with ServedGenerator(Address(url, MODEL), patience=FAST, price=PRICE, ledger=Ledger(path)) as generator:
    generator.generate_all(requests_of(count), on_result=lambda *found: print(found[0], flush=True))
"""


@pytest.mark.slow
def test_a_process_that_is_killed_loses_no_answer(tmp_path: Path) -> None:
    """SIGKILL, as soon as so many answers have come: those, and all before, are in the ledger and are asked no more."""
    generator, count, kills = random.Random(3), 60, 8
    path, root = tmp_path / "l.jsonl", Path(__file__).parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{root / 'src'}{os.pathsep}{root}"}
    with mock_server(random_faults(generator, 0.3, 3)) as mock:
        for life in range(kills + 1):
            words = [sys.executable, "-c", PROCESS, mock.url, str(path), str(count)]
            with subprocess.Popen(words, stdout=subprocess.PIPE, text=True, env=environment, cwd=root) as process:
                assert process.stdout is not None
                kept = 0 if not path.exists() else path.read_text().count('"answer": "')
                for _ in range(kept + generator.randrange(1, 8)) if life < kills else iter(int, 1):
                    if not process.stdout.readline():
                        break
                if life < kills:
                    process.kill()
            assert process.returncode == (-9 if life < kills else 0) or path.read_text().count('"answer": "') == count
        with Ledger(path) as ledger:
            assert len(ledger) == count
            lost = ledger.lost
        assert all(mock.good[f"question {i}"] >= 1 for i in range(count))
        late = path.read_text().count('"kind": "timeout"') - mock.dealt["slow"] - mock.dealt["drip"]
        assert sum(mock.good.values()) - count <= lost + max(0, late)
        assert lost <= kills * FAST.concurrency
