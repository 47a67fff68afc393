"""How the thread that computes wakes the event loop."""

from __future__ import annotations

import asyncio
from collections import deque


class Bell:
    """Sets events of a loop from another thread. What comes before the loop has woken up costs no second call."""

    def __init__(self, loop: asyncio.AbstractEventLoop) -> None:
        self._loop = loop
        self._events: deque[asyncio.Event] = deque()
        self._rung = False

    def ring(self, event: asyncio.Event) -> None:
        """Set ``event`` in its loop, soon."""
        self._events.append(event)
        if not self._rung and not self._loop.is_closed():
            self._rung = True
            self._loop.call_soon_threadsafe(self._answer)

    def _answer(self) -> None:
        self._rung = False  # first: an event that comes now rings again
        while self._events:
            self._events.popleft().set()
