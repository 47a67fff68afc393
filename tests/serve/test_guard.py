"""Who is let in: keys, hosts, origins, methods, sizes, times; over all routes."""

from __future__ import annotations

import logging
import socket
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager

import httpx
import pytest
from tests.kit.serving import Running
from tests.kit.waiting import until

from weft.errors import UserError
from weft.serve.app import Routes
from weft.serve.health import Health
from weft.serve.metrics import Metrics
from weft.serve.settings import Keys, ServeSettings, read_keys

Serve = Callable[..., AbstractContextManager[Running]]
KEY = "a-key-of-the-tests"
PATHS = [
    (method, route.path.replace("{model:path}", "lora"))
    for route in Routes(ServeSettings(), Health(1), Metrics()).table()
    for method in sorted((route.methods or set()) - {"HEAD"})
]
OPEN = ("/health", "/ready")


@pytest.fixture(scope="module")
def locked(serve: Serve) -> Iterator[Running]:
    with serve(keys=(KEY,), allowed_hosts=("weft.example",), allowed_origins=("https://app.example",)) as server:
        yield server


def ask(server: Running, method: str, path: str, key: str | None = KEY, **headers: str) -> httpx.Response:
    names = {name.replace("_", "-"): value for name, value in headers.items()}
    if key is not None:
        names["authorization"] = f"Bearer {key}".strip()
    with server.client() as client:
        return client.request(method, path, headers=names, **({"json": {}} if method == "POST" else {}))


def envelope(answer: httpx.Response, status: int) -> None:
    assert answer.status_code == status, answer.text
    assert set(answer.json()["error"]) == {"message", "type", "param", "code"}
    assert answer.headers["x-request-id"]


@pytest.mark.parametrize(("method", "path"), PATHS)
def test_every_route_is_guarded(locked: Running, method: str, path: str) -> None:
    allowed = ask(locked, method, path).status_code
    assert allowed in ((200,) if method == "GET" else (400, 403, 404)), "the request itself is let in"
    for key in (None, "", "wrong-key", KEY + "x", KEY[:-1]):
        if path not in OPEN:
            envelope(ask(locked, method, path, key), 401)
    for host in ("evil.example", "evil.example:80", "127.0.0.1.evil.example", "10.0.0.1", "localhost.evil", "", "[::1"):
        envelope(ask(locked, method, path, host=host), 403)
    for host in ("localhost", "127.0.0.1:1", "[::1]:80", "weft.example", "WEFT.example:8000"):
        assert ask(locked, method, path, host=host).status_code == allowed
    for origin in ("https://evil.example", "null", "http://localhost:1", "https://app.example.evil", "file://"):
        envelope(ask(locked, method, path, origin=origin), 403)
    found = ask(locked, method, path, origin="https://app.example")
    assert (found.status_code, found.headers["access-control-allow-origin"]) == (allowed, "https://app.example")
    assert ask(locked, method, path, origin=locked.url).status_code == allowed, "the server's own pages"
    for other in ("PUT", "DELETE", "PATCH", "TRACE", "OPTIONS", "BREW", "GET" if method == "POST" else "POST"):
        answer = ask(locked, other, path, content_type="application/json")
        envelope(answer, 405)
        assert method in answer.headers["allow"]


def test_a_browser_may_ask_first(locked: Running) -> None:
    headers = {"origin": "https://app.example", "access_control_request_method": "POST"}
    found = ask(locked, "OPTIONS", "/v1/chat/completions", None, **headers)
    assert found.status_code == 204
    assert "authorization" in found.headers["access-control-allow-headers"]
    envelope(ask(locked, "OPTIONS", "/v1/chat/completions", None, **{**headers, "origin": "https://evil.example"}), 403)


def test_only_plain_json_of_some_length_is_read(locked: Running) -> None:
    headers = {"authorization": f"Bearer {KEY}"}
    with locked.client(headers=headers) as client:
        for kind in ("text/plain", "application/x-www-form-urlencoded", "multipart/form-data", ""):
            envelope(client.post("/v1/completions", content=b"{}", headers={"content-type": kind}), 415)
        packed = {"content-type": "application/json", "content-encoding": "gzip"}
        envelope(client.post("/v1/completions", content=b"{}", headers=packed), 415)
        json = {"content-type": "application/json; charset=utf-8"}
        envelope(client.post("/v1/completions", content=b"{}", headers=json), 400)
        envelope(client.post("/v1/completions", content=b" " * (1 << 20) + b"x", headers=json), 413)
        envelope(client.get("/v1/nothing"), 404)
        envelope(client.get("/v1/models/"), 404)


def raw(server: Running, *parts: bytes, wait: float = 5.0) -> bytes:
    """What the server answers to these bytes, until it closes the connection."""
    host, port = server.url.removeprefix("http://").split(":")
    with socket.create_connection((host, int(port)), timeout=wait) as connection:
        for part in parts:
            connection.sendall(part)
        found = b""
        try:
            while data := connection.recv(65536):
                found += data
        except (TimeoutError, ConnectionResetError):
            pass
        return found


