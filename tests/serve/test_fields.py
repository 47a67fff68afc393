"""Every field that the official client can send is honoured, ignored by the list, or refused by its name."""

from __future__ import annotations

import typing
from typing import Any

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_params
from openai.types.responses import response_create_params
from tests.kit.serving import Running

from weft.serve.fields import ApiRequest
from weft.serve.requests import ChatRequest, CompletionRequest
from weft.serve.response_requests import ResponseRequest

KINDS: dict[type[ApiRequest], tuple[Any, Any]] = {
    ChatRequest: (chat_params.CompletionCreateParamsNonStreaming, chat_params.CompletionCreateParamsStreaming),
    CompletionRequest: (
        completion_create_params.CompletionCreateParamsNonStreaming,
        completion_create_params.CompletionCreateParamsStreaming,
    ),
    ResponseRequest: (
        response_create_params.ResponseCreateParamsNonStreaming,
        response_create_params.ResponseCreateParamsStreaming,
    ),
}
ROUTES = {ChatRequest: "/v1/chat/completions", CompletionRequest: "/v1/completions", ResponseRequest: "/v1/responses"}
NEEDED: dict[type[ApiRequest], dict[str, Any]] = {
    ChatRequest: {"messages": [{"role": "user", "content": "one"}]},
    CompletionRequest: {"prompt": "one"},
    ResponseRequest: {"input": "one"},
}


def sent(kind: type[ApiRequest]) -> set[str]:
    """The names of all that the client can send."""
    return {name for params in KINDS[kind] for name in typing.get_type_hints(params)}


@pytest.mark.parametrize("kind", KINDS)
def test_no_field_of_the_client_is_unknown(kind: type[ApiRequest]) -> None:
    """A new version of the client may bring new fields: each needs a decision."""
    known = {*kind.model_fields, *kind.IGNORED, *kind.REFUSED}
    assert sent(kind) - known == set()
    assert not kind.IGNORED & {*kind.model_fields, *kind.REFUSED}


@pytest.mark.parametrize("kind", KINDS)
def test_what_is_ignored_and_what_is_refused(server: Running, kind: type[ApiRequest]) -> None:
    body = {"model": "lora", "temperature": 0, **NEEDED[kind]}
    with server.client() as client:
        plain = client.post(ROUTES[kind], json=body)
        assert plain.status_code == 200
        everything = client.post(ROUTES[kind], json={**body, **{name: {"any": ["thing"]} for name in kind.IGNORED}})
        assert everything.status_code == 200
        said = [answer.json().get("choices") or answer.json()["output"][0]["content"] for answer in (plain, everything)]
        assert said[0] == said[1]
        for name in kind.REFUSED:
            refused = client.post(ROUTES[kind], json={**body, name: "x"})
            assert refused.status_code == 400
            assert refused.json()["error"]["param"] == name
            assert refused.json()["error"]["code"] == "unsupported_parameter"
            assert client.post(ROUTES[kind], json={**body, name: None}).status_code == 200, "null is no value"
        nulls = dict.fromkeys(set(kind.model_fields) - {"model", *NEEDED[kind]})
        assert client.post(ROUTES[kind], json={**body, **nulls, "temperature": 0}).status_code == 200
        mistaken = client.post(ROUTES[kind], json={**body, "temprature": 0})
        assert "Did you mean 'temperature'?" in mistaken.json()["error"]["message"]
        assert mistaken.json()["error"]["param"] == "temprature"


ABSURD: list[dict[str, Any]] = [
    {"temperature": -1}, {"temperature": 1e9}, {"temperature": "1"}, {"temperature": True}, {"top_p": 1.5}, {"n": 0},
    {"n": 9}, {"n": 1.5}, {"stop": ["a"] * 5}, {"stop": [""]}, {"stop": "x" * 300}, {"seed": 2**63}, {"seed": "1"},
    {"max_tokens": 0}, {"max_tokens": -5}, {"max_tokens": 255}, {"max_tokens": 10**18}, {"logit_bias": {"5": 200}},
    {"logit_bias": {"99999": 1}}, {"logit_bias": {"-1": 1}}, {"logit_bias": {"a": 1}}, {"logit_bias": [1]},
    {"presence_penalty": 3}, {"frequency_penalty": -3}, {"top_k": -2}, {"min_p": 2}, {"repetition_penalty": 0},
    {"stream": "yes"}, {"stream_options": {"include_usage": True}}, {"stream": True, "stream_options": {"x": 1}},
]  # fmt: skip
OF_CHATS: list[dict[str, Any]] = [
    {"logprobs": True, "top_logprobs": 21}, {"top_logprobs": 3}, {"logprobs": 3}, {"messages": []},
    {"messages": [{"role": "user"}]}, {"messages": [{"role": "wizard", "content": "a"}]}, {"messages": "a"},
    {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "x"}}]}]},
    {"messages": [{"role": "tool", "content": "a"}]}, {"messages": [{"role": "user", "content": "a"}] * 1025},
    {"messages": [{"role": "user", "content": "a", "tool_calls": [
        {"id": "a", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}]},
    {"messages": [{"role": "user", "content": "a", "train": True}]}, {"response_format": {"type": "xml"}},
    {"response_format": {"type": "json_schema"}}, {"structured_outputs": {}}, {"tool_choice": "required"},
    {"structured_outputs": {"regex": "a", "choice": ["b"]}}, {"modalities": ["audio"]},
    {"tools": [{"type": "browser"}]},
    {"max_tokens": 3, "max_completion_tokens": 4}, {"structured_outputs": {"regex": "a\\"}},
    {"tool_choice": {"type": "function", "function": {"name": "f"}}},
]  # fmt: skip
OF_TEXTS: list[dict[str, Any]] = [
    {"prompt": []}, {"prompt": ""}, {"prompt": [-1]}, {"prompt": [10**6]}, {"prompt": [[1], "a"]}, {"prompt": [[]]},
    {"prompt": ["a"] * 65}, {"prompt": None}, {"logprobs": 21}, {"logprobs": True}, {"best_of": 2},
    {"echo": True, "logprobs": 1}, {"prompt": [True]},
]  # fmt: skip


@pytest.mark.parametrize(
    ("kind", "values"), [(kind, values) for kind, own in ((ChatRequest, OF_CHATS), (CompletionRequest, OF_TEXTS))
                         for values in (*ABSURD, *own)]
)  # fmt: skip
def test_absurd_values_are_refused_in_the_envelope(
    server: Running, kind: type[ApiRequest], values: dict[str, Any]
) -> None:
    before = len(server.engine.requests)
    with server.client() as client:
        found = client.post(ROUTES[kind], json={"model": "lora", **NEEDED[kind], **values})
    assert found.status_code == 400, found.text
    error = found.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert error["type"] == "invalid_request_error"
    assert error["param"].split(".")[0].split("[")[0] in {*values, "messages", "prompt"}
    assert found.headers["x-should-retry"] == "false"
    assert len(server.engine.requests) == before
    assert server.drained()


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"[]", b"null", b"\xff\xfe", b'{"model": NaN}', b'{"a":' * 100, b'{"model":"lora","prompt":"\\ud800"}',
     b'{"model":"lora","prompt":"a","seed":' + b"1" * 200 + b"}", b'{"model":"lora","prompt":"a","temperature":1e999}'],
)  # fmt: skip
def test_bodies_that_are_no_request(server: Running, body: bytes) -> None:
    with server.client() as client:
        found = client.post("/v1/completions", content=body, headers={"content-type": "application/json"})
    assert found.status_code == 400, found.text
    assert found.json()["error"]["type"] == "invalid_request_error"
