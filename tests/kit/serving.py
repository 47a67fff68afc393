"""A server under test: in a thread of the test's process, on a socket of its own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx
from tests.kit.waiting import until

from weft.generation.target import Target
from weft.serve.admission import Admission
from weft.serve.endpoints import Endpoints
from weft.serve.metrics import Metrics
from weft.serve.registry import Registry
from weft.serve.server import Server, address, listen
from weft.serve.service import Service
from weft.serve.settings import ServeSettings


@dataclass
class Running:
    """A server that runs."""

    url: str
    server: Server
    engine: Any

    @property
    def service(self) -> Service:
        """What answers."""
        assert self.server.health.endpoints is not None
        return self.server.health.endpoints.service

    def client(self, **options: Any) -> httpx.Client:
        """A plain client. Without ``verify`` it reads no certificates, which would take most of a test's time."""
        return httpx.Client(base_url=self.url, timeout=30, verify=False, **options)

    def drained(self, seconds: float = 5.0) -> bool:
        """Whether no answer is left after a while."""
        return until(lambda: not self.service.admission.rows and not self.service.registry._running, seconds)


def service_of(target: Target, engine: Any, settings: ServeSettings, metrics: Metrics) -> Service:
    """A service with this engine, which is started."""
    name = settings.model_name or "tiny"
    registry = Registry(target, engine, name, max_adapters=settings.max_adapters, metrics=metrics)
    engine.start()
    return Service(
        settings,
        target,
        engine,
        registry=registry,
        admission=Admission(settings.max_rows, settings.max_waiting),
        metrics=metrics,
        fingerprint="fp_test",
    )


@contextmanager
def running(make: Callable[[ServeSettings, Metrics], Service], settings: ServeSettings) -> Iterator[Running]:
    """A server whose service ``make`` gives."""
    listening = listen(settings)
    ready = threading.Event()
    server = Server(settings, lambda metrics: Endpoints(make(settings, metrics)), lambda endpoints: ready.set())
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    url = address(settings, listening)
    thread.start()
    try:
        if not until(lambda: ready.is_set() or server.failure is not None, 60):
            raise TimeoutError("the server does not load")
        if server.failure is not None:
            raise server.failure
        assert server.health.endpoints is not None
        yield Running(url, server, server.health.endpoints.service.engine)
    finally:
        server.should_exit = server.force_exit = True
        thread.join(10)
        server.health.forget()
