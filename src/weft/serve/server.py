"""The process: it listens before the base is loaded, and ends when the last answer has."""

from __future__ import annotations

import asyncio
import errno
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import TYPE_CHECKING, NoReturn

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from weft.errors import UserError
from weft.machine import share_one_heap
from weft.serve.app import make_app
from weft.serve.envelope import bad_request, json_bytes
from weft.serve.health import Health
from weft.serve.metrics import Metrics
from weft.serve.settings import ServeSettings

if TYPE_CHECKING:
    from weft.serve.endpoints import Endpoints

_LAST_BYTES = 5  # seconds for what is written but not yet sent
_BACKLOG = 512

Load = Callable[[Metrics], "Endpoints"]


def listen(settings: ServeSettings) -> socket.socket:
    """The socket on which the server listens.

    Raises:
        UserError: The port is in use, or the host is none of this machine's.
    """
    place = f"{settings.host}:{settings.port}"
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    # asyncio switches Nagle's algorithm off only where the protocol is named; with it, answers come 40 ms late.
    found = socket.socket(family, socket.SOCK_STREAM, socket.IPPROTO_TCP)
    try:
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind((settings.host, settings.port))
        found.listen(_BACKLOG)
    except (OSError, OverflowError) as error:
        found.close()
        if getattr(error, "errno", None) == errno.EADDRINUSE:
            raise UserError(f"port {settings.port} of {settings.host} is in use. Take another with --port.") from None
        raise UserError(f"cannot listen on {place}: {getattr(error, 'strerror', None) or error}.") from None
    found.setblocking(False)
    return found


def address(settings: ServeSettings, listening: socket.socket) -> str:
    """The URL of a server."""
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"http://{host}:{listening.getsockname()[1]}"


def run(settings: ServeSettings, listening: socket.socket, load: Load, on_ready: Callable[[Endpoints], None]) -> bool:
    """Serve until a signal comes and the running answers have ended; False if some had to be cut.

    Raises:
        UserError: What ``load`` or ``on_ready`` raises.
    """
    share_one_heap()
    server = Server(settings, load, on_ready)
    server.run([listening])
    endpoints = server.health.endpoints
    if endpoints is not None:
        server.health.forget()
        endpoints.service.close()
    elif server.failure is None:
        _leave_at_once()
    if server.failure is not None:
        raise server.failure
    return not server.cut


def _leave_at_once() -> NoReturn:
    """End while a thread loads a base: nothing waits for it, and it cannot be stopped."""
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


class ServerConfig(uvicorn.Config):
    """What uvicorn is told, and how long a client may take to send the head of a request, and to read."""

    def __init__(self, app: ASGIApp, settings: ServeSettings) -> None:
        super().__init__(
            app,
            http=Connection,
            ws="none",
            lifespan="off",
            loop="asyncio",
            log_config=None,
            access_log=False,
            server_header=False,
            backlog=_BACKLOG,
            timeout_keep_alive=round(settings.idle_timeout),
            timeout_graceful_shutdown=_LAST_BYTES,
        )
        self.header_timeout, self.write_timeout = settings.header_timeout, settings.write_timeout


class Server(uvicorn.Server):
    """A server that listens before it has loaded, and lets running answers end.

    Attributes:
        failure: what stopped it.
        cut: whether answers were still being written when the grace was over.
    """

    def __init__(self, settings: ServeSettings, load: Load, on_ready: Callable[[Endpoints], None]) -> None:
        self.metrics, self.health = Metrics(), Health(settings.stalled_after)
        super().__init__(ServerConfig(make_app(settings, self.health, self.metrics), settings))
        self.grace = settings.grace
        self.failure: BaseException | None = None
        self.cut = False
        self._drained_by = 0.0
        self._load, self._on_ready = load, on_ready

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then load."""
        await super().startup(sockets)
        threading.Thread(target=self._loading, name="weft-load", daemon=True).start()

    def _loading(self) -> None:
        try:
            endpoints = self._load(self.metrics)
            self.health.loaded(endpoints)
            self._on_ready(endpoints)
            endpoints.service.run()
        except BaseException as error:
            self.failure = error
            self.should_exit = True

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """A signal: the first lets answers end, the second does not."""
        if self.health.draining:
            self.cut = not self.health.idle
            self.should_exit = self.force_exit = True
        else:
            self._drained_by = time.monotonic() + self.grace
            self.health.drain()

    async def on_tick(self, counter: int) -> bool:
        """Called ten times a second; whether to stop."""
        if self.health.draining and not self.should_exit:
            late = time.monotonic() > self._drained_by
            self.cut = late and not self.health.idle
            self.should_exit = late or self.health.idle
        return await super().on_tick(counter)


class Connection(H11Protocol):
    """A connection that ends if a client sends no whole head, or reads nothing, for too long. Its errors are JSON."""

    _waiting: asyncio.TimerHandle | None = None
    _unread: asyncio.TimerHandle | None = None
    config: ServerConfig

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        """Wait for the first head."""
        super().connection_made(transport)  # type: ignore[arg-type]
        self._wait()

    def data_received(self, data: bytes) -> None:
        """Take what came."""
        if self._waiting is None and self.conn.their_state is h11.IDLE:
            self._wait()
        super().data_received(data)
        if self.conn.their_state is not h11.IDLE:
            self._stop_waiting()

    def connection_lost(self, exc: Exception | None) -> None:
        """Forget the timers."""
        self._stop_waiting()
        self._stop_unread()
        super().connection_lost(exc)

    def pause_writing(self) -> None:
        """Much is written and not read. Closing would wait for the client, so that the connection is cut."""
        super().pause_writing()
        self._unread = self.loop.call_later(self.config.write_timeout, self.transport.abort)

    def resume_writing(self) -> None:
        """The client has read."""
        self._stop_unread()
        super().resume_writing()

    def send_400_response(self, msg: str) -> None:
        """Answer what is no HTTP."""
        body = json_bytes(bad_request(msg, code="invalid_http").body())
        headers = [("content-type", "application/json"), ("content-length", str(len(body))), ("connection", "close")]
        response = h11.Response(status_code=400, headers=headers, reason=b"Bad Request")
        for event in (response, h11.Data(data=body), h11.EndOfMessage()):
            self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _wait(self) -> None:
        self._waiting = self.loop.call_later(self.config.header_timeout, self._close)

    def _stop_waiting(self) -> None:
        if self._waiting is not None:
            self._waiting.cancel()
            self._waiting = None

    def _stop_unread(self) -> None:
        if self._unread is not None:
            self._unread.cancel()
            self._unread = None

    def _close(self) -> None:
        self._waiting = None
        self.transport.close()
