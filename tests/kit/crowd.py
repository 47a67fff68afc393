"""Many clients in a process of their own, so that they take no time of the server's: it runs this file as a script.

``crowd(url, rate, seconds)`` sends requests at a rate, whether or not they are answered, and says how long each took.
"""

from __future__ import annotations

import asyncio
import json
import subprocess
import sys
import time
from typing import Any

_PATIENCE = 20  # seconds that a client waits for its answer


def crowd(url: str, rate: float, seconds: float, request: dict[str, Any]) -> list[tuple[int, float, float]]:
    """(status, when it was sent, seconds) of every request to ``/v1/completions``; status 0: no answer came."""
    words = [sys.executable, "-I", __file__, url, str(rate), str(seconds), json.dumps(request)]
    found = subprocess.run(words, check=True, capture_output=True, text=True, timeout=seconds + 60)
    return [(int(status), float(at), float(took)) for status, at, took in json.loads(found.stdout)]


async def _ask(host: str, port: int, text: bytes) -> int:
    try:
        return await asyncio.wait_for(_told(host, port, text), _PATIENCE)
    except (OSError, TimeoutError, asyncio.IncompleteReadError):
        return 0


async def _told(host: str, port: int, text: bytes) -> int:
    reader, writer = await asyncio.open_connection(host, port)
    try:
        writer.write(text)
        head = await reader.readuntil(b"\r\n\r\n")
        await reader.read()
        return int(head.split(b" ", 2)[1])
    finally:
        writer.close()


async def _crowd(url: str, rate: float, seconds: float, body: bytes) -> list[tuple[int, float, float]]:
    host, port = url.removeprefix("http://").split(":")
    head = "POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    text = f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body
    begun, found = time.monotonic(), []

    async def one() -> None:
        at = time.monotonic()
        status = await _ask(host, int(port), text)
        found.append((status, at - begun, time.monotonic() - at))

    tasks = []
    for number in range(int(rate * seconds)):
        await asyncio.sleep(max(0.0, begun + number / rate - time.monotonic()))
        tasks.append(asyncio.ensure_future(one()))
    await asyncio.gather(*tasks)
    return found


if __name__ == "__main__":
    print(json.dumps(asyncio.run(_crowd(sys.argv[1], float(sys.argv[2]), float(sys.argv[3]), sys.argv[4].encode()))))
