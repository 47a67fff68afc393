"""Every method works with its defaults: the committed table says so, and the slow test makes it again."""

from __future__ import annotations

import importlib.util
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from weft.assets import EMBEDDED_MODELS
from weft.methods import METHODS

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
# Exact match that the strong methods must reach; the light ones must come halfway from the base to LoRA.
STRONG, WANTED = ("lora", "adalora", "bottleneck", "full"), 0.9
LIGHT = ("prefix_tuning", "p_tuning_v2", "p_tuning", "prompt_tuning", "bitfit", "ia3", "llama_pro")


def load(path: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(Path(path).stem, ROOT / path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def check(rows: list[dict[str, Any]]) -> None:
    found = {row["job"]: row["exact_match"] for row in rows}
    halfway = (found[None] + found["lora"]) / 2
    short = {m: found[m] for m in STRONG if found[m] < WANTED} | {m: found[m] for m in LIGHT if found[m] < halfway}
    assert not short, f"{short}; halfway is {halfway}"


@pytest.mark.parametrize("model", EMBEDDED_MODELS)
def test_the_committed_table_holds_what_is_promised(model: str) -> None:
    rows = json.loads((RESULTS / "methods.json").read_text())[model]
    assert {row["job"] for row in rows} == {None, *METHODS} - {"trainable_tokens"}  # it is no method for a task
    check(rows)


def test_the_page_is_that_of_the_code_and_of_the_table() -> None:
    page = load("tools/methods_page.py")
    assert (ROOT / "docs" / "methods.md").read_text() == page.page(*page.results())


@pytest.mark.slow
@pytest.mark.parametrize("model", EMBEDDED_MODELS)
def test_every_method_learns_with_its_defaults(model: str) -> None:
    bench = load("benchmarks/methods.py")
    rows = bench.measure(model, bench.jobs_of(sorted(METHODS.keys() - {"trainable_tokens"})), bench.STEPS)
    for row in rows:
        print(f"[measured] {model} {row['job'] or 'base'}: exact match {row['exact_match']:.3f}")
    check(rows)
