"""Schemathesis on the page that the server shows: every check, with data that the page allows and that it does not."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from typing import Any

import hypothesis
import pytest
from hypothesis import HealthCheck, Phase
from hypothesis import strategies as st
from tests.kit.serving import Running

from weft.serve.openapi import OPERATIONS

schemathesis = pytest.importorskip("schemathesis", reason="schemathesis is not installed: weft[dev] has it")
from schemathesis import GenerationMode  # noqa: E402
from schemathesis.checks import CHECKS, load_all_checks  # noqa: E402
from schemathesis.specs.openapi import schemas  # noqa: E402

# pytest compiles this module anew when it is imported. Beside a server's threads Python 3.11 has failed at that
# ("AST constructor recursion depth mismatch"), so that it is imported before they run.
del schemas

Serve = Callable[..., AbstractContextManager[Running]]
KEY = "a-key-of-the-tests"
SENT = {"Authorization": f"Bearer {KEY}"}
CASES, MANY = 300, 5000
# What a valid body may still be refused for: the page cannot say it.
MEANINGS = {
    "adapter_refused", "bad_path", "context_length_exceeded", "empty", "invalid_value", "is_base", "name_taken",
    "no_classes", "no_text", "unsupported_parameter", "too_many", None,
}  # fmt: skip
load_all_checks()


@pytest.fixture(scope="module")
def locked(serve: Serve, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    folder = tmp_path_factory.mktemp("adapters")
    with serve(keys=(KEY,), adapters_folder=folder) as server:
        yield server


def checks_of(positive: bool) -> list[Any]:
    """All checks; of valid data this file knows better what may be refused, and says it below."""
    left_out = {"max_response_time", "positive_data_acceptance"} if positive else {"max_response_time"}
    return [CHECKS.get_one(name) for name in CHECKS.get_all_names() if name not in left_out]


def run(server: Running, cases: int, positive: bool) -> int:
    """Try ``cases`` requests, shared among all operations; how many there were."""
    schema = schemathesis.openapi.from_url(f"{server.url}/openapi.json", headers=SENT)
    mode = GenerationMode.POSITIVE if positive else GenerationMode.NEGATIVE
    operations = [found.ok() for found in schema.get_all_operations()]
    assert {operation.path for operation in operations} == {one.path for one in OPERATIONS}
    checks, seen = checks_of(positive), 0
    takes = [one for one in operations if positive or one.body]  # a GET has nothing to get wrong
    for operation in takes:

        @hypothesis.given(case=operation.as_strategy(generation_mode=mode), model=st.sampled_from(MODELS))
        @hypothesis.settings(
            max_examples=max(1, cases // len(takes)), database=None, derandomize=True, phases=[Phase.generate],
            suppress_health_check=list(HealthCheck), deadline=None,
        )  # fmt: skip
        def each(case: Any, model: str | None) -> None:
            nonlocal seen
            seen += 1
            made_up = case.body.get("model") if isinstance(case.body, dict) else None
            if model is not None and isinstance(made_up, str) and 1 <= len(made_up) <= 256:
                case.body["model"] = model  # else one that is not there would be all that is ever refused
            response = case.call(headers=SENT)
            case.validate_response(response, checks=checks, headers=SENT)
            if response.status_code >= 400:
                error = response.json()["error"]
                assert set(error) == {"message", "type", "param", "code"}
                if positive and response.status_code == 400:
                    assert error["code"] in MEANINGS, (case.body, error)

        each()
    return seen


MODELS = ["tiny", "lora", "prefix", "judge", None]


@pytest.mark.parametrize("positive", [False, True])
def test_the_page_is_kept(locked: Running, positive: bool) -> None:
    """CASES in all."""
    assert run(locked, CASES // 2, positive) > 0
    assert locked.drained()


@pytest.mark.slow
@pytest.mark.parametrize("positive", [False, True])
def test_the_page_is_kept_in_many_cases(locked: Running, positive: bool) -> None:
    """MANY of each kind."""
    assert run(locked, MANY, positive) > MANY // 2
    assert locked.drained(30)
