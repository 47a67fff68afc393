"""Each record once per epoch, in the same order for any number of workers and after any number of kills."""

from __future__ import annotations

import random
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from tests.kit.processes import quick_workers
from tests.training import ledger

ROOT = Path(__file__).parents[2]
KILLED = -9


@pytest.fixture(scope="module")
def unbroken(tmp_path_factory: pytest.TempPathFactory) -> list[list[tuple[str, str]]]:
    folder = tmp_path_factory.mktemp("unbroken")
    ledger.write_data(folder)
    assert ledger.go_on(folder, workers=0)
    return ledger.epochs(folder)


def test_each_record_once_per_epoch(unbroken: list[list[tuple[str, str]]]) -> None:
    usable = {name: sum(i % 7 != 3 for i in range(count)) for name, count in ledger.ROWS.items()}
    total: Counter[str] = Counter()
    for epoch in unbroken:
        sources = [source for source, _ in epoch]
        assert len(set(sources)) == len(sources)
        counts = Counter(source.split(":")[0] for source in sources)
        assert abs(counts["mine.jsonl"] / len(sources) - 0.6) < 0.01
        assert 0.9 * usable["mine.jsonl"] < counts["mine.jsonl"] < usable["mine.jsonl"], "all but what is held out"
        total.update(sources)
    assert len({tuple(epoch) for epoch in unbroken}) == ledger.EPOCHS
    general = [count for source, count in total.items() if source.startswith("general")]
    assert max(general) - min(general) <= 1, "none again before all were seen"


@pytest.mark.parametrize("workers", [1, 4])
def test_workers_change_nothing(
    workers: int, context: Any, unbroken: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quick_workers(monkeypatch)
    ledger.write_data(tmp_path)
    assert ledger.go_on(tmp_path, workers)
    assert ledger.epochs(tmp_path) == unbroken


@pytest.mark.parametrize("kills", [6, pytest.param(20, marks=pytest.mark.slow)])
def test_kills_change_nothing(kills: int, context: Any, unbroken: Any, tmp_path: Path) -> None:
    """So many processes are killed one after another, at random steps; of 20 some have workers."""
    ledger.write_data(tmp_path)
    rng = random.Random(0)
    for kill in range(kills):
        process = context.Process(
            target=ledger.child, args=(str(tmp_path), 2 if kills == 20 and kill % 10 == 4 else 0, rng.randint(8, 14))
        )
        process.start()
        process.join(120)
        assert process.exitcode == KILLED, f"kill {kill} came too late"
    assert ledger.go_on(tmp_path, workers=0)
    assert ledger.epochs(tmp_path) == unbroken
