"""Servers for the tests: a tiny base with adapters behind a real socket."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import pytest
from tests.kit.adapters import randomize
from tests.kit.engines import FakeEngine
from tests.kit.serving import Running, running, service_of

import weft
from weft.generation.open import open_target
from weft.generation.target import Target
from weft.heads.classification import ClassificationTask
from weft.serve.loading import make_endpoints
from weft.serve.metrics import Metrics
from weft.serve.service import Service
from weft.serve.settings import ServeSettings

TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for tool in tools %}{{ tool | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for message in messages %}{{ '<|im_start|>' + message.role + '\n' + message.content }}"
    "{% for call in message.tool_calls or [] %}{{ '<tool_call>\n' + (call.function | tojson) + '\n</tool_call>' }}"
    "{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def make_target(folder: Path, **options: Any) -> Target:
    """The tiny Llama with two adapters that write, and one that classifies."""
    opened = open_target(folder, dtype="float32", device="cpu", **options)
    adapters = opened.adapters
    randomize(adapters.add("lora", weft.LoraConfig(r=4), tokenizer=opened.base.tokenizer), 1)
    randomize(adapters.add("prefix", weft.PrefixTuningConfig(num_virtual_tokens=4), tokenizer=opened.base.tokenizer), 2)
    head = ClassificationTask(("no", "yes"))
    randomize(adapters.add("judge", weft.LoraConfig(r=4), tokenizer=opened.base.tokenizer, head=head), 3)
    return Target(opened.base, adapters, opened.renderer, names=("lora", "prefix", "judge"))


@contextmanager
def closing(
    make: Callable[[ServeSettings, Metrics], Service], settings: ServeSettings, opened: list[Target]
) -> Iterator[Running]:
    """A server, and the end of its engine and of the targets that ``make`` has opened."""
    with running(make, settings) as server:
        try:
            yield server
        finally:
            server.engine.close()
            for target in opened:
                target.close()


@pytest.fixture(scope="session")
def serve(tiny_llama_dir: Path) -> Callable[..., AbstractContextManager[Running]]:
    """``with serve(keys=(...), script=..., delay=...) as server``: the tiny Llama behind a ``FakeEngine``."""

    @contextmanager
    def start(
        *, script: Any = None, delay: float = 0.0, chat_template: str | None = None, **settings: Any
    ) -> Iterator[Running]:
        opened = []

        def make(given: ServeSettings, metrics: Metrics) -> Service:
            target = make_target(tiny_llama_dir, chat_template=chat_template)
            opened.append(target)
            tokenizer = target.base.tokenizer
            engine = FakeEngine(
                target.adapters, tokenizer=tokenizer, script=script, delay=delay, max_rows=given.max_rows
            )
            return service_of(target, engine, given, metrics)

        with closing(make, ServeSettings(port=0, **settings), opened) as server:
            yield server

    return start


@pytest.fixture(scope="module")
def server(serve: Callable[..., AbstractContextManager[Running]]) -> Iterator[Running]:
    """A server without keys, shared by the tests of a file."""
    with serve() as found:
        yield found


@pytest.fixture(scope="session")
def serve_real(tiny_llama_dir: Path) -> Callable[..., AbstractContextManager[Running]]:
    """``with serve_real(...) as server``: the tiny Llama with its adapters, behind the engine that users have."""

    @contextmanager
    def start(**settings: Any) -> Iterator[Running]:
        def make(given: ServeSettings, metrics: Metrics) -> Service:
            target = make_target(tiny_llama_dir)
            opened.append(target)
            return make_endpoints(target, given, metrics).service

        opened: list[Target] = []
        with closing(make, ServeSettings(port=0, model_name="tiny", **settings), opened) as server:
            yield server

    return start
