"""Answers in pieces: server-sent events, as browsers and OpenAI's clients read them."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncGenerator, Callable
from contextlib import aclosing
from typing import Any

from starlette.requests import Request
from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from weft.serve.envelope import CLIENT_GONE, ApiError, internal_error, json_bytes

_LOG = logging.getLogger("weft.serve")

DONE = b"data: [DONE]\n\n"
_PING = b": still here\n\n"
_PING_AFTER = 15.0  # seconds without an event; what stands between may close a silent connection

Events = AsyncGenerator[bytes, None]


def event(value: object, name: str | None = None) -> bytes:
    """One event. JSON on one line has no line break, so no text can end it."""
    head = b"" if name is None else f"event: {name}\n".encode()
    return head + b"data: " + json_bytes(value) + b"\n\n"


class EventStream(Response):
    """Sends events while they come. It ends, and so does their source, when the client goes."""

    media_type = "text/event-stream"

    def __init__(self, events: Events, close: Callable[[], None]) -> None:
        """``close`` is called at the end, however it comes."""
        super().__init__(None, 200, {"cache-control": "no-cache", "x-accel-buffering": "no"})
        del self.headers["content-length"]
        self.events, self.close = events, close

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send all events."""
        writing = asyncio.ensure_future(self._write(send))
        gone = asyncio.ensure_future(disconnected(receive))
        try:
            await asyncio.wait({writing, gone}, return_when=asyncio.FIRST_COMPLETED)
            if writing.done():
                writing.result()
        finally:
            self.close()
            for task in (writing, gone):
                task.cancel()
            await asyncio.gather(writing, gone, return_exceptions=True)

    async def _write(self, send: Send) -> None:
        put = False

        async def write(body: bytes, more: bool = True) -> None:
            nonlocal put
            put = True
            await send({"type": "http.response.body", "body": body, "more_body": more})

        async def ping() -> None:
            nonlocal put
            while True:
                put = False
                await asyncio.sleep(_PING_AFTER)
                if not put:
                    await write(_PING)

        await send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
        pinging = asyncio.ensure_future(ping())
        try:
            async with aclosing(_told(self.events)) as events:
                async for body in events:
                    await write(body)
        finally:
            pinging.cancel()
            await asyncio.gather(pinging, return_exceptions=True)
        await write(b"", more=False)


async def _told(events: Events) -> Events:
    """The events. The status is long sent, so an error becomes an event."""
    async with aclosing(events):
        try:
            async for body in events:
                yield body
        except ApiError as error:
            yield event(error.body()) + DONE
        except Exception:
            _LOG.exception("an answer failed while it was sent")
            yield event(internal_error().body()) + DONE


async def disconnected(receive: Receive) -> None:
    """Wait until the client goes. The body must have been read."""
    while (await receive())["type"] != "http.disconnect":
        pass


async def until_gone(request: Request, work: asyncio.Future[Response]) -> Response:
    """The result of ``work``, which is cancelled if the client goes before it is there."""
    gone = asyncio.ensure_future(disconnected(request.receive))
    try:
        pair: set[asyncio.Future[Any]] = {work, gone}
        await asyncio.wait(pair, return_when=asyncio.FIRST_COMPLETED)
        if work.done():
            return work.result()
        return Response(status_code=CLIENT_GONE)
    finally:
        for task in (work, gone):
            task.cancel()
        await asyncio.gather(work, gone, return_exceptions=True)
