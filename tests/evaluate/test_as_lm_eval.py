"""Weft's own tasks beside lm_eval's, item by item: the same prompts, answers and scores."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from tests import kit

from weft.evaluate import harness
from weft.evaluate.running import evaluate_target
from weft.evaluate.tasks import Task, find_tasks
from weft.generation.open import open_target

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "weft[harness]"')
SHARED = Path(os.environ.get("WEFT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
pytestmark = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the data at {SHARED} is not there")

# Of log-probabilities of tens of units in float32, by other batches.
LIMIT = 1e-3
TASKS: list[dict[str, Any]] = [
    {
        "name": "mmlu", "kind": "multiple_choice", "choices": ["A", "B", "C", "D"], "reference": "{{ answer }}",
        "prompt": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
        "few_shot": {"count": 3, "data": "mmlu_dev.jsonl"}, "metrics": ["acc"],
    },
    {
        "name": "animals", "kind": "multiple_choice", "choices": "choices", "reference": "{{ gold }}",
        "prompt": "{{ q }}", "metrics": ["acc", "acc_norm"],
    },
    {
        "name": "gsm8k", "kind": "generation", "prompt": "Question: {{question}}\nAnswer:", "reference": "{{ answer }}",
        "few_shot": {"count": 1, "data": "gsm8k_dev.jsonl"}, "apply_chat_template": False, "max_new_tokens": 48,
        "stop": ["Question:", "</s>", "\n\n"],
        "metrics": [
            {"metric": "exact_match", "name": "exact_match,strict-match",
             "extract": {"regex": "#### (\\-?[0-9\\.\\,]+)"}},
            {"metric": "exact_match", "name": "exact_match,flexible-extract",
             "extract": {"regex": "(-?[$0-9.,]{2,})|(-?[0-9]+)", "take": "last"}},
        ],
    },
    {
        "name": "stories", "kind": "perplexity", "text": "{{ text }}",
        "metrics": ["word_perplexity", "byte_perplexity", "bits_per_byte"],
    },
]  # fmt: skip


def own(folder: Path, settings: Mapping[str, Any]) -> Task:
    path = folder / f"{settings['name']}.yaml"
    file = next(one for name in (f"{settings['name']}_test", settings["name"])
                if (one := folder / f"{name}.jsonl").exists())  # fmt: skip
    path.write_text(yaml.safe_dump({**settings, "data": ".", "files": file.name}))
    return find_tasks([str(path)])[0].load()


def test_own_tasks_are_answered_and_scored_as_lm_evals(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets
    from tests.evaluate import test_harness as theirs

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    animals = {**theirs.animals(tmp_path), "num_fewshot": 0}
    gsm8k = {**theirs.gsm8k(tmp_path), "fewshot_config": {"sampler": "first_n"}}
    configs = [theirs.mmlu(tmp_path), animals, gsm8k, theirs.stories(tmp_path)]
    with open_target("tiny-llama") as target:
        kit.randomize(target.adapters.add("lora", kit.method_config("lora"), seed=1), 1, scale=0.3)
        object.__setattr__(target, "names", ("lora",))
        settings = harness.HarnessSettings(bootstrap=10)
        wanted = harness.run_harness(target, [None, "lora"], harness.find_tasks(configs, settings))
        found = evaluate_target(target, [own(tmp_path, one) for one in TASKS])
    for name in ("base", "lora"):
        mine = {(one.task, str(int(one.item) - 1)): one for one in found.items if one.contestant == name}
        checked = {(one.task, one.item): one for one in wanted.items if one.contestant == name}
        assert mine.keys() == checked.keys()
        for key, item in mine.items():
            assert item.scores == pytest.approx({m: checked[key].scores[m] for m in item.scores}, rel=LIMIT), key
            if key[0] == "gsm8k":
                # A character that was cut off in the middle is no part of an answer here.
                assert item.output == checked[key].output.rstrip("�")
    figures = {(one.contestant, one.task, one.metric): one for one in wanted.scores}
    assert len(found.scores) == 2 * 8
    for one in found.scores:
        other = figures[one.contestant, one.task, one.metric]
        assert one.value == pytest.approx(other.value, rel=LIMIT)
        if one.task in ("mmlu", "animals", "gsm8k"):
            assert one.stderr == pytest.approx(other.stderr, rel=LIMIT)
