"""A model behind an OpenAI-compatible address, asked by the ``openai`` package for many answers at once.

Weft retries by itself, because only it knows the budget: every attempt is reserved, written down and settled.
"""

from __future__ import annotations

import asyncio
import os
import random
import threading
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol, Self
from urllib.parse import urlsplit

from weft.data.rendering.served import message_fields
from weft.errors import UserError, reason_of
from weft.foreign import read_text
from weft.generators.answers import read_answer, read_refusal, tells_usage
from weft.generators.budget import Cost
from weft.generators.generator import Book, Generator
from weft.generators.outcome import REDRAWN, WAITED_FOR, Failure, Generated
from weft.generators.request import Draw, GeneratorRequest

# Further attempts to reach a server that has not been met yet.
_TO_REACH = 2
_NOT_OPENAI = ("top_k", "min_p", "repetition_penalty")


@dataclass(frozen=True, kw_only=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        concurrency: requests that are on their way at once.
        timeout: seconds for one request, from its first byte to the last of the answer.
        retries: further attempts after one that met no answer: a full or broken server, a line that was cut.
        redraws: further attempts after an answer of no use: cut, empty, refused, against the schema.
        first_wait, longest_wait: seconds before the first further attempt; each later wait is twice as long, up to the
            longest. The real one is drawn between half of it and all of it. What the server asks for (Retry-After)
            counts for all requests, as long as it is not longer than an hour.
    """

    concurrency: int = 16
    timeout: float = 120.0
    retries: int = 6
    redraws: int = 1
    first_wait: float = 1.0
    longest_wait: float = 60.0
    longest_asked: float = 3600.0

    def __post_init__(self) -> None:
        for name, least in (("concurrency", 1), ("retries", 0), ("redraws", 0)):
            if getattr(self, name) < least:
                raise UserError(f"{name} is {getattr(self, name)}; at least {least} is needed.")
        if not self.timeout > 0:
            raise UserError(f"timeout is {self.timeout}; it must be more than 0 seconds.")


@dataclass(frozen=True)
class Address:
    """Where a model is served: ``http://host/v1#MODEL``.

    Attributes:
        key: what lets us in; it is shown nowhere.
    """

    url: str
    model: str
    key: str = field(default="", repr=False)

    @classmethod
    def of(cls, text: str, *, key_env: str | None = None, key_file: Path | None = None) -> Self:
        """The address that a user gives, with the key of an environment variable or a file.

        Raises:
            UserError: It names no server or no model, or the key is not there.
        """
        url, _, model = text.partition("#")
        if urlsplit(url).scheme not in ("http", "https") or not urlsplit(url).hostname:
            raise UserError(
                f"{text}: expected the address of a server with a model, such as http://127.0.0.1:8000/v1#NAME."
            )
        if urlsplit(url).username or urlsplit(url).password:
            raise UserError(
                f"the address of {urlsplit(url).hostname} holds a password. Give a key by a variable or a file."
            )
        if not model:
            raise UserError(f"{text} names no model. Put its name behind the address: {text}#NAME.")
        return cls(url.rstrip("/"), model, _key(key_env, key_file))


def _key(env: str | None, file: Path | None) -> str:
    if env is not None and file is not None:
        raise UserError("the key is either in an environment variable or in a file, not in both.")
    if file is not None:
        key = read_text(file, 1 << 16).strip()
        if not key or len(key.split()) > 1:
            raise UserError(f"{file}: expected a key, and nothing else.")
        return key
    if env is not None:
        if not os.environ.get(env):
            raise UserError(f"the environment variable {env} is not set; it should hold the key of the server.")
        return os.environ[env]
    return ""


class Transport(Protocol):
    """What sends a request: status, headers and body of the response, or a failure on the way."""

    async def post(self, body: Mapping[str, Any], timeout: float) -> tuple[int, Mapping[str, str], bytes] | Failure:
        """Send one request; the whole takes at most ``timeout`` seconds."""

    async def close(self) -> None:
        """End the connections."""


class OpenAITransport:
    """The ``openai`` package's client, without retries of its own."""

    def __init__(self, address: Address, connections: int) -> None:
        """Make the client, inside the event loop that will use it.

        Raises:
            UserError: The package is not installed.
        """
        openai = import_openai()
        self._openai = openai
        # To read certificates takes longer than many an answer. Plain HTTP, which redirects nowhere, needs none.
        secure = urlsplit(address.url).scheme == "https"
        sender = openai.DefaultAsyncHttpxClient(follow_redirects=False, verify=secure)
        self._client = openai.AsyncOpenAI(
            base_url=address.url, api_key=address.key or "none", max_retries=0, http_client=sender
        )

    async def post(self, body: Mapping[str, Any], timeout: float) -> tuple[int, Mapping[str, str], bytes] | Failure:
        openai = self._openai
        try:
            # The package's own limit is one for each read, which a server that drips never meets.
            async with asyncio.timeout(timeout):
                raw = await self._client.chat.completions.with_raw_response.create(**body, timeout=timeout)
                return raw.status_code, raw.headers, raw.content
        except openai.APIStatusError as error:
            return error.response.status_code, error.response.headers, error.response.content
        except (TimeoutError, openai.APITimeoutError):
            return Failure("timeout", f"no whole answer within {timeout:.3g} s", billed=True)
        except openai.APIConnectionError as error:
            return _broken(error)
        except Exception as error:  # of the layer below: a body that ends too early, or bytes that are no HTTP
            return _broken(error)

    async def close(self) -> None:
        await self._client.close()


def _broken(error: Exception) -> Failure:
    """A connection that failed: before the request went out, or after."""
    causes: list[BaseException] = [error]
    while (cause := causes[-1].__cause__ or causes[-1].__context__) is not None and cause not in causes:
        causes.append(cause)
    names = {type(one).__name__ for one in causes}
    told = next((one for one in reversed(causes) if isinstance(one, OSError) and one.errno), None)
    # asyncio puts words of its own into an error of the system, but the number of a name that is not known is below 0.
    number = 0 if told is None else told.errno or 0
    why = os.strerror(number) if number > 0 else str(told.strerror) if told is not None else reason_of(error)
    if names & {"ConnectError", "ConnectTimeout", "UnsupportedProtocol", "ConnectionRefusedError", "gaierror"}:
        return Failure("unreachable", f"the address does not answer ({why.rstrip('.')})")
    return Failure("cut", f"the connection broke ({why.rstrip('.')})", billed=True)


def import_openai() -> Any:
    """The ``openai`` package.

    Raises:
        UserError: It is not installed.
    """
    try:
        import openai
    except ImportError:
        raise UserError('an OpenAI-compatible server is asked by a package: pip install "weft[openai]".') from None
    return openai


class ServedGenerator(Generator):
    """A model behind an OpenAI-compatible address.

    Args:
        address: Where it is.
        patience: How long it is waited for, and how many requests are on their way at once.
        aliases: Other names that the server may call the model by.
        seed: Of the waiting times alone.
        transport: Makes what sends requests; default: the ``openai`` package.
        options: Those of ``Generator``.
    """

    def __init__(
        self,
        address: Address,
        *,
        patience: Patience = Patience(),
        aliases: Sequence[str] = (),
        seed: int = 0,
        transport: Callable[[Address, int], Transport] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(f"{address.url}#{address.model}", **options)
        if transport is None:
            import_openai()
        self.address, self.patience, self._aliases = address, patience, frozenset(aliases)
        self._transport = transport or OpenAITransport
        self._random = random.Random(seed)

    @property
    def said(self) -> str:
        return self.address.url

    def _check(self, request: GeneratorRequest, what: str) -> None:
        for name in _NOT_OPENAI:
            if getattr(request.sampling, name) != getattr(type(request.sampling)(), name):
                raise UserError(f"{what}: {name} is no setting of an OpenAI-compatible server; leave it as it is.")

    def _produce(self, draws: Sequence[Draw], book: Book) -> None:
        call = _Call(self, draws, book)
        try:
            asyncio.get_running_loop()
        except RuntimeError:
            asyncio.run(call.run())
            return
        failed: list[BaseException] = []  # a loop runs in this thread already, as in notebooks

        def run() -> None:
            try:
                asyncio.run(call.run())
            except BaseException as error:
                failed.append(error)

        thread = threading.Thread(target=run, name="weft-generator")
        thread.start()
        thread.join()
        if failed:
            raise failed[0]

    def body(self, draw: Draw, attempt: int) -> dict[str, Any]:
        """The fields of a request, as OpenAI names them."""
        request, sampling = draw.request, draw.sampling(attempt)
        limit = "max_completion_tokens" if urlsplit(self.address.url).hostname == "api.openai.com" else "max_tokens"
        found: dict[str, Any] = {
            "model": self.address.model,
            "messages": message_fields(request.turns),
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "seed": sampling.seed & 0x7FFFFFFF,  # some servers take 32 bits
            limit: request.max_tokens,
        }
        for name in ("presence_penalty", "frequency_penalty"):
            if value := getattr(sampling, name):
                found[name] = value
        if sampling.logit_bias:
            found["logit_bias"] = {str(token): bias for token, bias in sampling.logit_bias.items()}
        if request.stop:
            found["stop"] = list(request.stop)
        if request.schema is not None:
            schema = {"name": "answer", "schema": dict(request.schema), "strict": True}
            found["response_format"] = {"type": "json_schema", "json_schema": schema}
        return found


class _Call:
    """One call of ``generate_all``: workers that take draws until there are none, or the book is stopped."""

    def __init__(self, owner: ServedGenerator, draws: Sequence[Draw], book: Book) -> None:
        self.owner, self.book, self.patience = owner, book, owner.patience
        self._todo = deque(draws)
        self._settled = asyncio.Event()
        self._not_before = 0.0  # by the loop's clock: the server asked all to wait
        self._reached = False  # whether the server has ever been there

    async def run(self) -> None:
        """Answer all."""
        workers = min(self.patience.concurrency, len(self._todo))
        self._sender = self.owner._transport(self.owner.address, workers)
        try:
            async with asyncio.TaskGroup() as group:
                for _ in range(workers):
                    group.create_task(self._work())
        except BaseExceptionGroup as group_of_one:
            raise group_of_one.exceptions[0] from None
        finally:
            await self._sender.close()

    async def _work(self) -> None:
        while self._todo and self.book.stopped is None:
            await self._one(self._todo.popleft())

    async def _one(self, draw: Draw) -> None:
        """Ask for one answer until it comes, or no further attempt is allowed."""
        retries = redraws = 0
        worst = self.owner._worst(draw.request)
        while True:
            await self._wait_until(self._not_before)
            if self.book.stopped is not None or not await self._reserve(worst):
                return
            outcome = await self._attempt(draw, redraws, worst)
            if not isinstance(outcome, Failure):
                self._reached = True
                return
            if self.book.stopped is not None and outcome.kind not in REDRAWN:
                return
            again = outcome.kind in REDRAWN and redraws < self.patience.redraws
            redraws += again
            if outcome.kind in WAITED_FOR and retries < self._retries(outcome):
                again = await self._back_off(outcome, retries)
                retries += 1
            if not again:
                self.book.give_up(draw, outcome)
                return

    def _retries(self, failure: Failure) -> int:
        """How many further attempts there may be. An address at which nobody was ever met is not waited for as long."""
        self._reached = self._reached or failure.kind != "unreachable"
        return self.patience.retries if self._reached else min(self.patience.retries, _TO_REACH)

    async def _reserve(self, worst: Cost) -> bool:
        """Set the worst case aside. What is on its way may leave room when it has come, so it is waited for."""
        account = self.owner.account
        while not account.reserve(worst):
            if not account.in_flight or account.seconds_left() <= 0:
                self.book.stop(self.owner._out_of_budget(worst))
                return False
            self._settled.clear()
            await self._settled.wait()
            if self.book.stopped is not None:
                return False
        return True

    async def _attempt(self, draw: Draw, attempt: int, worst: Cost) -> Generated | Failure:
        """Send a request whose worst case is reserved, and settle it."""
        owner = self.owner
        self.book.send(draw, worst)
        timeout = min(self.patience.timeout, owner.account.seconds_left())
        came = await self._sender.post(owner.body(draw, attempt), timeout)
        outcome = self._read(draw, came, worst)
        if isinstance(outcome, Failure):
            self.book.attempt_failed(draw, outcome, worst, owner.price)
        else:
            self.book.answer(draw, outcome, worst)
        self._settled.set()
        return outcome

    def _read(
        self, draw: Draw, came: tuple[int, Mapping[str, str], bytes] | Failure, worst: Cost
    ) -> Generated | Failure:
        owner = self.owner
        if isinstance(came, Failure):
            return self._without_key(came)
        status, headers, body = came
        if status != 200:
            return self._without_key(read_refusal(status, headers, body))
        outcome = read_answer(draw.request, body, owner.address.model, owner.price, owner._aliases)
        if isinstance(outcome, Generated) and not tells_usage(body):
            return replace(outcome, usage=owner.worst_usage(draw.request), money=worst.money)
        return outcome

    def _without_key(self, failure: Failure) -> Failure:
        """The failure without the key, which some servers repeat; and in our words where they are clearer."""
        key, message = self.owner.address.key, failure.message
        if key:
            message = message.replace(key, "[key]")
        if failure.kind == "key_refused":
            message = f"the key is refused ({message})" if key else f"a key is needed ({message})"
        elif failure.kind == "no_model":
            message = f"there is no model '{self.owner.address.model}', or the address is wrong ({message})"
        return replace(failure, message=message)

    async def _back_off(self, failure: Failure, retries: int) -> bool:
        """Wait before another attempt; False if that would take too long."""
        own = min(self.patience.longest_wait, self.patience.first_wait * 2**retries)
        wait = own * self.owner._random.uniform(0.5, 1.0)
        now, left = asyncio.get_running_loop().time(), self.owner.account.seconds_left()
        asked = failure.after or 0.0
        if asked > self.patience.longest_asked:
            return False
        if max(wait, asked) >= left:
            self.book.stop(Failure("budget", f"the budget is used up: {left:.0f} s are left, and the server must be "
                                             f"waited for ({failure.message})"))  # fmt: skip
            return False
        self._not_before = max(self._not_before, now + asked)
        await self._wait_until(now + max(wait, asked))
        return True

    async def _wait_until(self, moment: float) -> None:
        """Sleep, but look now and then whether all is stopped."""
        loop = asyncio.get_running_loop()
        while self.book.stopped is None and (left := moment - loop.time()) > 0:
            await asyncio.sleep(min(left, 0.5))
