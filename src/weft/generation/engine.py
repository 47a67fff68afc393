"""The engine: rows of any adapter of any method, or of none, are written together, and join and leave at every step.

``generate`` answers a list of requests. ``Engine`` takes requests one by one, from any thread, and gives each token as
it comes: for a server, for a chat, for training that generates.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections import deque
from collections.abc import Callable, Collection, Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import TYPE_CHECKING, Self, TypeVar

import torch
from torch import Tensor

from weft.base.embeddings import input_embeddings
from weft.core.adapters import Adapters
from weft.errors import UserError
from weft.generation.checks import check_request
from weft.generation.constraint import Grammars, Matcher
from weft.generation.limits import Limits, cache_blocks, limits_for
from weft.generation.request import Answer, Completion, FinishReason, Request, Token
from weft.generation.row import Row
from weft.generation.sampling import choose
from weft.generation.way import Way, counts_of
from weft.generation.ways import Ways
from weft.generation.writer import Writer
from weft.layouts.building import check_ids
from weft.machine import freed_memory_kept

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

T = TypeVar("T")
# (index of the request, token id), called as the tokens come.
TokenCallback = Callable[[int, int], None]


@dataclass(frozen=True, kw_only=True)
class Stats:
    """What an engine is doing.

    Attributes:
        waiting, running: rows that have not begun, and rows that have.
        blocks_used, blocks_total: of the cache of keys and values.
        tokens: how many were written since it began. ``steps``: how many passes.
        calls: functions given to ``apply`` that wait or run.
        last_step: when the last pass or call ended, by ``time.monotonic()``.
    """

    waiting: int
    running: int
    blocks_used: int
    blocks_total: int
    tokens: int
    steps: int
    calls: int
    last_step: float


class Engine:
    """Writes the answers to requests; one pass of the base takes every row one step further.

    Without ``start`` it computes while somebody waits for an answer; after it a thread of its own does.

    Args:
        adapters: The base with its adapters.
        tokenizer: For texts and stop strings; without one answers are token ids.
        stop_ids: The tokens that end an answer.
        limits: What it may use.
    """

    def __init__(
        self,
        adapters: Adapters,
        *,
        tokenizer: PreTrainedTokenizerBase | None = None,
        stop_ids: Collection[int] = (),
        limits: Limits = Limits(),
    ) -> None:
        self.adapters, self.tokenizer, self.limits = adapters, tokenizer, limits
        self.stop_ids = frozenset(stop_ids)
        prefill = limits.prefill_tokens or (256 if adapters.device.type == "cpu" else 2048)
        self.blocks = cache_blocks(adapters, limits)
        self._ways = Ways(adapters, blocks=self.blocks, block_tokens=limits.block_tokens, prefill_tokens=prefill)
        self._waiting: deque[Row] = deque()
        self._writers: dict[Row, Writer] = {}
        self._where: dict[Row, Way] = {}  # rows that have begun
        self._calls: deque[tuple[Callable[[], object], Future[object]]] = deque()
        # One thread computes at a time; submitting needs no more than the queue.
        self._computing, self._arrived = threading.Lock(), threading.Condition()
        self._thread: threading.Thread | None = None
        self._grammars: Grammars | None = None
        self._compiling = threading.Lock()
        self._closed = False
        self._tokens = self._steps = 0
        self._last_step = time.monotonic()

    # What users call.

    def submit(self, request: Request) -> Answer:
        """Take a request; any thread may call this.

        Raises:
            UserError: It cannot be answered: a prompt is empty or too long, an adapter writes no text.
        """
        self._check(request, "the request")
        return self._begin(request, Answer(request, self))

    def _begin(self, request: Request, answer: Answer) -> Answer:
        writer = Writer(request, answer, self.tokenizer, self.stop_ids, self._matcher(request))
        row = Row(request, self.adapters)
        self._check_room(row)
        with self._arrived:
            if self._closed:
                raise UserError("the engine is closed; it takes no more requests.")
            self._writers[row] = writer
            self._waiting.append(row)
            self._arrived.notify_all()
        return answer

    def generate(self, requests: Sequence[Request], on_token: TokenCallback | None = None) -> list[Completion]:
        """Answer all; the completions are in the requests' order.

        Raises:
            UserError: One of them cannot be answered; none is then.
        """
        for index, request in enumerate(requests):
            self._check(request, f"requests[{index}]")
        answers: list[Answer] = []
        try:
            for index, request in enumerate(requests):
                answers.append(self._begin(request, Answer(request, self, _heard_as(index, on_token))))
            with freed_memory_kept(self.adapters.device.type):
                return [answer.result() for answer in answers]
        except BaseException:
            for answer in answers:
                answer.cancel()
            raise

    def apply(self, function: Callable[[], T]) -> Future[T]:
        """Run ``function`` between two steps, when no pass is on its way: to load and remove adapters."""
        future: Future[T] = Future()
        with self._arrived:
            self._calls.append((function, future))  # type: ignore[arg-type]
            self._arrived.notify_all()
        if not self.threaded:
            self.step()
        return future

    def stats(self) -> Stats:
        """What the engine is doing now."""
        paged = self._ways.paged
        return Stats(
            waiting=len(self._waiting),
            running=len(self._where),
            blocks_used=0 if paged is None else paged.blocks.used,
            blocks_total=0 if paged is None else paged.blocks.count,
            tokens=self._tokens,
            steps=self._steps,
            calls=len(self._calls),
            last_step=self._last_step,
        )

    @property
    def threaded(self) -> bool:
        """Whether a thread of its own computes."""
        return self._thread is not None

    def start(self) -> None:
        """Let a thread of its own compute as long as there is work."""
        if self._thread is None:
            self._thread = threading.Thread(target=self._serve, name="weft-engine", daemon=True)
            self._thread.start()

    def claim(self) -> None:
        """Promise that the calling thread will compute: it calls ``run`` next.

        A thread that has loaded the base computes faster than a new one: OpenMP keeps workers for each thread that has
        computed, and lets them sleep between products once they outnumber the cores.
        """
        self._thread = threading.current_thread()

    def run(self) -> None:
        """Compute on the calling thread, which has claimed the engine, until it is closed."""
        self._serve()

    def close(self) -> None:
        """End what is on its way, as cancelled, and the thread. The adapters stay open."""
        with self._arrived:
            self._closed = True
            self._arrived.notify_all()
        thread = self._thread
        if thread is not None and thread is not threading.current_thread():
            thread.join()
        self._thread = None
        with self._computing:
            for row, _ in self._all():
                self._finish(row, "cancelled")
            self._ways.forget()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    @torch.no_grad()
    def step(self) -> bool:
        """One pass of the base, in which every row that has begun goes on; False if there was nothing to do."""
        with self._computing:
            called = self._call()
            self._end_early()
            self._admit()
            if not self._where:
                return called
            for way in self._ways.all:
                for rows, hidden in way.step():
                    self._take(rows, self.adapters.logits(hidden, counts_of(rows)))
                for row in way.pushed_out():
                    del self._where[row]
                    self._waiting.appendleft(row)
            self._steps += 1
            self._last_step = time.monotonic()
            return True

    # What a step does.

    def _serve(self) -> None:
        with freed_memory_kept(self.adapters.device.type):
            self._compute()

    def _compute(self) -> None:
        while True:
            with self._arrived:
                while not (self._closed or self._waiting or self._where or self._calls):
                    self._arrived.wait()
                if self._closed:
                    return
            try:
                self.step()
            except BaseException as error:  # every waiting thread has to hear of it
                self._fail(error)

    def _fail(self, error: BaseException) -> None:
        with self._computing:
            for row, _ in self._all():
                self._finish(row, "cancelled", error)

    def _call(self) -> bool:
        called = False
        while self._calls:
            function, future = self._calls[0]
            called = True
            try:
                if future.set_running_or_notify_cancel():
                    future.set_result(function())
            except BaseException as error:
                future.set_exception(error)
            self._calls.popleft()
            self._last_step = time.monotonic()
        return called

    def _end_early(self) -> None:
        now, adapters = time.monotonic(), {name: self.adapters[name] for name in self.adapters.names}
        for row, writer in self._all():
            deadline = row.request.deadline
            if writer.answer.cancelled:
                self._finish(row, "cancelled")
            elif deadline is not None and now >= deadline:
                self._finish(row, "deadline")
            elif row.owner is not None and adapters.get(row.adapter or "") is not row.owner:
                gone = f"adapter '{row.adapter}' was taken away, or another took its name, before the answer was whole."
                self._finish(row, "cancelled", UserError(gone))

    def _all(self) -> list[tuple[Row, Writer]]:
        """All rows, while other threads may bring more."""
        with self._arrived:
            return list(self._writers.items())

    def _admit(self) -> None:
        while self._waiting and len(self._where) < self.limits.max_rows:
            row = self._waiting[0]
            way = self._ways.of(row.request)
            if not way.add(row):
                return
            self._waiting.popleft()
            self._where[row] = way

    def _take(self, rows: Sequence[Row], logits: Tensor) -> None:
        """Choose the next token of rows, whose logits are [n, V]; those that end leave."""
        writing = [row for row in rows if row in self._writers]
        if len(writing) < len(rows):  # a cohort keeps those that have ended until its next step
            logits = logits[[i for i, row in enumerate(rows) if row in self._writers]]
        if not writing:
            return
        choice = choose(logits, [self._writers[row].drawing for row in writing])
        told = zip(choice.tokens, choice.logprobs, choice.top, strict=True)
        for index, (row, (token, logprob, top)) in enumerate(zip(writing, told, strict=True)):
            if index in choice.failures:
                self._finish(row, "cancelled", UserError(choice.failures[index]))
                continue
            row.take(token)
            self._tokens += 1
            reason = self._writers[row].take(Token(token, "", logprob, top))
            if reason is not None:
                self._finish(row, reason)

    def _finish(self, row: Row, reason: FinishReason, error: BaseException | None = None) -> None:
        writer, way = self._writers.pop(row), self._where.pop(row, None)
        if way is not None:
            way.drop(row)
        else:
            with self._arrived, contextlib.suppress(ValueError):
                self._waiting.remove(row)
        writer.end(reason, cached=row.cached or 0, error=error)

    # What a request is checked for.

    def _check(self, request: Request, what: str) -> None:
        vocabulary = len(input_embeddings(self.adapters.model).weight)
        check_ids(request.prompt, vocabulary, f"{what}: its prompt")
        request.sampling.check_vocabulary(vocabulary)
        check_request(request, self.adapters)

    def _matcher(self, request: Request) -> Matcher | None:
        if request.constraint is None:
            return None
        if self.tokenizer is None:
            raise UserError("a constraint needs the tokenizer; give it to the engine.")
        with self._compiling:
            if self._grammars is None:
                vocabulary = len(input_embeddings(self.adapters.model).weight)
                self._grammars = Grammars(self.tokenizer, vocabulary, self.stop_ids)
        return self._grammars.matcher(request.constraint)

    def _check_room(self, row: Row) -> None:
        longest = len(row.symbols) + row.request.max_new_tokens
        room = self.blocks * self.limits.block_tokens
        if self._ways.paged is not None and longest > room:
            raise UserError(
                f"the request needs room for {longest} tokens (prompt and answer); the cache has {room}. Give it more "
                "bytes, or ask for a shorter answer."
            )


def generate(
    adapters: Adapters,
    requests: Sequence[Request],
    *,
    stop_ids: Collection[int],
    batch_size: int = 64,
    on_token: TokenCallback | None = None,
) -> list[Completion]:
    """Answer every request; the completions are in the requests' order.

    Args:
        stop_ids: The tokens that end an answer.
        batch_size: Rows that are written at once.
        on_token: Hears every token as it comes.

    Raises:
        UserError: A prompt is empty, or prompt and answer together exceed the model's length limit.
    """
    if not requests:
        return []
    limits = limits_for(adapters, requests, batch_size)
    with Engine(adapters, stop_ids=stop_ids, limits=limits) as engine:
        return engine.generate(requests, on_token)


def _heard_as(index: int, on_token: TokenCallback | None) -> Callable[[Token], None] | None:
    return None if on_token is None else lambda token: on_token(index, token.id)
