"""A request, and the answer to it as it comes."""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field
from typing import Literal, Protocol

from weft.generation.constraint import Constraint
from weft.generation.sampling import Sampling

FinishReason = Literal["stop", "length", "cancelled", "deadline"]


@dataclass(frozen=True)
class Request:
    """One prompt for one adapter (None: the base).

    Attributes:
        prompt: token ids.
        slots: places in the prompt at which an adapter's virtual tokens stand.
        stop: strings that end the answer; they are no part of its text.
        ignore_stop_ids: whether the answer goes on after an end token.
        logprobs: None: none; k: the log-probability of every chosen token and of the k likeliest. They are those of the
            whole vocabulary at the sampling's temperature (0 counts as 1), before penalties, biases and cuts.
        constraint: what the answer's text must be.
        deadline: the moment, by ``time.monotonic()``, at which the answer ends as it is.
    """

    prompt: Sequence[int]
    adapter: str | None = None
    max_new_tokens: int = 64
    _: KW_ONLY
    sampling: Sampling = field(default_factory=Sampling)
    slots: Sequence[int] = ()
    stop: Sequence[str] = ()
    ignore_stop_ids: bool = False
    logprobs: int | None = None
    constraint: Constraint | None = None
    deadline: float | None = None


@dataclass(frozen=True)
class Token:
    """One token of an answer; ``text`` is what became certain with it, which may be nothing.

    ``top`` holds (token id, log-probability) of the likeliest, if they were asked for.
    """

    id: int
    text: str = ""
    logprob: float | None = None
    top: tuple[tuple[int, float], ...] = ()


@dataclass
class Completion:
    """A whole answer.

    Attributes:
        ids: its token ids, without the end token.
        finish_reason: ``stop`` (an end token, a stop string, a grammar's end), ``length``, ``cancelled``, ``deadline``.
        text: its text, without a stop string; "" where the engine has no tokenizer.
        tokens: each of ``ids`` with its log-probabilities.
        stop: the stop string that ended it.
        tail: the text that came with no token: what was held back until the end.
        end: the end token, which is not among ``ids``; None: none was written.
        cached_tokens: how many of the prompt's tokens were computed before.
    """

    ids: list[int]
    finish_reason: FinishReason = "length"
    _: KW_ONLY
    text: str = ""
    tokens: list[Token] = field(default_factory=list)
    stop: str | None = None
    tail: str = ""
    end: Token | None = None
    prompt_tokens: int = 0
    cached_tokens: int = 0


class Stepper(Protocol):
    """What computes answers, as whoever waits for one sees it."""

    @property
    def threaded(self) -> bool:
        """Whether a thread of its own computes."""

    def step(self) -> bool:
        """Compute one step; False if there was nothing to do."""


class Answer:
    """An answer that is being written: iterate over its tokens, in a thread or in an event loop.

    Attributes:
        request: what was asked.
    """

    def __init__(self, request: Request, stepper: Stepper, hear: Callable[[Token], None] | None = None) -> None:
        """``hear`` is called with every token, by the thread that computes."""
        self.request = request
        self._stepper, self._hear = stepper, hear
        self._tokens: list[Token] = []
        self._completion: Completion | None = None
        self._error: BaseException | None = None
        self._cancelled = False
        self._changed = threading.Condition()
        self._listeners: list[Callable[[], object]] = []

    @property
    def done(self) -> bool:
        """Whether it has ended."""
        return self._completion is not None or self._error is not None

    @property
    def cancelled(self) -> bool:
        """Whether somebody asked for its end."""
        return self._cancelled

    def cancel(self) -> None:
        """End it after the step that is running, or at once if it has not begun."""
        self._cancelled = True

    def result(self, timeout: float | None = None) -> Completion:
        """Wait for the end.

        Raises:
            TimeoutError: It has not come within ``timeout`` seconds.
            BaseException: What stopped the engine.
        """
        until = None if timeout is None else time.monotonic() + timeout
        while not self.done:
            self._wait(len(self._tokens), until)
        return self._end()

    async def aresult(self) -> Completion:
        """``result`` in an event loop."""
        async for _ in self:
            pass
        return self._end()

    def __iter__(self) -> Iterator[Token]:
        seen = 0
        while True:
            while seen < len(self._tokens):
                yield self._tokens[seen]
                seen += 1
            if self.done and seen == len(self._tokens):
                self._end()
                return
            self._wait(seen, None)

    async def __aiter__(self) -> AsyncIterator[Token]:
        loop, changed = asyncio.get_running_loop(), asyncio.Event()
        seen = 0
        with self.heard_by(lambda: None if loop.is_closed() else loop.call_soon_threadsafe(changed.set)):
            while True:
                changed.clear()
                tokens, done = self.since(seen)
                for token in tokens:
                    yield token
                seen += len(tokens)
                if done:
                    self._end()
                    return
                if self._stepper.threaded or not await asyncio.to_thread(self._stepper.step):
                    await changed.wait()

    @contextlib.contextmanager
    def heard_by(self, wake: Callable[[], object]) -> Iterator[None]:
        """Let the thread that computes call ``wake`` after every token and at the end, as long as the block lasts."""
        with self._changed:
            self._listeners.append(wake)
        try:
            yield
        finally:
            with self._changed:
                self._listeners.remove(wake)

    def since(self, seen: int) -> tuple[list[Token], bool]:
        """The tokens after the first ``seen``, and whether no more will come."""
        done = self.done  # before the tokens: the last of them come before the end
        return self._tokens[seen:], done

    def put(self, token: Token) -> None:
        """Add a token; the engine calls this."""
        if self._hear is not None:
            self._hear(token)
        with self._changed:
            self._tokens.append(token)
            self._tell()

    def end(self, completion: Completion | None, error: BaseException | None = None) -> None:
        """End the answer; the engine calls this."""
        with self._changed:
            self._completion, self._error = completion, error
            self._tell()

    def _tell(self) -> None:
        self._changed.notify_all()
        for wake in self._listeners:
            wake()

    def _wait(self, seen: int, until: float | None) -> None:
        left = None if until is None else until - time.monotonic()
        if left is not None and left <= 0:
            raise TimeoutError("the answer has not ended yet")
        if not self._stepper.threaded and self._stepper.step():
            return
        with self._changed:
            if len(self._tokens) == seen and not self.done:
                self._changed.wait(left)

    def _end(self) -> Completion:
        if self._error is not None:
            raise self._error
        assert self._completion is not None
        return self._completion
