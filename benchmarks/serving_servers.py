"""``weft serve`` beside other servers on this machine: one model, the same requests, 1, 4 and 16 clients, in one run.

Contestants: ``weft serve``; ``transformers serve``, with and without its continuous batching, where that starts; and
the server of llama-cpp-python on a GGUF file of the same model, where that package is installed. Every client sends
requests of mixed lengths one after the other, and streams. The contestants take turns, and those
that wait are stopped: some poll. A model of random weights is
written first; its vocabulary is that of the embedded tokenizer, so that every token has a text.

    python benchmarks/serving_servers.py --shape 1.26b --output benchmarks/results/serving_servers_<hardware>_<date>.md
"""

from __future__ import annotations

import argparse
import asyncio
import datetime
import importlib.util
import json
import os
import random
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import httpx
import torch

from speed_setting import SHAPES, build_model
from weft.assets import model_path

WORDS = (
    "the", "loom", "keeps", "its", "warp", "fixed", "and", "weaves", "many", "wefts", "through", "it", "while",
    "people", "look", "on", "talk", "of", "old", "bridges",
)  # fmt: skip


@dataclass
class Measured:
    """What one contestant did for one number of clients."""

    seconds: float = 0.0
    tokens: int = 0
    first: list[float] = field(default_factory=list)
    errors: list[str] = field(default_factory=list)


@dataclass(frozen=True)
class Server:
    """A contestant that listens."""

    name: str
    model: str
    url: str
    process: subprocess.Popen[bytes]
    start: float


def write_model(shape: str, folder: Path) -> None:
    """The model with the embedded tokenizer. It writes words only: a part of a character would be no text yet, and the
    first token would seem to come when the character is whole."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(model_path("tiny-llama"), trust_remote_code=False)
    model: Any = build_model(replace(SHAPES[shape], vocabulary=len(tokenizer)))
    texts = tokenizer.batch_decode([[token] for token in range(len(tokenizer))])
    with torch.no_grad():
        for token, text in enumerate(texts):
            if not (text.isascii() and text.strip().isalpha()) or token in tokenizer.all_special_ids:
                model.get_output_embeddings().weight[token] = 0  # never the likeliest
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def commands(folder: Path, gguf: Path | None, ports: Sequence[int]) -> dict[str, tuple[list[str], str]]:
    """Name -> (command, the model's name in requests)."""
    bin_folder = Path(sys.executable).parent
    found = {
        "weft serve": ([str(bin_folder / "weft"), "serve", str(folder), "--port", str(ports[0])], ""),
        "transformers serve": (
            [str(bin_folder / "transformers"), "serve", str(folder), "--port", str(ports[1]), "--device", "cpu"],
            str(folder),
        ),
        "transformers serve, continuous batching": (
            [str(bin_folder / "transformers"), "serve", str(folder), "--port", str(ports[2]), "--device", "cpu",
             "--continuous-batching", "--cb-num-blocks", "256"],
            str(folder),
        ),
    }  # fmt: skip
    if gguf is not None and importlib.util.find_spec("llama_cpp") and importlib.util.find_spec("sse_starlette"):
        found["llama.cpp (llama-cpp-python)"] = (
            [sys.executable, "-m", "llama_cpp.server", "--model", str(gguf), "--port", str(ports[3]),
             "--n_threads", str(os.cpu_count()), "--n_ctx", "2048"],
            "",
        )  # fmt: skip
    return found


def started(name: str, command: list[str], model: str, log: Path) -> Server | None:
    """The server, once it answers; None if it does not within five minutes."""
    begun = time.perf_counter()
    with log.open("wb") as out:
        process = subprocess.Popen(command, stdout=out, stderr=out)
    port = command[command.index("--port") + 1]
    url = f"http://127.0.0.1:{port}/v1"
    while time.perf_counter() - begun < 300 and process.poll() is None:
        try:
            listed = httpx.get(f"{url}/models", timeout=5)
            if listed.status_code == 200:
                name_there = model or listed.json()["data"][0]["id"]
                asked = {"model": name_there, "prompt": "the", "max_tokens": 1}
                if httpx.post(f"{url}/completions", json=asked, timeout=120).status_code == 200:
                    ready = time.perf_counter() - begun
                    process.send_signal(signal.SIGSTOP)
                    return Server(name, name_there, url, process, ready)
        except httpx.HTTPError:
            pass
        time.sleep(0.2)
    process.kill()
    print(f"{name} did not start; the end of its log:\n{log.read_text(errors='replace')[-1500:]}", flush=True)
    return None


def questions(clients: int, each: int) -> list[list[dict[str, object]]]:
    """What every client asks, in order: prompts of 4 to 40 words, answers of 16 to 96 tokens."""
    draw = random.Random(7)
    return [
        [
            {
                "prompt": " ".join(draw.choice(WORDS) for _ in range(draw.choice([4, 8, 16, 40]))),
                "max_tokens": draw.choice([16, 32, 64, 96]),
                "temperature": 0,
                "stream": True,
            }
            for _ in range(each)
        ]
        for _ in range(clients)
    ]


async def measure(server: Server, asked: Sequence[Sequence[dict[str, object]]]) -> Measured:
    """All clients at once."""
    server.process.send_signal(signal.SIGCONT)
    await asyncio.sleep(0.5)
    found = Measured()

    async def client(own: Sequence[dict[str, object]]) -> None:
        async with httpx.AsyncClient(timeout=1200) as session:
            for question in own:
                begun, first = time.perf_counter(), None
                body = {"model": server.model, **question}
                try:
                    async with session.stream("POST", f"{server.url}/completions", json=body) as answer:
                        if answer.status_code != 200:
                            found.errors.append((await answer.aread()).decode()[:200])
                            continue
                        async for line in answer.aiter_lines():
                            if line.startswith("data: {") and json.loads(line[6:]).get("choices") and first is None:
                                first = time.perf_counter() - begun
                except httpx.HTTPError as error:
                    found.errors.append(repr(error))
                    continue
                found.first.append(first if first is not None else time.perf_counter() - begun)
                # No contestant ends early: a random model hardly ever writes its end token.
                found.tokens += int(str(question["max_tokens"]))

    begun = time.perf_counter()
    await asyncio.gather(*map(client, asked))
    found.seconds = time.perf_counter() - begun
    server.process.send_signal(signal.SIGSTOP)
    return found


def percentile(values: Sequence[float], share: float) -> float:
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(share * len(ordered)))]


