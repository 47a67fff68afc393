"""POST /v1/responses: OpenAI's newer form of a chat. Nothing is kept, so every request holds the whole conversation."""

from __future__ import annotations

import secrets
import time
from collections.abc import Iterator
from typing import Any, Literal

from weft.generation.request import Completion, Token
from weft.serve.answers import ResponseAnswer, ResponseUsage
from weft.serve.chat import Chat, check_stream
from weft.serve.requests import ChatRequest
from weft.serve.response_requests import InputCall, InputMessage, InputResult, InputText, ResponseRequest
from weft.serve.service import Service
from weft.serve.sse import Events, event
from weft.serve.tools import ToolSplitter

_Item = dict[str, Any]


class ResponseWriter:
    """One request: a chat, whose answer is written down as output items."""

    def __init__(self, service: Service, asked: ResponseRequest) -> None:
        """Raises ApiError for what cannot be answered, before anything waits."""
        check_stream(asked.stream, asked.stream_options)
        self.asked = asked
        self.id, self.created = f"resp_{secrets.token_hex(16)}", int(time.time())
        self.chat = Chat(service, _as_chat(asked), "input")
        self.writing = self.chat.writing

    async def begin(self) -> None:
        """Render the prompt and hand it to the engine.

        Raises:
            ApiError: It cannot be rendered, or is too long.
        """
        await self.chat.begin()

    async def answer(self) -> ResponseAnswer:
        """The whole answer."""
        (done,) = await self.writing.completions()
        return self._body(done, self._items(done))

    def _items(self, done: Completion) -> list[_Item]:
        """The output items: a message, if anything was said or nothing called, and the calls."""
        message = self.chat.choice(0, done)["message"]
        calls = [_call_item(call["id"], call["function"]) for call in message.get("tool_calls", ())]
        text = message["content"] or ""
        said = [self._message(_id("msg"), text, done)] if text or not calls else []
        return [*said, *calls]

    def _message(self, name: str, text: str, done: Completion) -> _Item:
        logprobs = self.chat.logprobs(done.tokens)
        part = _part(text, [] if logprobs is None else list(logprobs["content"]))
        return {
            "id": name,
            "type": "message",
            "role": "assistant",
            "status": "incomplete" if done.finish_reason == "length" else "completed",
            "content": [part],
        }

    def _body(self, done: Completion | None, output: list[_Item]) -> ResponseAnswer:
        """The response; ``done`` is None while it is being written."""
        asked = self.asked
        cut = done is not None and done.finish_reason == "length"
        status: Literal["in_progress", "completed", "incomplete"] = "incomplete" if cut else "completed"
        form = asked.text.model_dump(by_alias=True, exclude_none=True) if asked.text else {}
        return {
            "id": self.id,
            "object": "response",
            "created_at": self.created,
            "completed_at": None if done is None or cut else int(time.time()),
            "status": "in_progress" if done is None else status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "instructions": asked.instructions,
            "model": asked.model,
            "output": output,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "temperature": 1.0 if asked.temperature is None else asked.temperature,
            "top_p": 1.0 if asked.top_p is None else asked.top_p,
            "tool_choice": asked.tool_choice or "auto",
            "tools": [
                {"strict": False, "parameters": None, **tool.model_dump(exclude_none=True)}
                for tool in asked.tools or ()
            ],
            "text": {"format": {"type": "text"}, **form},
            "max_output_tokens": asked.max_output_tokens,
            "previous_response_id": None,
            "metadata": {},
            "store": False,
            "truncation": "disabled",
            "usage": None if done is None else _usage(done),
        }

    async def events(self) -> Events:
        """The answer in pieces: OpenAI's events, numbered."""
        number = -1

        def named(kind: str, **fields: object) -> bytes:
            nonlocal number
            number += 1
            return event({"type": kind, "sequence_number": number, **fields}, kind)

        yield named("response.created", response=self._body(None, []))
        yield named("response.in_progress", response=self._body(None, []))
        splitter = None if self.chat.form is None else ToolSplitter(self.chat.form)
        name, sent, shown, done = _id("msg"), 0, "", None
        async for _, item in self.writing.items():
            if isinstance(item, Token):
                sent += len(item.text)
                text = item.text if splitter is None else splitter.push(item.text)
            else:
                done, text = item, item.text[sent:]
                if splitter is not None:
                    text = splitter.push(text) + splitter.end()[0]
            if text and not shown:
                for kind, fields in _opening(name):
                    yield named(kind, **fields)
            if text:
                shown += text
                yield named("response.output_text.delta", **_at(name), delta=text, logprobs=self._entries(item))
        assert done is not None
        items = self._items(done)
        if items[0]["type"] == "message" and not shown:
            for kind, fields in _opening(name):
                yield named(kind, **fields)
        if shown or items[0]["type"] == "message":
            items = [self._message(name, shown, done), *(one for one in items if one["type"] != "message")]
        for index, one in enumerate(items):
            for kind, fields in _closing(one) if one["type"] == "message" else _call_events(one, index):
                yield named(kind, **fields)
        body = self._body(done, items)
        yield named(f"response.{body['status']}", response=body)

    def _entries(self, item: Token | Completion) -> list[Any]:
        found = self.chat.logprobs([item]) if isinstance(item, Token) else None
        return [] if found is None else list(found["content"])


