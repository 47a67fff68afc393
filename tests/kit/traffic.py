"""Traffic for an engine: requests of all methods at random times, while adapters come and go under their names."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

from tests.kit.adapters import randomize
from tests.kit.methods import ALL, method_config
from tests.kit.samples import texts

from weft.api import Adapters
from weft.generation import Engine, Limits, Request
from weft.generation.request import Answer


@dataclass
class Report:
    """What traffic showed: how many answers, how many loads, and the wrong answers by number."""

    answers: int = 0
    loads: int = 0
    reloaded_names: int = 0
    wrong: list[int] = field(default_factory=list)


def run_traffic(adapters: Adapters, count: int, *, seed: int, guests: int = 4) -> Report:
    """Let an engine answer ``count`` requests greedily, and compare each with an engine of its own.

    ``adapters`` has one adapter of every method. ``guests`` more names come and go: a name that has no rows is
    removed, and later loaded again with another method and other values.
    """
    draw, report = random.Random(seed), Report()
    engine = Engine(adapters, limits=Limits(max_rows=24, prefill_tokens=24, cache_tokens=1200, block_tokens=4))
    openings = texts(3, 8, 24, seed=seed)
    present: dict[str, int] = {}  # guest -> its version
    running: dict[int, tuple[Answer, str | None]] = {}
    wanted: dict[int, list[int]] = {}
    ended: set[str] = set()
    sent = 0
    while sent < count or running:
        for _ in range(min(draw.randint(0, 6), count - sent)):
            name = draw.choice([None, *ALL, *present])
            prompt = [*draw.choice([[], *openings]), *texts(1, 1, 8, seed=draw.randrange(10**6))[0]]
            request = Request(prompt, name, draw.randint(1, 8))
            # Alone, with the values that the name has now.
            wanted[sent] = Engine(adapters, limits=Limits(cache_tokens=64)).generate([request])[0].ids
            running[sent] = (engine.submit(request), name)
            sent += 1
        engine.step()
        for number, (answer, _) in list(running.items()):
            if answer.done:
                report.answers += 1
                if answer.result().ids != wanted.pop(number):
                    report.wrong.append(number)
                del running[number]
        busy = {name for _, name in running.values()}
        if draw.random() < 0.3:
            guest = f"guest{draw.randrange(guests)}"
            if guest in present and guest not in busy:
                engine.apply(lambda guest=guest: adapters.remove(guest)).result()  # type: ignore[misc]
                del present[guest]
                ended.add(guest)
            elif guest not in present:
                method = draw.choice(ALL)
                new = engine.apply(lambda g=guest, m=method: adapters.add(g, method_config(m))).result()  # type: ignore[misc]
                randomize(new, draw.randrange(10**6))
                present[guest] = draw.randrange(10**6)
                report.loads += 1
                report.reloaded_names += guest in ended
    for guest in present:
        adapters.remove(guest)
    engine.close()
    return report
