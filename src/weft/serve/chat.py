"""POST /v1/chat/completions."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence
from typing import Any

from weft.data.rendering.sample import Prompt
from weft.generation.request import Completion, Token
from weft.serve.answers import ChatAnswer, ChatChoice, ChoiceLogprobs, Finish, Usage
from weft.serve.asking import Ask, constraint_of, stops_of
from weft.serve.envelope import bad_request
from weft.serve.registry import Served
from weft.serve.requests import ChatMessage, ChatRequest
from weft.serve.service import Service, Writing
from weft.serve.sse import DONE, Events, event
from weft.serve.tools import Call, ToolFormat, ToolSplitter, check_rendered, find_format


class Chat:
    """One request to a chat: what is asked, and how the answer is written down.

    It is used by ``/v1/responses`` too, whose answers say the same in other words.
    """

    def __init__(self, service: Service, asked: ChatRequest, param: str = "messages") -> None:
        """``param``: the conversation's field. Raises ApiError for what cannot be answered, before anything waits."""
        _check(asked)
        self.service, self.asked = service, asked
        self.served = service.registry.find(asked.model)
        self.ask = Ask(
            service,
            self.served,
            asked,
            n=asked.n or 1,
            max_tokens=asked.max_completion_tokens or asked.max_tokens,
            stop=stops_of(asked.stop),
            logprobs=(asked.top_logprobs or 0) if asked.logprobs else None,
            constraint=constraint_of(asked.response_format, asked.structured_outputs),
            param=param,
        )
        self.tools = [] if asked.tool_choice == "none" else [_schema(tool) for tool in asked.tools or ()]
        if self.tools and self.ask.constraint is not None:
            raise bad_request("A form of the answer and tools exclude each other.", "response_format", "invalid_value")
        self.form: ToolFormat | None = None
        self.id, self.created = f"chatcmpl-{secrets.token_hex(12)}", int(time.time())
        self.writing = Writing(service, self.served, self.ask.n)

    async def begin(self) -> None:
        """Render the prompt and hand it to the engine.

        Raises:
            ApiError: It cannot be rendered, or is too long.
        """
        await self.writing.submit(lambda: self.ask.requests([self._prompt()]))

    def _prompt(self) -> Prompt:
        prompt, self.form = chat_prompt(self.served, [_turn(message) for message in self.asked.messages], self.tools)
        return prompt

    def choice(self, index: int, done: Completion) -> ChatChoice:
        """A whole answer."""
        found = None if self.form is None else self.form.read(done.text)
        finish: Finish = "length" if done.finish_reason == "length" else "stop"
        logprobs = self.logprobs(done.tokens)
        if found is None:
            return {
                "index": index,
                "message": {"role": "assistant", "content": done.text, "refusal": None},
                "logprobs": logprobs,
                "finish_reason": finish,
            }
        calls = [call.message() for call in found[1][: self.most_calls]]
        return {
            "index": index,
            "message": {"role": "assistant", "content": found[0] or None, "refusal": None, "tool_calls": calls},
            "logprobs": logprobs,
            "finish_reason": "tool_calls",
        }

    @property
    def most_calls(self) -> int | None:
        """How many calls an answer may hold."""
        return 1 if self.asked.parallel_tool_calls is False else None

    def logprobs(self, tokens: Sequence[Token]) -> ChoiceLogprobs | None:
        """The log-probabilities of tokens, if they are asked for."""
        if self.ask.logprobs is None:
            return None
        texts = self.service.texts
        return {"content": [texts.entry(token) for token in tokens], "refusal": None}

    async def answer(self) -> ChatAnswer:
        """The whole answer."""
        done = await self.writing.completions()
        return {
            "id": self.id,
            "object": "chat.completion",
            "created": self.created,
            "model": self.asked.model,
            "choices": [self.choice(index, one) for index, one in enumerate(done)],
            "usage": usage_of(done[:1], done),
            "system_fingerprint": self.service.fingerprint,
            "service_tier": None,
        }

    async def events(self) -> Events:
        """The answer in pieces."""
        options = self.asked.stream_options
        with_usage = bool(options and options.include_usage)
        pieces = [ChoicePieces(self, index) for index in range(self.ask.n)]
        done: dict[int, Completion] = {}

        def chunk(choices: list[dict[str, Any]], usage: Usage | None = None) -> bytes:
            more = {"usage": usage} if with_usage else {}
            return event(
                {
                    "id": self.id,
                    "object": "chat.completion.chunk",
                    "created": self.created,
                    "model": self.asked.model,
                    "system_fingerprint": self.service.fingerprint,
                    "choices": choices,
                    **more,
                }
            )

        for index in range(self.ask.n):
            head = {"role": "assistant", "content": "", "refusal": None}
            yield chunk([{"index": index, "delta": head, "logprobs": None, "finish_reason": None}])
        async for index, item in self.writing.items():
            if isinstance(item, Completion):
                done[index] = item
            for piece in pieces[index].of(item):
                yield chunk([piece])
        if with_usage:
            yield chunk([], usage_of([done[0]], list(done.values())))
        yield DONE


