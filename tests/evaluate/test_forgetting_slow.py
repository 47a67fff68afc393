"""On the embedded base: what tuning costs, the rule, the cure; and a domain outside of which it learns to refuse."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from benchmarks.forgetting import measure

from weft.assets import instructions_path
from weft.data.behaviours import build_refusals, write_records
from weft.evaluate.behaviour import detection
from weft.evaluate.exact_match import answer_questions, read_questions
from weft.evaluate.results import Item
from weft.training import make_config
from weft.training.run import Setup, train

QUESTIONS = 200
# The standard error, in points, of the difference of two shares near 0.95 of these questions, were they independent.
# They are not: both jobs stumble over the same ones, so it is less.
ERROR = 100 * math.sqrt(2 * 0.95 * 0.05 / QUESTIONS)

# A refusal in words that this base has seen: LoRA trains no row of the vocabulary, and it has read little.
OWN = {"en": ["It is the work of the guest."], "zh": ["这是客人的。"]}


@pytest.mark.slow
def test_general_text_halves_what_is_forgotten_and_a_job_that_forgets_is_stopped(tmp_path: Path) -> None:
    """One seed of the recipe; the promised 3 points are a mean, so one seed may miss them by two errors."""
    rows = {row.job: row for row in measure(tmp_path, 0, steps=None, own_text=None)}
    plain, cure, stopped = rows["plain"], rows["mixed_longer"], rows["stopped"]
    assert plain.forgot > 0.5, "there is something to cure"
    assert cure.forgot < plain.forgot / 2
    assert cure.exact >= plain.exact - 3 - 2 * ERROR
    assert (stopped.ended, rows["overfits"].ended) == ("max_forgetting", "finished")
    assert stopped.steps < rows["overfits"].steps
    assert 0 < stopped.kept < stopped.steps
    assert stopped.forgot <= 0.5 < stopped.forgot_last
    assert rows["overfits"].forgot > 0.5


@pytest.mark.slow
def test_a_base_learns_to_refuse_what_lies_outside_its_domain(tmp_path: Path) -> None:
    """The domain is facts and sums; what lies outside are moods of texts and records as JSON."""
    sides: dict[tuple[str, bool], Path] = {}
    for split in ("train", "eval"):
        rows = [json.loads(line) for line in instructions_path(split).read_text(encoding="utf-8").splitlines()]
        for inside in (True, False):
            own = [row for row in rows if (row["task"] in ("facts", "arithmetic")) == inside]
            path = sides[split, inside] = tmp_path / f"{split}-{inside}.jsonl"
            path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in own), encoding="utf-8")
    records = build_refusals(sides["train", True], sides["train", False], share=0.3, answers=OWN)
    write_records(tmp_path / "train.jsonl", records)
    asked = build_refusals(sides["eval", True], sides["eval", False], share=0.3, answers=OWN)
    write_records(tmp_path / "eval.jsonl", asked)
    config = make_config(
        {"model": "tiny-llama", "data": str(tmp_path / "train.jsonl"), "method": "lora", "r": 8, "learning_rate": 4e-3,
         "steps": 250, "batch_size": 16, "threads": 1, "output_dir": str(tmp_path / "run")}
    )  # fmt: skip
    items: list[Item] = []

    def ask(setup: Setup) -> None:
        questions = read_questions(tmp_path / "eval.jsonl")
        found = answer_questions(setup.adapters, setup.renderer, questions, ["lora"])["lora"]
        for number, one in enumerate(found):
            right = float(one.correct)
            items.append(Item("lora", "domain", str(number), {"exact": right}, one.text, one.question.reference))

    train(config, on_trained=ask)
    phrases = [text for texts in OWN.values() for text in texts]
    told = detection(items, phrases)
    right = [item.scores["exact"] for item in items if not detection([item], phrases).expected]
    print(told, told.precision, told.recall, sum(right) / len(right))
    assert told.expected > 30
    assert told.precision is not None
    assert told.precision > 0.95
    assert told.recall is not None
    assert told.recall > 0.95
    assert sum(right) / len(right) > 0.8, "and it still answers inside"