def _id(kind: str) -> str:
    return f"{kind}_{secrets.token_hex(16)}"


def _at(name: str) -> _Item:
    """The place of the text: the first part of the first item."""
    return {"item_id": name, "output_index": 0, "content_index": 0}


def _part(text: str, logprobs: list[Any]) -> _Item:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}


def _call_item(call: str, function: Any) -> _Item:
    return {
        "id": _id("fc"),
        "type": "function_call",
        "call_id": call,
        "name": function["name"],
        "arguments": function["arguments"],
        "status": "completed",
    }


def _opening(name: str) -> Iterator[tuple[str, _Item]]:
    """The events before the first text."""
    item = {"id": name, "type": "message", "role": "assistant", "status": "in_progress", "content": []}
    yield "response.output_item.added", {"output_index": 0, "item": item}
    yield "response.content_part.added", {**_at(name), "part": _part("", [])}


def _closing(item: _Item) -> Iterator[tuple[str, _Item]]:
    """The events after the last text."""
    part, at = item["content"][0], _at(item["id"])
    yield "response.output_text.done", {**at, "text": part["text"], "logprobs": part["logprobs"]}
    yield "response.content_part.done", {**at, "part": part}
    yield "response.output_item.done", {"output_index": 0, "item": item}


def _call_events(item: _Item, index: int) -> Iterator[tuple[str, _Item]]:
    """The events of a call, which comes whole."""
    at = {"item_id": item["id"], "output_index": index}
    begun = {**item, "arguments": "", "status": "in_progress"}
    yield "response.output_item.added", {"output_index": index, "item": begun}
    yield "response.function_call_arguments.delta", {**at, "delta": item["arguments"]}
    done = {**at, "name": item["name"], "arguments": item["arguments"]}
    yield "response.function_call_arguments.done", done
    yield "response.output_item.done", {"output_index": index, "item": item}


def _usage(done: Completion) -> ResponseUsage:
    return {
        "input_tokens": done.prompt_tokens,
        "input_tokens_details": {"cached_tokens": done.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": len(done.ids),
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": done.prompt_tokens + len(done.ids),
    }


def _as_chat(asked: ResponseRequest) -> ChatRequest:
    """The same request to a chat."""
    same = {"model", "temperature", "top_p", "presence_penalty", "frequency_penalty", "seed", "logit_bias", "top_k",
            "min_p", "repetition_penalty", "ignore_eos", "stream", "tool_choice", "parallel_tool_calls"}  # fmt: skip
    values: dict[str, Any] = asked.model_dump(include=same)
    values |= {"messages": _messages(asked), "max_completion_tokens": asked.max_output_tokens}
    if asked.tools:
        kept = {"name", "description", "parameters", "strict"}
        values["tools"] = [{"type": "function", "function": tool.model_dump(include=kept)} for tool in asked.tools]
    if "message.output_text.logprobs" in (asked.include or ()) or asked.top_logprobs:
        values |= {"logprobs": True, "top_logprobs": asked.top_logprobs}
    if asked.text is not None and asked.text.format is not None:
        form = asked.text.format.model_dump(by_alias=True)
        kind = form.pop("type")
        values["response_format"] = {"type": kind, **({"json_schema": form} if kind == "json_schema" else {})}
    return ChatRequest.read(values)


def _messages(asked: ResponseRequest) -> list[dict[str, Any]]:
    """The turns of a chat. Calls belong to the assistant's turn before them."""
    found: list[dict[str, Any]] = [{"role": "system", "content": asked.instructions}] if asked.instructions else []
    if isinstance(asked.input, str):
        return [*found, {"role": "user", "content": asked.input}]
    for item in asked.input:
        if isinstance(item, InputMessage):
            found.append({"role": item.role, "content": _text(item.content)})
        elif isinstance(item, InputResult):
            found.append({"role": "tool", "content": _text(item.output), "tool_call_id": item.call_id})
        else:
            _add_call(found, item)
    return found


def _add_call(found: list[dict[str, Any]], item: InputCall) -> None:
    if not found or found[-1]["role"] != "assistant":
        found.append({"role": "assistant", "content": None})
    call = {"id": item.call_id, "type": "function", "function": {"name": item.name, "arguments": item.arguments}}
    found[-1].setdefault("tool_calls", []).append(call)


def _text(content: str | list[InputText]) -> str:
    return content if isinstance(content, str) else "".join(part.text for part in content)
