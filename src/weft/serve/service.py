"""What answers once the base is loaded: the engine, the models, and those who are let in."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncGenerator, Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import KW_ONLY, dataclass, field
from functools import cached_property
from typing import TypeVar

from weft.errors import UserError
from weft.generation.engine import Engine
from weft.generation.request import Answer, Completion, Request, Token
from weft.generation.target import Target
from weft.serve.admission import Admission
from weft.serve.bell import Bell
from weft.serve.envelope import ApiError, bad_request
from weft.serve.logprobs import TokenTexts
from weft.serve.metrics import Metrics
from weft.serve.registry import Registry, Served
from weft.serve.settings import ServeSettings

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class Service:
    """Everything that an answer needs.

    Attributes:
        grammars: the threads in which forms of answers are made ready.
        prompts: the one thread in which prompts are rendered and tokenised, so that the event loop never waits for it.
    """

    settings: ServeSettings
    target: Target
    engine: Engine
    _: KW_ONLY
    registry: Registry
    admission: Admission
    metrics: Metrics
    fingerprint: str
    prompts: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=1, thread_name_prefix="weft-prompts")
    )
    grammars: ThreadPoolExecutor = field(
        default_factory=lambda: ThreadPoolExecutor(max_workers=2, thread_name_prefix="weft-grammars")
    )
    _ending: set[asyncio.Task[None]] = field(default_factory=set)

    @cached_property
    def bell(self) -> Bell:
        """Wakes the event loop in which the service answers."""
        return Bell(asyncio.get_running_loop())

    @property
    def texts(self) -> TokenTexts:
        """The texts of single tokens."""
        return TokenTexts(self.target.base.tokenizer)

    def end_later(self, task: asyncio.Task[None]) -> None:
        """Keep a task that ends answers, until it has."""
        self._ending.add(task)
        task.add_done_callback(self._ending.discard)

    async def in_order(self, function: Callable[[], _Result]) -> _Result:
        """The result of a function that renders or tokenises.

        Raises:
            ApiError: What was sent cannot be rendered.
        """
        try:
            return await asyncio.get_running_loop().run_in_executor(self.prompts, function)
        except UserError as error:
            raise bad_request(str(error)) from None

    def run(self) -> None:
        """Compute on the calling thread, which has loaded the base, until the service ends."""
        self.engine.run()

    def close(self) -> None:
        """End the engine and give the model back."""
        self.engine.close()
        for pool in (self.prompts, self.grammars):
            pool.shutdown(wait=False, cancel_futures=True)
        self.target.close()


# (index of the answer, its next token, or its end)
Item = tuple[int, Token | Completion]


class Writing:
    """The answers to one request. They are let in, written, and, whatever happens, ended and counted."""

    def __init__(self, service: Service, served: Served, count: int) -> None:
        self.service, self.served, self.count = service, served, count
        self.began = time.monotonic()
        self.answers: list[Answer] = []
        self._closed = False
        self._submitted: Future[None] | None = None
        service.admission.enter(count)
        service.registry.enter(served)

    async def submit(self, make: Callable[[], Sequence[Request]]) -> None:
        """Ask the engine for what ``make`` gives. It is called in the thread of prompts.

        Raises:
            ApiError: The prompts cannot be made, or the engine refuses them.
        """

        requests = await self.service.in_order(lambda: list(make()))
        # A grammar may take seconds to be made ready, in which the prompts of others must not wait.
        constrained = any(request.constraint is not None for request in requests)
        pool = self.service.grammars if constrained else self.service.prompts
        self._submitted = pool.submit(self._hand_over, requests)
        try:
            await asyncio.shield(asyncio.wrap_future(self._submitted))
        except UserError as error:
            raise bad_request(str(error)) from None

    def _hand_over(self, requests: Sequence[Request]) -> None:
        for request in requests:
            if self._closed:
                return
            self.answers.append(self.service.engine.submit(request))

    async def items(self) -> AsyncGenerator[Item, None]:
        """The tokens of all answers as they come, and each answer's end.

        Raises:
            ApiError: The engine ended an answer before its time.
        """
        changed = asyncio.Event()
        bell = self.service.bell
        seen, times = [0] * len(self.answers), [self.began] * len(self.answers)
        left = set(range(len(self.answers)))
        with contextlib.ExitStack() as stack:
            for answer in self.answers:
                stack.enter_context(answer.heard_by(lambda: bell.ring(changed)))
            while True:
                changed.clear()
                for index in sorted(left):
                    tokens, done = self.answers[index].since(seen[index])
                    for token in tokens:
                        self._observe(first=not seen[index], since=times[index])
                        times[index] = time.monotonic()
                        seen[index] += 1
                        yield index, token
                    if done:
                        left.discard(index)
                        yield index, self._end_of(self.answers[index])
                if not left:
                    return
                await changed.wait()

    def _observe(self, *, first: bool, since: float) -> None:
        metrics = self.service.metrics
        (metrics.first if first else metrics.between).observe(self.served.name, time.monotonic() - since)

    def _end_of(self, answer: Answer) -> Completion:
        try:
            done = answer.result()
        except UserError as error:  # logits that are not finite, a form that allows no token
            raise bad_request(str(error), code="generation_failed") from None
        self._count(done)
        _check_end(done)
        return done

    def _count(self, done: Completion) -> None:
        model, metrics = self.served.name, self.service.metrics
        metrics.whole.observe(model, time.monotonic() - self.began)
        metrics.answers.add(model, done.finish_reason)
        metrics.read.add(model, by=done.prompt_tokens)
        metrics.cached.add(model, by=done.cached_tokens)
        metrics.written.add(model, by=len(done.ids))

    async def completions(self) -> list[Completion]:
        """All answers, when they have ended. Raises as ``items``."""
        found: dict[int, Completion] = {}
        async for index, item in self.items():
            if isinstance(item, Completion):
                found[index] = item
        return [found[index] for index in range(len(self.answers))]

    def close(self) -> None:
        """End what is still being written. May be called again."""
        if not self._closed:
            self._closed = True
            self.service.end_later(asyncio.ensure_future(self._leave()))

    async def _leave(self) -> None:
        """Wait until the engine has let go of the answers: until then they take room, and their adapter stays."""
        if self._submitted is not None:
            await asyncio.gather(asyncio.wrap_future(self._submitted), return_exceptions=True)
        for answer in self.answers:
            if not answer.done:
                answer.cancel()
        ends = [answer.aresult() for answer in self.answers]
        await asyncio.gather(*ends, return_exceptions=True)
        self.service.admission.leave(self.count, time.monotonic() - self.began)
        await self.service.registry.leave(self.served)


def _check_end(done: Completion) -> None:
    if done.finish_reason == "deadline":
        raise ApiError(503, "The answer took longer than the server allows.", code="deadline_exceeded")
    if done.finish_reason == "cancelled":
        raise ApiError(503, "The server ended before the answer did.", code="cancelled", retry_after=2)