class ChoicePieces:
    """The pieces of one answer of a stream."""

    def __init__(self, chat: Chat, index: int) -> None:
        self.chat, self.index, self._sent = chat, index, 0
        self._splitter: ToolSplitter | None = None

    def of(self, item: Token | Completion) -> list[dict[str, Any]]:
        """The pieces that a token, or the end, brings."""
        if self._splitter is None and self.chat.form is not None:
            self._splitter = ToolSplitter(self.chat.form)
        if isinstance(item, Token):
            self._sent += len(item.text)
            text = item.text if self._splitter is None else self._splitter.push(item.text)
            logprobs = self.chat.logprobs([item])
            return [self._piece({"content": text}, logprobs)] if text or logprobs else []
        rest = item.text[self._sent :]
        calls: list[Call] = []
        if self._splitter is not None:
            text = self._splitter.push(rest)
            more, calls = self._splitter.end()
            rest = text + more
        found = [self._piece({"content": rest})] if rest else []
        for number, call in enumerate(calls[: self.chat.most_calls]):
            found.append(self._piece({"tool_calls": [{**call.message(), "index": number}]}))
        finish = "tool_calls" if calls else "length" if item.finish_reason == "length" else "stop"
        return [*found, self._piece({}, finish=finish)]

    def _piece(
        self, delta: dict[str, Any], logprobs: ChoiceLogprobs | None = None, finish: str | None = None
    ) -> dict[str, Any]:
        return {"index": self.index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}


def chat_prompt(
    served: Served, turns: list[dict[str, Any]], tools: list[dict[str, Any]]
) -> tuple[Prompt, ToolFormat | None]:
    """The prompt of a conversation, and the form in which tools are called.

    Raises:
        ApiError: The template shows no tools, or writes calls in an unknown form.
    """
    target = served.target
    if not tools:
        return target.prompt(turns), None
    form = find_format(target.renderer, tools)
    prompt = target.renderer.prompt(turns, tools=tools, task=target.adapters.architecture.task)
    check_rendered(prompt.ids, target.prompt(turns).ids)
    return prompt, form


def usage_of(read: Sequence[Completion], written: Sequence[Completion]) -> Usage:
    """The tokens of prompts, one completion for each, and of answers."""
    prompt, answer = sum(one.prompt_tokens for one in read), sum(len(one.ids) for one in written)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": answer,
        "total_tokens": prompt + answer,
        "prompt_tokens_details": {"cached_tokens": sum(one.cached_tokens for one in read), "audio_tokens": 0},
        "completion_tokens_details": {
            "reasoning_tokens": 0,
            "audio_tokens": 0,
            "accepted_prediction_tokens": 0,
            "rejected_prediction_tokens": 0,
        },
    }


def _check(asked: ChatRequest) -> None:
    if asked.top_logprobs and not asked.logprobs:
        raise bad_request("top_logprobs needs logprobs: true.", "top_logprobs", "invalid_value")
    check_stream(asked.stream, asked.stream_options)
    if None not in (asked.max_tokens, asked.max_completion_tokens) and asked.max_tokens != asked.max_completion_tokens:
        raise bad_request("max_tokens and max_completion_tokens differ: send one.", "max_tokens", "invalid_value")
    for number, message in enumerate(asked.messages):
        where, role = f"messages[{number}]", message.role
        if message.tool_calls and role != "assistant":
            raise bad_request(f"{where}: only an assistant calls tools.", f"{where}.tool_calls", "invalid_value")
        if message.content is None and not message.tool_calls:
            raise bad_request(f"{where}.content: a turn must say something.", f"{where}.content", "invalid_value")
        if role == "tool" and message.tool_call_id is None:
            raise bad_request(f"{where}: a tool's turn needs tool_call_id.", f"{where}.tool_call_id", "invalid_value")


def check_stream(stream: bool | None, options: object) -> None:
    """Refuse options of a stream where there is none.

    Raises:
        ApiError: There is none.
    """
    if options is not None and not stream:
        raise bad_request("stream_options needs stream: true.", "stream_options", "invalid_value")


def _turn(message: ChatMessage) -> dict[str, Any]:
    """The message as the renderer reads it."""
    content = message.content
    text = content if isinstance(content, str) else "".join(part.text for part in content or ())
    turn: dict[str, Any] = {"role": message.role, "content": text}
    if message.tool_calls:
        turn["tool_calls"] = [{"function": call.function.model_dump()} for call in message.tool_calls]
    return turn


def _schema(tool: Any) -> dict[str, Any]:
    found: dict[str, Any] = tool.model_dump(exclude_none=True)
    return found
