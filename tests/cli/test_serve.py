"""``weft serve`` as users run it: a process that begins, answers and ends."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from tests.kit.waiting import until

Weft = Callable[..., Any]


class Process:
    """A running ``weft serve``."""

    def __init__(self, words: tuple[object, ...], environment: dict[str, str]) -> None:
        source = str(Path(__file__).parent.parent.parent / "src")
        command = [sys.executable, "-m", "weft.cli.main", "serve", *map(str, words)]
        self.process = subprocess.Popen(
            command, stderr=subprocess.PIPE, text=True, env={**os.environ, "PYTHONPATH": source, **environment}
        )
        self.lines: list[str] = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self) -> None:
        assert self.process.stderr is not None
        self.lines += iter(self.process.stderr.readline, "")

    @property
    def text(self) -> str:
        return "".join(self.lines)

    @property
    def url(self) -> str:
        assert until(lambda: "listening on" in self.text or self.process.poll() is not None, 60), self.text
        found = re.search(r"http://\S+:\d+", self.text)
        assert found is not None, self.text
        return found[0]

    def wait_ready(self) -> None:
        assert until(lambda: "ready:" in self.text or self.process.poll() is not None, 90), self.text
        assert self.process.poll() is None, self.text

    def end(self, number: int = signal.SIGTERM) -> int:
        self.process.send_signal(number)
        code = self.process.wait(60)
        self._reader.join(5)
        return code


@contextmanager
def serving(*words: object, **environment: str) -> Iterator[Process]:
    found = Process((*words, "--port", 0), environment)
    try:
        yield found
    finally:
        found.process.kill()
        found.process.wait()


def test_a_run_is_served_until_a_signal_and_no_stream_is_cut(run_dir: Path) -> None:
    with serving(run_dir, "--adapters-folder", run_dir / "adapters", WEFT_API_KEY="long-enough") as server:
        with httpx.Client(base_url=server.url, timeout=20) as early:
            assert early.get("/health").status_code == 200
            assert early.get("/ready").status_code in (200, 503)
        server.wait_ready()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="long-enough", max_retries=0)
        assert [model.id for model in client.models.list()] == ["tiny-llama", "lora", "prefix_tuning"]
        with pytest.raises(openai.AuthenticationError):
            openai.OpenAI(base_url=f"{server.url}/v1", api_key="wrong").models.list()
        loaded = client.post("/load_lora_adapter", cast_to=object, body={"lora_name": "again", "lora_path": "lora"})
        assert loaded["status"] == "loaded"  # type: ignore[index]
        said: dict[str, str] = {}

        def ask(model: str) -> None:
            stream = client.completions.create(
                model=model, prompt="one", max_tokens=200, temperature=0, stream=True, extra_body={"ignore_eos": True}
            )
            chunks = [chunk.choices[0] for chunk in stream]
            assert chunks[-1].finish_reason == "length"
            said[model] = "".join(chunk.text for chunk in chunks)

        threads = [threading.Thread(target=ask, args=(name,)) for name in ("lora", "again", "prefix_tuning", "base")]
        for thread in threads:
            thread.start()
        key = {"authorization": "Bearer long-enough"}
        assert until(lambda: "weft_answers_open 4" in httpx.get(f"{server.url}/metrics", headers=key).text, 20)
        server.process.send_signal(signal.SIGTERM)
        for thread in threads:
            thread.join(60)
        assert len(said) == 4
        assert said["lora"] == said["again"]
        assert server.process.wait(30) == 0
    assert "ended." in server.text
    assert "long-enough" not in server.text
    assert "path=/v1/completions status=200" in server.text


@pytest.mark.slow
def test_a_minute_of_load_then_the_end(run_dir: Path) -> None:
    with serving(run_dir, "--grace", 60) as server:
        server.wait_ready()
        client = openai.OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0)
        ended, whole, cut, refused = threading.Event(), [], [], []

        def ask(number: int) -> None:
            while not ended.is_set():
                try:
                    stream = client.completions.create(
                        model=("lora", "prefix_tuning", "base")[number % 3], prompt="one", max_tokens=50 + number,
                        stream=True, extra_body={"ignore_eos": True},
                    )  # fmt: skip
                except (openai.APIConnectionError, openai.InternalServerError):
                    refused.append(number)
                    return
                try:
                    reasons = [chunk.choices[0].finish_reason for chunk in stream]
                except (openai.APIError, httpx.HTTPError):
                    cut.append(number)
                    return
                (whole if reasons[-1] == "length" else cut).append(number)

        threads = [threading.Thread(target=ask, args=(number,)) for number in range(24)]
        for thread in threads:
            thread.start()
        time.sleep(60)
        assert server.end() == 0
        ended.set()
        for thread in threads:
            thread.join(30)
        assert cut == []
        assert len(whole) > 24


def test_a_signal_while_it_loads(tiny_llama_dir: Path) -> None:
    with serving(tiny_llama_dir) as server:
        assert server.url
        begun = time.monotonic()
        assert server.end() == 0
        assert time.monotonic() - begun < 20


def test_what_cannot_begin_is_one_sentence(
    weft: Weft, tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refused(*words: object) -> str:
        found = weft("serve", *words)
        assert found.code == 2, found.err
        assert found.err.count("error: ") == 1
        return str(found.err)

    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} of 127.0.0.1 is in use" in refused(tiny_llama_dir, "--port", port)
    assert "WEFT_API_KEY" in refused(tiny_llama_dir, "--host", "0.0.0.0")
    assert "cannot listen on 203.0.113.7:8000" in refused(
        tiny_llama_dir, "--host", "203.0.113.7", "--api-key-file", keys(tmp_path)
    )
    assert "is no folder" in refused(tiny_llama_dir, "--adapters-folder", tmp_path / "none")
    assert "is missing" in refused(tiny_llama_dir, "--api-key-file", tmp_path / "none")
    assert "no model at" in refused(tmp_path / "nothing")
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    assert 'pip install "weft[serve]"' in refused(tiny_llama_dir)


def keys(folder: Path) -> Path:
    file = folder / "keys"
    file.write_text("long-enough\n")
    return file
