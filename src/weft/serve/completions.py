"""POST /v1/completions: texts are continued as they stand, without a chat template."""

from __future__ import annotations

import secrets
import time
from collections.abc import Sequence

from weft.data.rendering.sample import Prompt
from weft.errors import UserError
from weft.generation.request import Completion, Token
from weft.generation.text import decode
from weft.models.token_rows import check_rows
from weft.serve.answers import Finish, OldLogprobs, TextAnswer, TextChoice, Usage
from weft.serve.asking import Ask, constraint_of, stops_of
from weft.serve.chat import check_stream, usage_of
from weft.serve.envelope import bad_request
from weft.serve.requests import CompletionRequest
from weft.serve.service import Service, Writing
from weft.serve.sse import DONE, Events, event

_USUAL = 16  # tokens, where a request names no number: OpenAI's default


class TextCompletion:
    """One request to continue texts."""

    def __init__(self, service: Service, asked: CompletionRequest) -> None:
        """Raises ApiError for what cannot be answered, before anything waits."""
        _check(asked)
        self.service, self.asked, self.served = service, asked, service.registry.find(asked.model)
        self.prompts = _prompts(asked.prompt)
        self.ask = Ask(
            service,
            self.served,
            asked,
            n=asked.n or 1,
            max_tokens=asked.max_tokens,
            usual=_USUAL,
            stop=stops_of(asked.stop),
            logprobs=asked.logprobs,
            constraint=constraint_of(None, asked.structured_outputs),
            param="prompt",
        )
        self.id, self.created = f"cmpl-{secrets.token_hex(12)}", int(time.time())
        self._ids: list[Prompt] = []
        self.writing = Writing(service, self.served, len(self.prompts) * self.ask.n)

    async def begin(self) -> None:
        """Tokenise the prompts and hand them to the engine.

        Raises:
            ApiError: One cannot be tokenised, or is too long.
        """

        def make() -> list[Prompt]:
            self._ids = [self._prompt(prompt) for prompt in self.prompts]
            return self._ids

        await self.writing.submit(lambda: self.ask.requests(make()))

    def _prompt(self, prompt: str | list[int]) -> Prompt:
        target = self.served.target
        if isinstance(prompt, str):
            return target.prompt(prompt, raw=True)
        try:
            check_rows(prompt, target.base.token_rows, target.base.tokenizer, "the prompt")
        except UserError as error:
            raise bad_request(str(error), "prompt", "invalid_value") from None
        return Prompt(prompt)

    def _echo(self, index: int) -> str:
        """The prompt of an answer, if it is to be repeated."""
        if not self.asked.echo:
            return ""
        prompt = self.prompts[index // self.ask.n]
        return prompt if isinstance(prompt, str) else decode(self.served.target.base.tokenizer, prompt)

    def _logprobs(self, tokens: Sequence[Token], offset: int) -> OldLogprobs | None:
        if self.asked.logprobs is None:
            return None
        return self.service.texts.old(tokens, offset, self.asked.logprobs)

    def _usage(self, done: Sequence[Completion]) -> Usage:
        return usage_of(done[:: self.ask.n], done)

    def _body(self, choices: list[TextChoice]) -> TextAnswer:
        return {
            "id": self.id,
            "object": "text_completion",
            "created": self.created,
            "model": self.asked.model,
            "choices": choices,
            "system_fingerprint": self.service.fingerprint,
        }

    async def answer(self) -> TextAnswer:
        """The whole answer."""
        done = await self.writing.completions()
        choices: list[TextChoice] = [
            {
                "index": index,
                "text": self._echo(index) + one.text,
                "logprobs": self._logprobs(one.tokens, 0),
                "finish_reason": _finish(one),
            }
            for index, one in enumerate(done)
        ]
        return {**self._body(choices), "usage": self._usage(done)}

    async def events(self) -> Events:
        """The answer in pieces."""
        options = self.asked.stream_options
        with_usage = bool(options and options.include_usage)
        sent = [0] * self.writing.count
        offsets = [0] * self.writing.count
        done: dict[int, Completion] = {}

        def chunk(choices: list[TextChoice], usage: Usage | None = None) -> bytes:
            body = self._body(choices)
            return event({**body, "usage": usage} if with_usage else body)

        for index in range(self.writing.count):
            if text := self._echo(index):
                yield chunk([{"index": index, "text": text, "logprobs": None, "finish_reason": None}])
        async for index, item in self.writing.items():
            finish: Finish | None = None
            logprobs = None
            if isinstance(item, Completion):
                done[index], finish = item, _finish(item)
                text = item.text[sent[index] :]
            else:
                text, logprobs = item.text, self._logprobs([item], offsets[index])
                if logprobs is not None:
                    offsets[index] += len(logprobs["tokens"][0])
            sent[index] += len(text)
            if text or finish or logprobs:
                yield chunk([{"index": index, "text": text, "logprobs": logprobs, "finish_reason": finish}])
        if with_usage:
            yield chunk([], self._usage([done[index] for index in sorted(done)]))
        yield DONE


def _finish(done: Completion) -> Finish:
    return "length" if done.finish_reason == "length" else "stop"


def _prompts(given: str | list[str] | list[int] | list[list[int]]) -> list[str | list[int]]:
    """The prompts, each a text or token ids."""
    if isinstance(given, str):
        return [given]
    numbers = [one for one in given if isinstance(one, int)]
    return [numbers] if numbers else [one for one in given if not isinstance(one, int)]


def _check(asked: CompletionRequest) -> None:
    check_stream(asked.stream, asked.stream_options)
    if asked.best_of is not None and asked.best_of != (asked.n or 1):
        raise bad_request(
            "best_of: answers are not chosen among others. Send n alone.", "best_of", "unsupported_parameter"
        )
    if asked.echo and asked.logprobs is not None:
        raise bad_request(
            "echo: prompts have no log-probabilities here. Leave out echo or logprobs.", "echo", "unsupported_parameter"
        )