def main() -> None:
    """Print the table, and write it to a file."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--shape", default="160m", choices=SHAPES)
    parser.add_argument("--clients", default="1,4,16")
    parser.add_argument("--each", type=int, default=4, help="requests of every client")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--gguf", type=Path, help="the same model for llama.cpp, written before by weft export")
    parser.add_argument("--folder", type=Path, help="where the model lies, or is written")
    parser.add_argument("--output", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as scratch:
        folder = options.folder or Path(scratch) / "model"
        if not (folder / "config.json").is_file():
            write_model(options.shape, folder)
        ports = []
        for _ in range(4):
            with socket.socket() as free:
                free.bind(("127.0.0.1", 0))
                ports.append(free.getsockname()[1])
        servers = [
            server
            for name, (command, model) in commands(folder, options.gguf, ports).items()
            if (server := started(name, command, model, Path(scratch) / f"{name.replace(' ', '_')}.log")) is not None
        ]
        lines = table(servers, options)
        for server in servers:
            server.process.kill()
    text = "\n".join(lines) + "\n"
    print(text)
    if options.output:
        options.output.write_text(text, encoding="utf-8")


def table(servers: Sequence[Server], options: argparse.Namespace) -> list[str]:
    """Measure every server with every number of clients."""
    lines = [
        "# weft serve beside other servers", "",
        f"`python benchmarks/serving_servers.py --shape {options.shape} --each {options.each}`, "
        f"{datetime.date.today()}, {os.cpu_count()} cores, torch {torch.__version__}, the {options.shape} shape in "
        "bf16 with random weights. Prompts of 4 to 40 words, answers of 16 to 96 tokens; every client asks "
        f"{options.each * options.rounds} times, streaming.", "",
        "| clients | server | tokens/s | first token p50, s | p99, s | over transformers serve | errors |",
        "|---|---|---|---|---|---|---|",
    ]  # fmt: skip
    for clients in map(int, options.clients.split(",")):
        found = {server.name: Measured() for server in servers}
        for _ in range(options.rounds):
            for server in servers:
                once = asyncio.run(measure(server, questions(clients, options.each)))
                whole = found[server.name]
                whole.seconds += once.seconds
                whole.tokens += once.tokens
                whole.first += once.first
                whole.errors += once.errors
        usual = found.get("transformers serve")
        for name, one in found.items():
            rate = one.tokens / one.seconds
            over = "" if usual is None or not usual.tokens else f"{rate / (usual.tokens / usual.seconds):.2f}"
            first = one.first or [float("nan")]
            lines.append(
                f"| {clients} | {name} | {rate:,.1f} | {statistics.median(first):.2f} | "
                f"{percentile(first, 0.99):.2f} | {over} | {len(one.errors)} |"
            )
            print(lines[-1], *one.errors[:1], flush=True)
    lines += ["", "| server | seconds to its first answer, from its start |", "|---|---|"]
    lines += [f"| {server.name} | {server.start:.1f} |" for server in servers]
    return lines


if __name__ == "__main__":
    main()
