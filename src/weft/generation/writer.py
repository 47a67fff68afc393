"""The side of a row that its reader sees: which token is next, what text it makes, and when the answer ends."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import replace
from typing import TYPE_CHECKING

from weft.errors import UserError
from weft.generation.constraint import Matcher
from weft.generation.request import Answer, Completion, FinishReason, Request, Token
from weft.generation.sampling import Drawing
from weft.generation.text import StopStrings, TextStream

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Writer:
    """Collects the tokens of one answer and hands them on."""

    def __init__(
        self,
        request: Request,
        answer: Answer,
        tokenizer: PreTrainedTokenizerBase | None,
        stop_ids: Collection[int],
        matcher: Matcher | None = None,
    ) -> None:
        if request.stop and tokenizer is None:
            raise UserError("stop strings need the tokenizer; give it to the engine.")
        self.request, self.answer = request, answer
        self.stop_ids = frozenset[int]() if request.ignore_stop_ids else frozenset(stop_ids)
        self.drawing = Drawing(request.sampling, request.prompt, matcher=matcher, logprobs=request.logprobs)
        self._text = None if tokenizer is None else TextStream(tokenizer)
        self._stops, self._matcher = StopStrings(request.stop), matcher
        self._tokens: list[Token] = []
        self._end: Token | None = None

    def take(self, token: Token) -> FinishReason | None:
        """Take the next token; returns why the answer ends with it, if it does."""
        if token.id in self.stop_ids:
            self._end = token
            return "stop"
        if self._text is not None:
            token = replace(token, text=self._stops.push(self._text.push(token.id)))
        self._tokens.append(token)
        self.answer.put(token)
        if self._stops.found is not None or (self._matcher is not None and self._matcher.ended):
            return "stop"
        return "length" if len(self._tokens) >= self.request.max_new_tokens else None

    def end(self, reason: FinishReason, *, cached: int, error: BaseException | None = None) -> None:
        """End the answer; ``cached``: how many of the prompt's tokens were there when it began."""
        if error is not None:
            self.answer.end(None, error)
            return
        tail = ""
        if self._text is not None:
            tail = self._stops.push(self._text.flush())
            tail += "" if self._stops.found else self._stops.flush()
        self.answer.end(Completion(
            [token.id for token in self._tokens],
            reason,
            stop=self._stops.found,
            text="".join(token.text for token in self._tokens) + tail,
            tokens=self._tokens,
            tail=tail,
            end=self._end,
            prompt_tokens=len(self.request.prompt),
            cached_tokens=cached,
        ))  # fmt: skip
