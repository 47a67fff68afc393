"""lm_eval's tasks on Weft's engine beside lm_eval's own model of transformers, item by item.

The tasks lie in files of the test, so that nothing is downloaded; some have real questions, where those are at hand.
"""

from __future__ import annotations

import csv
import io
import json
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit

from weft.assets import instructions_path
from weft.errors import UserError
from weft.evaluate.harness import HarnessSettings, find_tasks, run_harness
from weft.evaluate.results import Results
from weft.evaluate.together import Together, generation_settings
from weft.generation.open import open_target
from weft.generation.target import Target

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "weft[harness]"')

SHARED = Path(__file__).parents[3] / "shared" / "data"
# Of log-probabilities of tens of units in float32, by other kernels.
LIMIT = 1e-3


def write(folder: Path, name: str, rows: Sequence[Mapping[str, object]]) -> str:
    path = folder / f"{name}.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def config(name: str, output_type: str, files: dict[str, str], **more: Any) -> dict[str, Any]:
    """A task as lm_eval's files hold it."""
    splits = {f"{split}_split": split for split in files if split != "dev"} | (
        {"fewshot_split": "dev"} if "dev" in files else {}
    )
    return {
        "task": name, "dataset_path": "json", "dataset_kwargs": {"data_files": files}, "output_type": output_type,
        **splits, **more,
    }  # fmt: skip


def animals(folder: Path) -> dict[str, Any]:
    """Multiple choice with answers of several tokens, some of which are the beginning of others."""
    choices = ["a small dog", "a small", "a cat that sat on the mat", "rain"]
    rows = [{"q": f"Once upon a time there was {n}. It was", "choices": choices, "gold": n % 4} for n in range(12)]
    files = {"test": write(folder, "animals", rows), "dev": write(folder, "animals_dev", rows[:3])}
    metrics = [{"metric": metric} for metric in ("acc", "acc_norm", "acc_mutual_info", "brier_score")]
    return config(
        "animals", "multiple_choice", files, doc_to_text="{{q}}", doc_to_choice="choices", doc_to_target="gold",
        num_fewshot=2, metric_list=metrics, fewshot_config={"sampler": "default"},
    )  # fmt: skip


def mmlu(folder: Path, subject: str = "astronomy", count: int = 10) -> dict[str, Any]:
    """MMLU's questions as lm_eval asks them, with examples of the part for development."""
    with zipfile.ZipFile(SHARED / "evaluation" / "mmlu.zip") as archive:
        files = {}
        for split in ("dev", "test"):
            text = archive.read(f"data/{split}/{subject}_{split}.csv").decode()
            rows = [
                {"question": one[0].strip(), "choices": one[1:5], "answer": "ABCD".index(one[5])}
                for one in list(csv.reader(io.StringIO(text)))[: count if split == "test" else None]
            ]
            files[split] = write(folder, f"mmlu_{split}", rows)
    text = "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:"
    return config(
        "mmlu", "multiple_choice", files, doc_to_text=text, doc_to_choice=["A", "B", "C", "D"], doc_to_target="answer",
        num_fewshot=3, fewshot_config={"sampler": "first_n"}, metric_list=[{"metric": "acc"}],
    )  # fmt: skip


def gsm8k(folder: Path, count: int = 6, **more: Any) -> dict[str, Any]:
    """GSM8K with the two ways of lm_eval to find the number in an answer."""
    lines = (SHARED / "evaluation" / "gsm8k_test.jsonl").read_text().splitlines()[: count + 4]
    rows = [json.loads(line) for line in lines]
    files = {"test": write(folder, "gsm8k", rows[4:]), "dev": write(folder, "gsm8k_dev", rows[:4])}
    return config(
        "gsm8k", "generate_until", files,
        doc_to_text="Question: {{question}}\nAnswer:", doc_to_target="{{answer}}", num_fewshot=1,
        metric_list=[{"metric": "exact_match", "aggregation": "mean", "higher_is_better": True}],
        generation_kwargs={"until": ["Question:", "</s>", "\n\n"], "do_sample": False, "max_gen_toks": 48, **more},
        filter_list=[
            {"name": "strict-match", "filter": [
                {"function": "regex", "regex_pattern": "#### (\\-?[0-9\\.\\,]+)"}, {"function": "take_first"}]},
            {"name": "flexible-extract", "filter": [
                {"function": "regex", "group_select": -1, "regex_pattern": "(-?[$0-9.,]{2,})|(-?[0-9]+)"},
                {"function": "take_first"}]},
        ],
    )  # fmt: skip


def stories(folder: Path) -> dict[str, Any]:
    """Perplexity of texts, one of them longer than what the base reads at once."""
    line = "Once upon a time, there was a little girl named Lily. She loved to play outside in the park. "
    rows = [{"text": (line + f"She saw {n} birds. ") * length} for n, length in enumerate((1, 3, 40))]
    metrics = [{"metric": name} for name in ("word_perplexity", "byte_perplexity", "bits_per_byte")]
    return config(
        "stories", "loglikelihood_rolling", {"test": write(folder, "stories", rows)}, doc_to_text="",
        doc_to_target="{{text}}", metric_list=metrics,
    )  # fmt: skip


