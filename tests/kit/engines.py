"""An engine that computes nothing: it writes what a test says, as slowly as the test says."""

from __future__ import annotations

import hashlib
import threading
import time
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

from weft.core.adapters import Adapters
from weft.errors import UserError
from weft.generation.engine import Stats
from weft.generation.request import Answer, Completion, Request, Token
from weft.generation.text import TextStream

Script = Callable[[Request], Sequence[int]]


@dataclass(eq=False)
class _Row:
    request: Request
    answer: Answer
    ids: list[int]
    stream: TextStream
    text: str = ""
    told: int = 0
    tokens: list[Token] = field(default_factory=list)


class FakeEngine:
    """``Engine``'s methods. Text comes a token late, as where a stop string may have begun.

    Every step gives each row its next token of ``script(request)``, or of a text.

    Attributes:
        delay: seconds of a step.
        stuck: while it is set, no step ends.
        requests: all that was asked.
    """

    threaded = True

    def __init__(
        self,
        adapters: Adapters,
        *,
        tokenizer: Any,
        script: Script | str | None = None,
        delay: float = 0.0,
        max_rows: int = 64,
    ) -> None:
        self.adapters, self.tokenizer, self.delay, self.max_rows = adapters, tokenizer, delay, max_rows
        self.script: Script = self._letters
        if script is not None:
            self.script = (lambda request: self._ids(script)) if isinstance(script, str) else script
        self.stuck = threading.Event()
        self.requests: list[Request] = []
        self._waiting: list[_Row] = []
        self._running: list[_Row] = []
        self._work: list[tuple[Callable[[], Any], Future[Any]]] = []
        self._lock = threading.Condition()
        self._closed = False
        self._steps = self._tokens = 0
        self._last = time.monotonic()
        self._thread = threading.Thread(target=self._run, daemon=True)

    def _letters(self, request: Request) -> list[int]:
        """Letters that depend on prompt, adapter and seed, as an answer of a model would."""
        about = f"{list(request.prompt)} {request.adapter} {request.sampling.temperature and request.sampling.seed}"
        digest = hashlib.sha256(about.encode()).digest() * (request.max_new_tokens // 32 + 1)
        word = "".join(chr(97 + byte % 26) for byte in digest[: request.max_new_tokens])
        return [self._ids(letter)[0] for letter in word]

    def _ids(self, text: str) -> list[int]:
        found: list[int] = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return found

    def submit(self, request: Request) -> Answer:
        if request.adapter is not None and request.adapter not in self.adapters:
            raise UserError(f"no adapter named {request.adapter!r}")
        answer = Answer(request, self)
        row = _Row(request, answer, list(self.script(request)), TextStream(self.tokenizer))
        with self._lock:
            self.requests.append(request)
            self._waiting.append(row)
            self._lock.notify_all()
        return answer

    def apply(self, function: Callable[[], Any]) -> Future[Any]:
        future: Future[Any] = Future()
        with self._lock:
            self._work.append((function, future))
            self._lock.notify_all()
        return future

    def start(self) -> None:
        self._thread.start()

    def run(self) -> None:
        """It has a thread of its own."""

    def close(self) -> None:
        with self._lock:
            self._closed = True
            self._lock.notify_all()
        self.stuck.clear()
        self._thread.join(5)
        for row in (*self._waiting, *self._running):
            self._end(row, "cancelled")

    def stats(self) -> Stats:
        return Stats(waiting=len(self._waiting), running=len(self._running), blocks_used=0, blocks_total=0,
                     tokens=self._tokens, steps=self._steps,
                     calls=len(self._work), last_step=self._last)  # fmt: skip

    def step(self) -> bool:
        return False

    def _run(self) -> None:
        while not self._closed:
            with self._lock:
                if not (self._waiting or self._running or self._work):
                    self._lock.wait(0.5)
                work, self._work = self._work, []
                while self._waiting and len(self._running) < self.max_rows:
                    self._running.append(self._waiting.pop(0))
            busy = bool(work or self._running)
            for function, future in work:
                if not future.set_running_or_notify_cancel():
                    continue
                try:
                    future.set_result(function())
                except BaseException as error:
                    future.set_exception(error)
            while self.stuck.is_set():
                time.sleep(0.02)
            if self._running and self.delay:
                time.sleep(self.delay)
            self._running = [row for row in self._running if not self._advance(row)]
            self._waiting = [row for row in self._waiting if not (row.answer.cancelled and self._end(row, "cancelled"))]
            if busy:
                self._steps, self._last = self._steps + 1, time.monotonic()

    def _advance(self, row: _Row) -> bool:
        """Write a row's next token; whether it has ended."""
        request = row.request
        if row.answer.cancelled:
            return self._end(row, "cancelled")
        if request.deadline is not None and time.monotonic() > request.deadline:
            return self._end(row, "deadline")
        if len(row.tokens) == request.max_new_tokens:
            return self._end(row, "length")
        if len(row.tokens) == len(row.ids):
            return self._end(row, "stop")
        token = row.ids[len(row.tokens)]
        whole = row.text + row.stream.push(token)
        ends = [whole.index(stop) for stop in request.stop if stop in whole]
        whole = whole[: min(ends)] if ends else whole
        known = request.logprobs is not None
        top = tuple((token + n, -0.5 - n) for n in range(request.logprobs or 0))
        row.tokens.append(Token(token, row.text[row.told :], -0.5 if known else None, top))
        row.told, row.text = len(row.text), whole
        self._tokens += 1
        row.answer.put(row.tokens[-1])
        return bool(ends) and self._end(row, "stop")

    def _end(self, row: _Row, reason: Any) -> bool:
        done = Completion([token.id for token in row.tokens], reason, text=row.text, tokens=row.tokens,
                          prompt_tokens=len(row.request.prompt))  # fmt: skip
        if not row.answer.done:
            row.answer.end(done)
        return True
