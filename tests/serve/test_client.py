"""The official ``openai`` client over a real socket."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any, Literal

import openai
import pytest
from pydantic import BaseModel
from tests.kit.serving import Running
from tests.serve.conftest import TOOLS

Serve = Callable[..., AbstractContextManager[Running]]
HELLO: Any = [{"role": "user", "content": "What comes after one?"}]


def client(server: Running, **options: Any) -> openai.OpenAI:
    return openai.OpenAI(**{"base_url": f"{server.url}/v1", "api_key": "none", "max_retries": 0, **options})


class Colour(BaseModel):
    """What is parsed."""

    name: str
    kind: Literal["warm", "cold"]


def test_models(server: Running) -> None:
    found = {model.id: model for model in client(server).models.list()}
    assert list(found) == ["tiny", "lora", "prefix", "judge"]
    assert [getattr(model, "parent", None) for model in found.values()] == [None, "tiny", "tiny", "tiny"]
    one = client(server).models.retrieve("judge")
    assert one == found["judge"]
    assert getattr(one, "labels", None) == ["no", "yes"]
    with pytest.raises(openai.NotFoundError) as error:
        client(server).models.retrieve("lore")
    assert error.value.code == "model_not_found"
    assert "Did you mean 'lora'?" in str(error.value)


def test_a_chat_whole_and_in_pieces(server: Running) -> None:
    asked: dict[str, Any] = {"model": "lora", "messages": HELLO, "max_completion_tokens": 9, "n": 2, "seed": 5}
    whole = client(server).chat.completions.create(**asked, logprobs=True, top_logprobs=3)
    assert [choice.finish_reason for choice in whole.choices] == ["length", "length"]
    assert whole.choices[0].message.content != whole.choices[1].message.content, "each has a seed of its own"
    assert whole.usage is not None
    assert whole.usage.completion_tokens == 18
    assert whole.usage.prompt_tokens > 9
    assert whole.usage.prompt_tokens_details is not None
    for choice in whole.choices:
        assert choice.logprobs is not None
        assert choice.logprobs.content is not None
        assert "".join(one.token for one in choice.logprobs.content) == choice.message.content
        assert [len(one.top_logprobs) for one in choice.logprobs.content] == [3] * 9
    with client(server).chat.completions.create(**asked, stream=True, stream_options={"include_usage": True}) as stream:
        chunks = list(stream)
    said = ["", ""]
    for chunk in chunks[:-1]:
        for piece in chunk.choices:
            said[piece.index] += piece.delta.content or ""
    assert said == [choice.message.content for choice in whole.choices]
    assert chunks[0].choices[0].delta.role == "assistant"
    assert chunks[-1].choices == []
    assert chunks[-1].usage == whole.usage
    assert {chunk.id for chunk in chunks} == {chunks[0].id}
    assert server.drained()


def test_an_adapter_is_asked_by_its_name(server: Running) -> None:
    for model in ("tiny", "lora", "prefix"):
        client(server).chat.completions.create(model=model, messages=HELLO, max_tokens=2)
    assert [request.adapter for request in server.engine.requests[-3:]] == [None, "lora", "prefix"]
    with pytest.raises(openai.BadRequestError) as error:
        client(server).chat.completions.create(model="judge", messages=HELLO)
    assert error.value.code == "no_text"


def test_texts_are_continued(server: Running) -> None:
    asked: dict[str, Any] = {"model": "tiny", "max_tokens": 6, "seed": 1}
    whole = client(server).completions.create(**asked, prompt=["one", "two"], n=2, logprobs=2)
    assert [choice.index for choice in whole.choices] == [0, 1, 2, 3]
    assert len({choice.text for choice in whole.choices}) == 4
    first = whole.choices[0].logprobs
    assert first is not None
    assert "".join(first.tokens or ()) == whole.choices[0].text
    assert first.text_offset == [len(whole.choices[0].text[:n]) for n in range(6)]
    ids = server.service.target.base.tokenizer("one", add_special_tokens=False)["input_ids"]
    same = client(server).completions.create(**asked, prompt=[ids])
    assert same.choices[0].text == whole.choices[0].text
    echoed = client(server).completions.create(**asked, prompt=ids, echo=True)
    assert echoed.choices[0].text == "one" + same.choices[0].text
    stream = client(server).completions.create(
        **asked, prompt="one", echo=True, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == echoed.choices[0].text
    assert chunks[-1].usage is not None
    assert chunks[-1].usage.completion_tokens == 6


def test_every_field_of_sampling_reaches_the_engine(server: Running) -> None:
    client(server).chat.completions.create(
        model="lora", messages=HELLO, max_tokens=3, temperature=0.5, top_p=0.9, presence_penalty=0.1,
        frequency_penalty=0.2, seed=7, logit_bias={"5": -100}, stop=["zz", "yy"],
        extra_body={"top_k": 4, "min_p": 0.05, "repetition_penalty": 1.1, "ignore_eos": True},
    )  # fmt: skip
    request = server.engine.requests[-1]
    found = request.sampling
    assert (found.temperature, found.top_p, found.top_k, found.min_p) == (0.5, 0.9, 4, 0.05)
    assert (found.presence_penalty, found.frequency_penalty, found.repetition_penalty) == (0.1, 0.2, 1.1)
    assert (found.seed, dict(found.logit_bias)) == (7, {5: -100})
    assert (request.stop, request.ignore_stop_ids, request.max_new_tokens) == (("zz", "yy"), True, 3)
    assert request.deadline is not None
    client(server).chat.completions.create(model="lora", messages=HELLO)
    request = server.engine.requests[-1]
    assert request.sampling.temperature == 1.0
    assert len(request.prompt) + request.max_new_tokens == 256, "as long as the model's positions allow"
    developer: Any = [{"role": "developer", "content": [{"type": "text", "text": "Be brief."}]}, *HELLO]
    client(server).chat.completions.create(model="lora", messages=developer, max_tokens=1)
    system: Any = [{"role": "system", "content": "Be brief."}, *HELLO]
    client(server).chat.completions.create(model="lora", messages=system, max_tokens=1)
    assert list(server.engine.requests[-1].prompt) == list(server.engine.requests[-2].prompt)


def test_a_stop_string_ends_an_answer(serve: Serve) -> None:
    with serve(script="one two three") as server:
        done = client(server).chat.completions.create(model="lora", messages=HELLO, stop=" th")
        assert (done.choices[0].message.content, done.choices[0].finish_reason) == ("one two", "stop")


def test_parse_with_a_schema(serve: Serve) -> None:
    with serve(script='{"name": "red", "kind": "warm"}') as server:
        asked = client(server).chat.completions.parse(model="lora", messages=HELLO, response_format=Colour)
        assert asked.choices[0].message.parsed == Colour(name="red", kind="warm")
        assert "warm" in repr(server.engine.requests[-1].constraint)
        told = client(server).responses.parse(model="lora", input="a colour", text_format=Colour)
        assert told.output_parsed == Colour(name="red", kind="warm")
        assert "warm" in repr(server.engine.requests[-1].constraint)


def test_responses(server: Running) -> None:
    asked: dict[str, Any] = {"model": "lora", "instructions": "Be brief.", "temperature": 0}
    whole = client(server).responses.create(**asked, input="What comes after one?")
    as_turns: Any = [{"role": "user", "content": [{"type": "input_text", "text": "What comes after one?"}]}]
    assert client(server).responses.create(**asked, input=as_turns).output_text == whole.output_text
    prompts = [list(request.prompt) for request in server.engine.requests[-2:]]
    assert prompts[0] == prompts[1]
    events = list(client(server).responses.create(**asked, input=as_turns, stream=True))
    kinds = list(dict.fromkeys(event.type for event in events))
    assert kinds[:4] == [
        "response.created", "response.in_progress", "response.output_item.added", "response.content_part.added",
    ]  # fmt: skip
    assert kinds[4:] == [
        "response.output_text.delta", "response.output_text.done", "response.content_part.done",
        "response.output_item.done", whole.status and f"response.{whole.status}",
    ]  # fmt: skip
    assert [event.sequence_number for event in events] == list(range(len(events)))
    deltas = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert deltas == whole.output_text
    short = client(server).responses.create(**asked, input="one", max_output_tokens=2)
    assert short.status == "incomplete"
    assert short.incomplete_details is not None
    assert short.incomplete_details.reason == "max_output_tokens"
    for field, value in {"previous_response_id": "resp_1", "background": True}.items():
        with pytest.raises(openai.BadRequestError) as error:
            client(server).responses.create(model="lora", input="a", **{field: value})  # type: ignore[call-overload]
        assert error.value.param == field


CALL = 'I look. <tool_call>\n{"name": "weather", "arguments": {"place": "Bergen"}}\n</tool_call>'
WEATHER: Any = {
    "type": "function",
    "function": {"name": "weather", "parameters": {"type": "object", "properties": {"place": {"type": "string"}}}},
}


def test_tools(serve: Serve) -> None:
    with serve(script=CALL, chat_template=TOOLS) as server:
        done = client(server).chat.completions.create(model="lora", messages=HELLO, tools=[WEATHER])
        message = done.choices[0].message
        assert (message.content, done.choices[0].finish_reason) == ("I look.", "tool_calls")
        (call,) = message.tool_calls or ()
        assert call.type == "function"
        assert (call.function.name, json.loads(call.function.arguments)) == ("weather", {"place": "Bergen"})
        with client(server).chat.completions.stream(model="lora", messages=HELLO, tools=[WEATHER]) as stream:
            text = "".join(event.delta for event in stream if event.type == "content.delta")
            (again,) = stream.get_final_completion().choices[0].message.tool_calls or ()
        assert (text, again.function) != ("", None)
        assert "tool_call" not in text
        assert again.function.arguments == call.function.arguments
        said = [
            *HELLO,
            message.model_dump(exclude_none=True),
            {"role": "tool", "tool_call_id": call.id, "content": "rain"},
        ]
        client(server).chat.completions.create(model="lora", messages=said, tools=[WEATHER], max_tokens=1)
        assert "rain" in server.engine.tokenizer.decode(server.engine.requests[-1].prompt)
        flat: Any = {"type": "function", **WEATHER["function"], "strict": False}
        told = client(server).responses.create(model="lora", input="weather?", tools=[flat])
        assert [item.type for item in told.output] == ["message", "function_call"]
        with client(server).responses.stream(model="lora", input="weather?", tools=[flat]) as events:
            final = [event for event in events][-1]
        assert final.type == "response.completed"
        assert [item.type for item in final.response.output] == ["message", "function_call"]


def test_tools_that_the_model_is_not_shown_are_refused(serve: Serve) -> None:
    blind = TOOLS[TOOLS.index("{% for message") :]
    with serve(chat_template=blind) as server, pytest.raises(openai.BadRequestError) as error:
        client(server).chat.completions.create(model="lora", messages=HELLO, tools=[WEATHER])
    assert (error.value.param, error.value.code) == ("tools", "unsupported_parameter")


def test_tools_are_refused_by_name_where_the_template_has_none(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client(server).chat.completions.create(model="lora", messages=HELLO, tools=[WEATHER])
    assert (error.value.param, error.value.code) == ("tools", "unsupported_parameter")


def test_the_async_client(server: Running) -> None:
    async def ask() -> list[str]:
        async with openai.AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as asking:

            async def one(number: int) -> str:
                stream = await asking.chat.completions.create(
                    model=("tiny", "lora", "prefix")[number % 3],
                    messages=HELLO,
                    max_tokens=20,
                    seed=number,
                    stream=True,
                )
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*(one(number) for number in range(30)))

    found = asyncio.run(ask())
    assert len(set(found)) == 30
    assert all(found)
    assert server.drained()


def test_errors_are_the_clients_own(server: Running) -> None:
    with pytest.raises(openai.BadRequestError) as error:
        client(server).chat.completions.create(model="lora", messages=[{"role": "user", "content": "word " * 300}])
    assert error.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client(server).chat.completions.create(model="nobody", messages=HELLO)
    assert missing.value.code == "model_not_found"
    with pytest.raises(openai.NotFoundError) as none:
        client(server).embeddings.create(model="lora", input="a")
    assert none.value.code == "no_embeddings"
    assert server.drained()
