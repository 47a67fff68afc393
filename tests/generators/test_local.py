"""Our engine as a generator."""

from __future__ import annotations

from pathlib import Path

import pytest

from weft.errors import UserError
from weft.generation.open import open_target
from weft.generation.sampling import Sampling
from weft.generators import Budget, Failure, Generated, GeneratorRequest, Ledger
from weft.generators.local import LocalGenerator


def test_the_engine_answers_as_it_does_alone_and_the_ledger_keeps_it(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from weft.generation import Request

    asked = [
        GeneratorRequest(text, 2, sampling=Sampling(1.0, seed=3), max_tokens=6, keep_cut=True) for text in ("a", "b")
    ]
    with open_target(tiny_llama_dir) as target:
        with LocalGenerator(target, ledger=Ledger(tmp_path / "l.jsonl")) as generator:
            first = generator.generate_all(asked)
            model = generator.model
        with target.engine() as engine:
            alone = engine.generate([Request(target.prompt("a").ids, None, 6, sampling=Sampling(1.0, seed=3))])
        with LocalGenerator(target, ledger=Ledger(tmp_path / "l.jsonl")) as generator:
            again = generator.generate_all(asked)
    texts = [[one.text for one in row if isinstance(one, Generated)] for row in first]
    assert texts[0][0] == alone[0].text.strip()
    assert texts[0][0] != texts[0][1]
    assert [[one.text for one in row if isinstance(one, Generated)] for row in again] == texts
    assert all(isinstance(one, Generated) and one.cached for row in again for one in row)
    with open_target("tiny-llama") as other, LocalGenerator(other) as generator:
        assert generator.model != model


def test_the_engine_keeps_a_schema_and_a_budget(tiny_llama_dir: Path) -> None:
    schema = {
        "type": "object",
        "properties": {"a": {"enum": ["x", "y"]}},
        "required": ["a"],
        "additionalProperties": False,
    }
    with open_target(tiny_llama_dir) as target:
        with LocalGenerator(target) as generator:
            (found,) = generator.generate("hello", schema=schema, max_tokens=40)
            assert isinstance(found, Generated)
            assert found.text.replace(" ", "").replace("\n", "") in ('{"a":"x"}', '{"a":"y"}')
            worst = generator.worst_usage(GeneratorRequest("hello", max_tokens=5)).tokens
        budget = Budget(tokens=2 * worst)
        with LocalGenerator(target, budget=budget) as generator:
            asked = [GeneratorRequest("hello", max_tokens=5, keep_cut=True) for _ in range(4)]
            kinds = [type(one) for (one,) in generator.generate_all(asked)]
            assert kinds.count(Failure) >= 2
            assert generator.account.spent.tokens <= 2 * worst
        with pytest.raises(UserError, match="no adapter named"):
            LocalGenerator(target, "lora")
