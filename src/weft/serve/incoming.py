"""The body of a request while it comes: it must be neither too long nor too slow."""

from __future__ import annotations

import asyncio
import time

from starlette.types import Message, Receive

from weft.serve.envelope import ApiError

_MOMENT = 1.0  # seconds for the rest of a body that is refused


class Body:
    """Counts what comes.

    Attributes:
        whole: whether all of it is there.
    """

    def __init__(self, receive: Receive, limit: int, timeout: float) -> None:
        self._receive, self.limit = receive, limit
        self._until = time.monotonic() + timeout
        self._read = 0
        self.whole = False

    async def receive(self) -> Message:
        """The next piece; when all is there, the end of the connection.

        Raises:
            ApiError: The body is too long, or too slow.
        """
        if self.whole:
            return await self._receive()
        try:
            message = await asyncio.wait_for(self._next(), max(self._until - time.monotonic(), 0.01))
        except TimeoutError:
            raise ApiError(408, "The body did not come in time.", code="body_timeout") from None
        if self._read > self.limit:
            raise too_long(self.limit)
        return message

    async def _next(self) -> Message:
        message = await self._receive()
        if message["type"] == "http.request":
            self._read += len(message.get("body", b""))
            self.whole = not message.get("more_body", False)
        else:
            self.whole = True
        return message

    async def discard(self) -> bool:
        """Read a little of what is left and forget it; whether that was all."""
        try:
            async with asyncio.timeout(_MOMENT):
                while not self.whole and self._read < 2 * self.limit:
                    await self._next()
        except TimeoutError:
            pass
        return self.whole


def too_long(limit: int) -> ApiError:
    """The error for a body that is longer than ``limit`` bytes."""
    return ApiError(413, f"The body is longer than {limit:,} bytes.", code="body_too_long")
