"""The plan that ``weft train`` makes first: it is told, and compared in the end; what does not fit is refused."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from weft.cli import planned
from weft.planning import plan as planning
from weft.training import loop


@pytest.fixture
def words(tiny_llama_dir: Path, tiny_data: Path) -> list[str]:
    return ["train", "--model", str(tiny_llama_dir), "--data", str(tiny_data), "--method", "lora", "steps=2"]


def test_the_plan_stands_first_and_what_came_of_it_last(weft: Callable[..., Any], words: list[str]) -> None:
    result = weft(*words, "check_memory=true")
    assert result.code == 0, result.err
    lines = result.out.splitlines()
    size = r"[\d.]+ [MG]B"
    assert re.match(
        rf"planned: {size} of memory of {size} at the fullest \(.*library .*\); about \S+ s a step, \S+ s in all$",
        lines[0],
    ), lines[0]
    assert lines[1].startswith("lora: trainable params")
    (told,) = [line for line in lines if line.startswith("memory: ")]
    assert re.match(rf"memory: {size} planned, {size} measured; a step: \S+ s planned, \S+ s measured$", told)


def test_the_figures_as_json(weft: Callable[..., Any], words: list[str]) -> None:
    found = json.loads(weft(*words, "check_memory=true", "--json").out)
    assert found["planned"]["memory"] > 1e8
    assert found["measured"]["memory"] > 1e8
    assert found["planned"]["step_seconds"] > 0
    assert found["measured"]["step_seconds"] > 0


def test_a_small_base_is_not_planned_by_itself(weft: Callable[..., Any], words: list[str]) -> None:
    found = json.loads(weft(*words, "--json").out)
    assert found["planned"] is None
    assert found["measured"]["memory"] > 1e8


def test_a_run_that_does_not_fit_is_refused(
    weft: Callable[..., Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(planning, "room", lambda device: 50_000_000)
    result = weft(*words, "check_memory=true")
    assert result.code == 3
    assert not result.out
    assert "It does not fit into 50" in result.err
    assert "check_memory=false" in result.err
    assert not Path("runs").exists()
    result = weft(*words, "check_memory=true", "--json")
    assert result.code == 3
    assert "does not fit" in json.loads(result.out)["error"]
    assert weft(*words, "check_memory=false").code == 0


@pytest.mark.parametrize("asked", ["auto", "true"])
def test_a_plan_that_fails_ends_no_run_unless_it_is_asked_for(
    asked: str, weft: Callable[..., Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.planning.plan._PLANNED_FROM", 1)

    def plan_of(*args: Any) -> Any:
        raise planned.UserError("there is no plan for such bases yet")

    monkeypatch.setattr(planning, "plan_of", plan_of)
    result = weft(*words, f"check_memory={asked}", "--quiet")
    assert result.code == (0 if asked == "auto" else 2)
    assert "there is no plan for such bases yet" in result.err


def test_where_memory_is_short_the_fullest_pass_comes_first(
    weft: Callable[..., Any], words: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    made: list[int] = []
    monkeypatch.setattr(loop, "make_fullest_pass", lambda *args: made.append(1))
    assert weft(*words, "check_memory=true").code == 0
    assert not made
    monkeypatch.setattr(planned, "_TIGHT", 0.0)
    assert weft(*words, "check_memory=true", "--overwrite-output-dir").code == 0
    assert made == [1]