def last_words(folder: Path) -> dict[str, Any]:
    """The likelihood of the last word, and whether it is what greedy search writes."""
    rows = [{"text": f"Once upon a time there was a little {word}", "word": " girl"} for word in ("boy and a", "old")]
    files = {"test": write(folder, "last_words", rows)}
    return config(
        "last_words", "loglikelihood", files, doc_to_text="{{text}}", doc_to_target="{{word}}",
        metric_list=[{"metric": "perplexity"}, {"metric": "acc"}],
    )  # fmt: skip


def instructions(folder: Path) -> dict[str, Any]:
    """The embedded base's own questions, answered in text."""
    rows = [json.loads(line) for line in instructions_path("eval").read_text().splitlines()[:8]]
    files = {"test": write(folder, "instructions", [{"q": str(row)[:120], "a": "yes"} for row in rows])}
    return config(
        "instructions", "generate_until", files, doc_to_text="{{q}}", doc_to_target="{{a}}",
        generation_kwargs={"until": ["\n", "."], "max_gen_toks": 12}, metric_list=[{"metric": "exact_match"}],
    )  # fmt: skip


def made_up(folder: Path) -> list[dict[str, Any]]:
    return [animals(folder), stories(folder), last_words(folder), instructions(folder)]


def by_transformers(model: str, tasks: list[dict[str, Any]]) -> dict[str, Any]:
    """What lm_eval finds with its own model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=4)
    manager = TaskManager(include_defaults=False)
    found: dict[str, Any] = simple_evaluate(model=theirs, tasks=list(tasks), task_manager=manager, bootstrap_iters=10)
    return found


def items_of(found: Results, contestant: str = "base") -> dict[tuple[str, str], Any]:
    return {(one.task, one.item): one for one in found.items if one.contestant == contestant}


def check_equal(ours: Results, theirs: Mapping[str, Any]) -> None:
    """Every answer of every item, every score of every item, and every figure with its error."""
    own = items_of(ours)
    seen = 0
    for task, samples in theirs["samples"].items():
        for sample in samples:
            item = own[task, str(sample["doc_id"])]
            for metric in sample["metrics"]:
                name = metric if metric in item.scores else f"{metric},{sample['filter']}"
                value = sample[metric]
                if isinstance(value, (bool, int, float)):
                    assert item.scores[name] == pytest.approx(value, abs=LIMIT), (task, item.item, metric)
                seen += 1
            if isinstance(sample["resps"][0][0], str):
                assert item.output == sample["resps"][0][0]
    assert seen >= len(own)
    figures = {(one.task, one.metric): one for one in ours.scores}
    for task, found in theirs["results"].items():
        for key, value in found.items():
            metric, _, how = key.partition(",")
            if how and not metric.endswith("_stderr"):
                one = figures.get((task, metric)) or figures[task, f"{metric},{how}"]
                assert one.value == pytest.approx(value, rel=1e-4), (task, key)
                error = found.get(f"{metric}_stderr,{how}")
                if isinstance(error, float) and metric in ("acc", "acc_norm", "exact_match"):
                    assert one.stderr == pytest.approx(error, rel=1e-4, nan_ok=True)


@pytest.fixture(autouse=True)
def _offline(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))


@pytest.fixture
def opened() -> Iterator[Target]:
    with open_target("tiny-llama") as target:
        for index, method in enumerate(("lora", "prompt_tuning", "prefix_tuning")):
            kit.randomize(target.adapters.add(method, kit.method_config(method), seed=index), index, scale=0.3)
        yield target


def test_every_item_is_lm_evals_own(tmp_path: Path) -> None:
    tasks = made_up(tmp_path)
    with open_target("tiny-llama") as target:
        ours = run_harness(target, [None], find_tasks(tasks, HarnessSettings(bootstrap=10)))
    from weft.assets import model_path

    check_equal(ours, by_transformers(str(model_path("tiny-llama")), tasks))
    assert {one.kind for one in ours.tasks} == {"multiple_choice", "perplexity", "generation"}


@pytest.mark.skipif(not SHARED.is_dir(), reason="shared/data, with MMLU, GSM8K and stories260K, is not here")
def test_real_questions_are_answered_as_lm_eval_answers_them(tmp_path: Path) -> None:
    model = str(SHARED / "models" / "stories260K")
    tasks = [mmlu(tmp_path), gsm8k(tmp_path), stories(tmp_path), animals(tmp_path)]
    with open_target(model, dtype="float32") as target:
        ours = run_harness(target, [None], find_tasks(tasks, HarnessSettings(bootstrap=10)))
    check_equal(ours, by_transformers(model, tasks))
    assert {one.metric for one in ours.tasks if one.name == "gsm8k"} == {"exact_match,strict-match"}
    assert next(one for one in ours.contestants if one.name == "base").facts["cut_contexts"] > 0
