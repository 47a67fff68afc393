"""An OpenAI-compatible server with faults, in a thread, on a real socket; it counts what it bills."""

from __future__ import annotations

import hashlib
import json
import random
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.utils import formatdate
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "mock-1"
# Every way in which an answer goes wrong. Those of the second line are billed.
UNBILLED = ("429", "429_after", "500", "502_html", "503_date", "529")
BILLED = (
    "cut_body", "closed", "bad_json", "not_chat", "wrong_schema", "refusal", "content_filter", "length", "wrong_model",
    "empty", "slow", "drip", "no_usage",
)  # fmt: skip
FAULTS = (*UNBILLED, *BILLED)


def right_answer(prompt: str) -> str:
    """What the server says to a prompt, as JSON."""
    return json.dumps({"answer": hashlib.sha256(prompt.encode()).hexdigest()[:8]})


class MockServer:
    """What the handlers share.

    Attributes:
        tokens: all that were billed. ``good``: per prompt, how many right answers were sent whole. ``dealt``: faults.
        posts: requests that came.
    """

    def __init__(self, fault_of: Callable[[str], str | None]) -> None:
        self.fault_of = fault_of
        self.tokens = self.posts = 0
        self.good: Counter[str] = Counter()
        self.dealt: Counter[str | None] = Counter()
        self.told: list[dict[str, Any]] = []
        self.headers: list[dict[str, str]] = []
        self.status: tuple[int, str] | None = None  # what every request is refused with
        self.lock = threading.Lock()
        self.slow = 0.5
        self.url = ""


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    mock: MockServer

    def log_message(self, *_: object) -> None:
        pass

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        prompt = body["messages"][-1]["content"]
        mock = self.mock
        with mock.lock:
            mock.posts += 1
            mock.told.append(body)
            mock.headers.append({name.lower(): text for name, text in self.headers.items()})
            fault = mock.fault_of(prompt)
            mock.dealt[fault] += 1
        if mock.status is not None:
            self._send(mock.status[0], {"error": {"message": mock.status[1], "code": mock.status[1]}})
            return
        usage = {"prompt_tokens": len(prompt.split()) + 9, "completion_tokens": min(20, body["max_tokens"])}
        answer = {
            "model": MODEL + "-2026-01-01",
            "choices": [{"message": {"content": right_answer(prompt)}, "finish_reason": "stop"}],
            "usage": usage,
        }
        if fault not in UNBILLED:
            with mock.lock:
                mock.tokens += sum(usage.values())
                mock.good[prompt] += fault in (None, "no_usage")
        getattr(self, f"_{fault}", self._fine)(answer) if fault else self._fine(answer)

    def _send(self, status: int, value: Any, **headers: str) -> None:
        data = value if isinstance(value, bytes) else json.dumps(value).encode()
        self.send_response(status)
        for name, text in {"Content-Length": str(len(data)), "Content-Type": "application/json", **headers}.items():
            self.send_header(name.replace("_", "-"), text)
        self.end_headers()
        self.wfile.write(data)

    def _fine(self, answer: Any) -> None:
        self._send(200, answer)

    def _429(self, _: Any) -> None:
        self._send(429, {"error": {"message": "too many"}})

    def _429_after(self, _: Any) -> None:
        self._send(429, {"error": {"message": "too many"}}, Retry_After="0.002")

    def _429_long(self, _: Any) -> None:
        self._send(429, {"error": {"message": "too many"}}, Retry_After="0.3")

    def _500(self, _: Any) -> None:
        self._send(500, {"error": {"message": "oh"}})

    def _502_html(self, _: Any) -> None:
        self._send(502, b"<html>bad gateway</html>")

    def _503_date(self, _: Any) -> None:
        self._send(503, {}, Retry_After=formatdate(time.time() - 5, usegmt=True))

    def _529(self, _: Any) -> None:
        self._send(529, {"error": "overloaded"})

    def _cut_body(self, answer: Any) -> None:
        data = json.dumps(answer).encode()
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    def _closed(self, _: Any) -> None:
        self.close_connection = True

    def _bad_json(self, answer: Any) -> None:
        self._send(200, json.dumps(answer).encode()[:-7])

    def _not_chat(self, _: Any) -> None:
        self._send(200, {"object": "list", "data": []})

    def _wrong_schema(self, answer: Any) -> None:
        answer["choices"][0]["message"]["content"] = '{"answr": 1}'
        self._fine(answer)

    def _refusal(self, answer: Any) -> None:
        answer["choices"][0]["message"] = {"content": None, "refusal": "I cannot."}
        self._fine(answer)

    def _content_filter(self, answer: Any) -> None:
        answer["choices"][0] = {"message": {"content": ""}, "finish_reason": "content_filter"}
        self._fine(answer)

    def _length(self, answer: Any) -> None:
        answer["choices"][0] = {"message": {"content": '{"ans'}, "finish_reason": "length"}
        self._fine(answer)

    def _wrong_model(self, answer: Any) -> None:
        self._fine(answer | {"model": "mock-mini"})

    def _empty(self, answer: Any) -> None:
        answer["choices"][0]["message"]["content"] = "  \n"
        self._fine(answer)

    def _slow(self, answer: Any) -> None:
        time.sleep(self.mock.slow)
        self.close_connection = True

    def _drip(self, answer: Any) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        until = time.monotonic() + self.mock.slow
        while time.monotonic() < until:
            self.wfile.write(b" ")
            self.wfile.flush()
            time.sleep(0.02)
        self.close_connection = True

    def _no_usage(self, answer: Any) -> None:
        del answer["usage"]
        self._fine(answer)


class _Quiet(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, *_: object) -> None:
        """A client that has gone is no news."""


@contextmanager
def mock_server(fault_of: Callable[[str], str | None] = lambda _: None) -> Iterator[MockServer]:
    """Serve. ``fault_of`` names the fault of the next answer to a prompt; None: none."""
    mock = MockServer(fault_of)
    handler = type("Handler", (_Handler,), {"mock": mock})
    server = _Quiet(("127.0.0.1", 0), handler)
    mock.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
    thread.start()
    try:
        yield mock
    finally:
        server.shutdown()
        server.server_close()


def random_faults(generator: random.Random, share: float, most: int) -> Callable[[str], str | None]:
    """Faults drawn at random, at most so many of one prompt."""
    counts: Counter[str] = Counter()

    def fault_of(prompt: str) -> str | None:
        if counts[prompt] >= most or generator.random() >= share:
            return None
        counts[prompt] += 1
        return generator.choice(FAULTS)

    return fault_of