def test_a_body_without_end_is_cut_before_two_megabytes(server: Running) -> None:
    """Its length is not told, so only counting helps."""
    host, port = server.url.removeprefix("http://").split(":")
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    chunk = b"10000\r\n" + b" " * 65536 + b"\r\n"
    sent = 0
    with socket.create_connection((host, int(port)), timeout=5) as connection:
        connection.sendall(head + b"Transfer-Encoding: chunked\r\n\r\n")
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 65536)
        connection.settimeout(0.5)
        try:
            while sent < 64 << 20:
                connection.sendall(chunk)
                sent += 65536
        except OSError:
            pass
        connection.settimeout(5)
        try:
            found = connection.recv(65536)
        except ConnectionResetError:
            found = b"HTTP/1.1 413"
    assert found.startswith(b"HTTP/1.1 413")
    assert sent < 8 << 20, "the kernels' buffers hold the rest"


@pytest.mark.parametrize(
    "text",
    [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x00\xa5", b"GET /\x00 HTTP/1.1\r\nHost: localhost\r\n\r\n",
     b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: -1\r\n\r\n",
     b"GET /health HTTP/1.1\r\n\r\n", b"GET /health HTTP/1.1\r\nHost: a\r\nHost: b\r\n\r\n",
     b"GET /health HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 400_000 + b"\r\n\r\n"],
)  # fmt: skip
def test_what_is_no_http(server: Running, text: bytes) -> None:
    found = raw(server, text + b"\r\n\r\n", wait=2)
    assert found.startswith(b"HTTP/1.1 400")
    assert b'{"error":{"message":' in found


def test_slow_clients_are_let_go(serve: Serve) -> None:
    with serve(header_timeout=0.3, body_timeout=0.3, idle_timeout=1) as server:
        begun = time.monotonic()
        assert raw(server, b"GET /health HTTP/1.1\r\nHost: loc") == b""
        head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
        head += b"Content-Length: 9\r\n\r\n"
        assert raw(server, head, b"{").startswith(b"HTTP/1.1 408")
        assert raw(server, b"GET /health HTTP/1.1\r\nHost: localhost\r\n\r\n").endswith(b'{"status":"ok"}')
        assert time.monotonic() - begun < 4
        assert until(lambda: not server.server.server_state.connections)


def test_a_client_that_goes_before_its_body_is_whole_is_no_defect(
    serve: Serve, caplog: pytest.LogCaptureFixture
) -> None:
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with caplog.at_level(logging.INFO), serve() as server:
        raw(server, head + b"Content-Length: 90\r\n\r\n", b"{", wait=0.2)
        assert until(lambda: "path=/v1/completions status=499" in said(caplog))
        assert "failed" not in said(caplog)
        assert server.server.metrics.requests.values[("/v1/completions", "499")] == 1


def said(caplog: pytest.LogCaptureFixture) -> str:
    """What the server has logged; the client has a log of its own."""
    return "\n".join(one.getMessage() for one in caplog.records if one.name.startswith("weft"))


def test_the_log_has_ids_and_no_prompts(serve: Serve, caplog: pytest.LogCaptureFixture) -> None:
    body = {"model": "lora", "prompt": "canary-of-a-prompt", "max_tokens": 1}
    with caplog.at_level(logging.INFO), serve(keys=(KEY,)) as server:
        with server.client(headers={"authorization": f"Bearer {KEY}"}) as client:
            found = client.post("/v1/completions?q=canary-of-a-query", json=body, headers={"x-request-id": "mine.1"})
            assert found.headers["x-request-id"] == "mine.1"
            other = client.post("/v1/completions", json=body, headers={"x-request-id": "a b\tc"})
            assert len(other.headers["x-request-id"]) == 32
        assert until(lambda: said(caplog).count("path=/v1/completions") == 2)
    assert "request=mine.1 client=127.0.0.1 method=POST path=/v1/completions status=200" in said(caplog)
    assert 'model="lora"' in said(caplog)
    assert "canary" not in said(caplog)
    assert KEY not in said(caplog)
    caplog.clear()
    with caplog.at_level(logging.INFO), serve(log_prompts=True) as server:
        with server.client() as client:
            client.post("/v1/completions", json=body)
        assert until(lambda: "canary-of-a-prompt" in said(caplog))


def test_keys(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    assert "abc" not in Keys(())
    assert not Keys(())
    assert "one-of-two" in Keys(("other-key", "one-of-two"))
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# ours\n\nfirst-key\n  second-key \n")
    monkeypatch.setenv("WEFT_API_KEY", "third-key")
    assert read_keys(file) == ("third-key", "first-key", "second-key")
    assert read_keys(file) == ("first-key", "second-key"), "the variable is gone, so no child sees it"
    for text in ("", "# none\n", "short\n", "with blank\n", "schlüssel-lang\n"):
        file.write_text(text)
        with pytest.raises(UserError):
            read_keys(file)
    with pytest.raises(UserError, match="API key"):
        ServeSettings(host="0.0.0.0")
    assert ServeSettings(host="0.0.0.0", keys=("long-enough",)).keys
