"""What a preview says of packs is what training does."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from tests.data.planted import clean_rows

from weft.preview.data_sets import examine
from weft.preview.packing import Packing
from weft.training.config import load_config
from weft.training.run import prepare


def config_for(folder: Path, **settings: Any) -> Any:
    rows = clean_rows(60)
    (folder / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    text = ["The river bends. " * n for n in (3, 40, 7, 90, 12, 60, 5, 33)]
    (folder / "t.jsonl").write_text(
        "".join(json.dumps({"text": f"Number {i}. {t}"}) + "\n" for i, t in enumerate(text))
    )
    (folder / "c.csv").write_text("text,label\n" + "".join(f"Text {'x ' * n},{n % 2}\n" for n in range(1, 30)))
    values = {"model": "tiny-llama", "method": "lora", "data": str(folder / "a.jsonl"), "audit": "off", **settings}
    path = folder / "run.json"
    path.write_text(json.dumps({"output_dir": str(folder / "out"), **values}))
    return load_config(path)


CASES: dict[str, dict[str, Any]] = {
    "default": {"batch_size": 3, "gradient_accumulation_steps": 4},
    "pack_tokens": {"batch_size": 16, "pack_tokens": 200},
    "batch_tokens": {"batch_tokens": 300},
    "virtual": {"method": ["lora", "prompt_tuning", "prefix_tuning"], "batch_tokens": 300},
    "eval_size": {"eval_size": 7},
    "eval_split": {"eval_split": 0.2},
    "classes, eval_split": {"data": "c.csv", "task": "sequence_classification", "eval_split": 0.3},
    "mixture": {"data": "0.7*a.jsonl + 0.3*t.jsonl", "truncation": "right", "max_length": 128},
    "windows": {"data": "t.jsonl", "documents": "windows", "max_length": 64, "window_overlap": 8, "eval_size": 4},
    "joined": {"data": "t.jsonl", "documents": "joined", "max_length": 64, "batch_size": 2},
    "classes": {"data": "c.csv", "task": "sequence_classification", "method": ["lora", "ia3"], "batch_size": 5},
    "seeds": {"jobs": [{"name": f"j{seed}", "seed": seed} for seed in (0, 0, 1)][1:]},
}


@pytest.mark.long
@pytest.mark.parametrize("case", CASES)
def test_packs_shown_are_the_packs_of_training(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str) -> None:
    monkeypatch.chdir(tmp_path)
    config = config_for(tmp_path, **CASES[case])
    shown: dict[str, Packing] = {}
    for data_set in examine(config):
        for packing in data_set.packings:
            shown |= dict.fromkeys(packing.names, packing)
    setup = prepare(config)
    try:
        assert set(shown) == {job.name for job in setup.jobs}
        for job in setup.jobs:
            packing = shown[job.name]
            assert packing.batches.capacity == job.batches.capacity
            assert len(packing.epoch) == job.batches.steps_in(0)
            for step, packs in enumerate(packing.epoch):
                job.progress.step = step
                wanted = [[(s.source, s.input_ids, s.weights) for s in micro] for micro in job.micro_batches()]
                told = [packing.samples[i] for pack in packs for i in pack]
                assert [len(pack) for pack in packs] == [len(micro) for micro in wanted]
                assert [(s.source, s.input_ids, s.weights) for s in told] == [one for micro in wanted for one in micro]
    finally:
        setup.adapters.close()


def test_places_are_rows_of_the_stream(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where a preview says that a sequence lies, the stream that the model gets has its tokens."""
    monkeypatch.chdir(tmp_path)
    config = config_for(tmp_path, batch_size=4, gradient_accumulation_steps=3)
    (data_set,) = examine(config)
    (packing,) = data_set.packings
    setup = prepare(config)
    try:
        (job,) = setup.jobs
        for index, place in packing.places.items():
            job.progress.step = place.step - 1
            stream = [token for sample in job.micro_batches()[place.pack - 1] for token in sample.input_ids]
            assert stream[place.begin : place.end] == packing.samples[index].input_ids
        assert len(packing.places) == 60
    finally:
        setup.adapters.close()


def test_figures(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (data_set,) = examine(config_for(tmp_path, batch_size=4, gradient_accumulation_steps=2))
    (packing,) = data_set.packings
    figures, lengths = packing.figures(), packing.batches.lengths
    order = packing.batches.mixture.order(0, 0)
    batches = [[lengths[i] for i in order[at : at + 4]] for at in range(0, 60, 4)]
    assert figures["padding"]["tokens"] == sum(4 * max(batch) - sum(batch) for batch in batches) > 0
    assert figures["capacity"] == max(map(sum, batches))
    assert (figures["steps"], figures["packs"]) == (8, sum(map(len, packing.epoch)))
    assert figures["largest"] == max(packing.batches.tokens(pack) for step in packing.epoch for pack in step)
    assert figures["fill"] == pytest.approx(sum(lengths) / (figures["packs"] * figures["largest"]), abs=1e-4)
    first = [entry for pack in figures["first_step"] for entry in pack]
    assert sum(entry["tokens"] for entry in first) == sum(entry["end"] - entry["begin"] for entry in first)
    assert len(first) == 8
