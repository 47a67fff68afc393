"""Whether the server lives, and whether it is of use: what ``/health`` and ``/ready`` say."""

from __future__ import annotations

import threading
import time
from typing import TYPE_CHECKING, Literal

if TYPE_CHECKING:
    from weft.generation.engine import Stats
    from weft.serve.endpoints import Endpoints

_EVERY = 0.5  # seconds between two looks at the engine

Phase = Literal["loading", "ok", "stalled", "draining"]


class Health:
    """The state of a server, from its first request to its last.

    Attributes:
        stats: what the engine last said of itself.

    The engine is looked at in a thread of its own: one that is stuck may hold what a look waits for, and ``/health``
    must say so nevertheless.
    """

    def __init__(self, stalled_after: float) -> None:
        self.stalled_after = stalled_after
        self.endpoints: Endpoints | None = None
        self.draining = False
        self.stats: Stats | None = None
        self._seen = time.monotonic()

    def loaded(self, endpoints: Endpoints) -> None:
        """The base is there; from now on requests are answered."""
        self._seen = time.monotonic()
        self.endpoints = endpoints
        threading.Thread(target=self._watch, args=(endpoints,), name="weft-health", daemon=True).start()

    def drain(self) -> None:
        """Let no new request in."""
        self.draining = True

    @property
    def phase(self) -> Phase:
        """What the server does now."""
        if self.draining:
            return "draining"
        if self.endpoints is None:
            return "loading"
        return "stalled" if self.stalled else "ok"

    @property
    def stalled(self) -> bool:
        """Whether the engine has work and has not taken a step for long."""
        if self.endpoints is None or self.idle:
            return False
        since = max(self._seen, self.endpoints.service.admission.busy_since)
        return time.monotonic() - since > self.stalled_after

    @property
    def idle(self) -> bool:
        """Whether no answer is being written."""
        return self.endpoints is None or not self.endpoints.service.admission.rows

    def _watch(self, endpoints: Endpoints) -> None:
        while self.endpoints is endpoints:
            self.stats = stats = endpoints.service.engine.stats()
            # Answers are open also while a form is made ready for them, and while a client reads slowly.
            has_work = stats.waiting or stats.running or stats.calls
            self._seen = max(self._seen, stats.last_step) if has_work else time.monotonic()
            time.sleep(_EVERY)

    def forget(self) -> None:
        """The engine has ended."""
        self.endpoints = None
