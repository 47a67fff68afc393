"""What every request passes before any route: its id, the Host and Origin checks, the key, the limits of its body.

A web page that somebody visits can send requests to servers of their own machine. Its requests carry its ``Origin``,
or, if its name was made to lead here, a foreign ``Host``; both are refused.
"""

from __future__ import annotations

import ipaddress
import logging
import re
import socket
import time
from urllib.parse import urlsplit
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import ClientDisconnect
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from weft.serve.access_log import log_request
from weft.serve.envelope import CLIENT_GONE, ApiError, internal_error
from weft.serve.incoming import Body, too_long
from weft.serve.metrics import Metrics
from weft.serve.settings import Keys, ServeSettings, is_loopback

_LOG = logging.getLogger("weft.serve")
_ID = re.compile(r"[A-Za-z0-9_.\-]{1,128}")
_OPEN = ("/health", "/ready")  # they say nothing but one word, and those who watch a server have no key
_ONE_MODEL = "/v1/models/"
_CORS = "access-control-"
_TURNED_AWAY = {401, 403, 408, 413, 415, 429, 503}


class Guard:
    """The outermost layer: it lets a request in, or answers it."""

    def __init__(self, app: ASGIApp, settings: ServeSettings, metrics: Metrics, routes: frozenset[str]) -> None:
        self.app, self.settings, self.metrics, self.routes = app, settings, metrics, routes
        self.keys = Keys(settings.keys)
        self._hosts = {"localhost", *(name.lower() for name in settings.allowed_hosts)}
        if not is_loopback(settings.host):
            self._hosts |= {socket.gethostname().lower(), settings.host.lower()}
        self._origins = {origin.rstrip("/").lower() for origin in settings.allowed_origins}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Answer one request."""
        if scope["type"] != "http":
            return
        headers = Headers(scope=scope)
        given = headers.get("x-request-id", "")
        name = given if _ID.fullmatch(given) else uuid4().hex
        scope["state"] = {**scope.get("state", {}), "request_id": name}
        began, status, more = time.monotonic(), 0, self._cors(headers)

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                found = MutableHeaders(scope=message)
                found["x-request-id"] = name
                found["x-content-type-options"] = "nosniff"
                for key, value in more.items():
                    found[key] = value
            await send(message)

        body = Body(receive, self.settings.body_bytes, self.settings.body_timeout)
        try:
            await self._let_in(scope, headers, body.receive, answer)
        except (ApiError, HTTPException) as error:
            told = error if isinstance(error, ApiError) else _as_api_error(error, scope)
            self._count(told)
            if not status:
                # A connection that is closed while the client still sends loses the answer.
                if "expect" in headers or not await body.discard():
                    told.headers["connection"] = "close"
                await told.response()(scope, receive, answer)
        except ClientDisconnect:
            status = CLIENT_GONE
        except Exception:
            _LOG.exception("request %s failed", name)
            if status:
                raise  # the answer has begun; cutting the connection is all that is left to say
            await internal_error().response()(scope, receive, answer)
        finally:
            self.metrics.requests.add(self._route(scope["path"]), str(status))
            log_request(scope, name, status=status, seconds=time.monotonic() - began)

    def _route(self, path: str) -> str:
        """The route of a path, as figures name it: clients make up paths without end."""
        if path.startswith(_ONE_MODEL):
            return f"{_ONE_MODEL}{{model}}"
        return path if path in self.routes else "other"

    def _count(self, error: ApiError) -> None:
        if error.status in _TURNED_AWAY:
            self.metrics.rejected.add(error.code or str(error.status))

    async def _let_in(self, scope: Scope, headers: Headers, receive: Receive, send: Send) -> None:
        self._check_host(headers)
        self._check_origin(headers)
        if scope["method"] == "OPTIONS" and "access-control-request-method" in headers and "origin" in headers:
            await Response(status_code=204)(scope, receive, send)  # a browser asks before it sends the key
            return
        if self.keys and scope["path"] not in _OPEN:
            self._check_key(headers)
        if scope["method"] in ("POST", "PUT", "PATCH"):
            self._check_body(headers)
        scope["app"] = self  # so that routes raise what they refuse
        await self.app(scope, receive, send)

    def _check_host(self, headers: Headers) -> None:
        given = headers.get("host", "")
        host = _hostname(given)
        if host in self._hosts:
            return
        try:
            address = ipaddress.ip_address(host)
        except ValueError:
            pass
        else:
            # An address is no name that could lead elsewhere tomorrow.
            if address.is_loopback or not is_loopback(self.settings.host):
                return
        raise ApiError(
            403, f"This server does not answer to the host '{given[:200]}'; --allowed-host names others.", code="host"
        )

    def _check_origin(self, headers: Headers) -> None:
        origin = headers.get("origin")
        if origin is None or self._is_allowed(origin) or origin.lower() == f"http://{headers.get('host', '')}".lower():
            return
        raise ApiError(
            403,
            f"Pages of '{origin[:200]}' may not ask this server; --allowed-origin names those that may.",
            code="origin",
        )

    def _is_allowed(self, origin: str) -> bool:
        return origin.rstrip("/").lower() in self._origins

    def _cors(self, headers: Headers) -> dict[str, str]:
        """The headers that let an allowed page read the answer."""
        origin = headers.get("origin")
        if origin is None or not self._is_allowed(origin):
            return {}
        found = {"origin": origin, "methods": "GET, POST", "headers": "authorization, content-type, x-request-id",
                 "expose-headers": "x-request-id, retry-after", "max-age": "600"}  # fmt: skip
        allowed = {_CORS + (key if "-" in key else f"allow-{key}"): value for key, value in found.items()}
        return {**allowed, "vary": "origin"}

    def _check_key(self, headers: Headers) -> None:
        scheme, _, key = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not key.strip() or key.strip() not in self.keys:
            what = "No API key was sent" if not key else "The API key is wrong"
            raise ApiError(
                401, f"{what}. Send the header 'Authorization: Bearer KEY'.", code="invalid_api_key",
                headers={"www-authenticate": "Bearer"},
            )  # fmt: skip

    def _check_body(self, headers: Headers) -> None:
        kind = headers.get("content-type", "").partition(";")[0].strip().lower()
        if kind != "application/json":
            raise ApiError(415, f"The body must be application/json, not '{kind[:100]}'.", code="content_type")
        if headers.get("content-encoding", "identity").lower() != "identity":
            raise ApiError(415, "The body must not be compressed.", code="content_encoding")
        length = headers.get("content-length", "")
        if length.isdigit() and int(length[:20]) > self.settings.body_bytes:
            raise too_long(self.settings.body_bytes)


def _as_api_error(error: HTTPException, scope: Scope) -> ApiError:
    """The error of a method that a route does not have."""
    if error.status_code == 405:
        message = f"{scope['method'][:20]} is no method of {scope['path'][:200]}."
        return ApiError(405, message, code="method_not_allowed", headers=error.headers)
    return ApiError(error.status_code, error.detail, headers=error.headers)


def _hostname(host: str) -> str:
    """The name in a Host header, without the port."""
    try:
        return (urlsplit(f"//{host}").hostname or "").rstrip(".")
    except ValueError:
        return ""
