"""lm_eval's tasks on Weft's engine beside lm_eval's own model of transformers, item by item.

The tasks lie in files of the test, so that nothing is downloaded; some have real questions, where those are at hand.
"""

from __future__ import annotations

import csv
import io
import json
import os
import sys
import zipfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.conftest import make_tokenizer
from transformers import T5Config, T5ForConditionalGeneration

from weft.assets import instructions_path, model_path
from weft.errors import UserError
from weft.evaluate import together
from weft.evaluate.harness import HarnessSettings, find_tasks, run_harness
from weft.evaluate.results import Results
from weft.evaluate.together import Together, generation_settings
from weft.generation.open import open_target
from weft.generation.sampling import Sampling
from weft.generation.target import Target

pytest.importorskip("lm_eval", reason='lm_eval is not installed: pip install "weft[harness]"')

SHARED = Path(os.environ.get("WEFT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
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


def by_transformers(model: str, tasks: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
    """What lm_eval finds with its own model."""
    from lm_eval import simple_evaluate
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    theirs = HFLM(pretrained=model, dtype="float32", device="cpu", batch_size=4)
    manager = TaskManager(include_defaults=False)
    more |= {"task_manager": manager, "bootstrap_iters": 10}
    found: dict[str, Any] = simple_evaluate(model=theirs, tasks=list(tasks), **more)
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
    assert seen >= sum(task in theirs["samples"] for task, _ in own)
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
    check_equal(ours, by_transformers(str(model_path("tiny-llama")), tasks))
    ours.write(tmp_path)
    assert Results.read(tmp_path) == ours
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


def test_a_chat_template_is_applied_as_lm_eval_applies_it(tmp_path: Path) -> None:
    tasks = [animals(tmp_path), instructions(tmp_path)]
    settings = HarnessSettings(bootstrap=10, chat_template=True, system="Be brief.")
    with open_target("tiny-llama") as target:
        ours = run_harness(target, [None], find_tasks(tasks, settings))
        history = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b c "}]
        prefilled = Together(target, [None]).chat(history, generation=False)
    more = {"apply_chat_template": True, "system_instruction": "Be brief.", "fewshot_as_multiturn": True}
    check_equal(ours, by_transformers(str(model_path("tiny-llama")), tasks, **more))
    assert prefilled.endswith("b c")
    assert ours.tasks[0].facts["chat_template"] is True


def test_an_encoder_decoder_is_scored_as_lm_eval_scores_it(tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    model = T5ForConditionalGeneration(T5Config(
        vocab_size=len(tokenizer), d_model=32, d_kv=8, d_ff=40, num_layers=2, num_heads=4, decoder_start_token_id=0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    ))  # fmt: skip
    model.save_pretrained(tmp_path / "t5")
    tokenizer.save_pretrained(tmp_path / "t5")
    choosing, writing = animals(tmp_path), instructions(tmp_path)
    with open_target(str(tmp_path / "t5"), dtype="float32") as target:
        ours = run_harness(target, [None], find_tasks([choosing, writing], HarnessSettings(bootstrap=10)))
    theirs = by_transformers(str(tmp_path / "t5"), [choosing, writing])
    # lm_eval adds the length of the question to the limit of an encoder-decoder's answer.
    for sample in theirs["samples"].pop("instructions"):
        answer = items_of(ours)["instructions", str(sample["doc_id"])].output
        assert answer
        assert sample["resps"][0][0].startswith(answer)
    del theirs["results"]["instructions"]
    check_equal(ours, theirs)


def test_contestants_answer_together_and_as_each_alone(
    tmp_path: Path, opened: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    made = [animals(tmp_path), stories(tmp_path), instructions(tmp_path)]
    tasks = find_tasks(made, HarnessSettings(bootstrap=10, num_fewshot=1))
    names: list[str | None] = [None, *opened.adapters.names]
    asked: list[set[str | None]] = []
    scored = together.score

    def noted(adapters: Any, wanted: Mapping[str | None, Any], **more: Any) -> Any:
        asked.append(set(wanted))
        return scored(adapters, wanted, **more)

    monkeypatch.setattr(together, "score", noted)
    ours = run_harness(opened, names, tasks)
    assert asked == [set(names)]  # nobody is asked again
    assert [one.name for one in ours.contestants] == ["base", "lora", "prompt_tuning", "prefix_tuning"]
    for name in names:
        alone = items_of(run_harness(opened, [name], tasks), name or "base")
        assert alone.keys() == items_of(ours, name or "base").keys()
        for key, item in items_of(ours, name or "base").items():
            assert key[0] != "instructions" or item.output == alone[key].output
            assert item.scores == pytest.approx(alone[key].scores, rel=1e-4)
    assert len({str([one.scores for one in items_of(ours, one.name).values()]) for one in ours.contestants}) == 4
    shots = {one.name: one.facts["num_fewshot"] for one in ours.tasks}
    assert shots == {"animals": 1, "stories": 1, "instructions": 1}


def test_answers_are_kept_and_an_adapter_that_changed_answers_anew(
    tmp_path: Path, opened: Target, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks, kept = find_tasks(made_up(tmp_path), HarnessSettings(bootstrap=10)), tmp_path / "answers"
    names: list[str | None] = [None, "lora", "prefix_tuning"]
    first = run_harness(opened, names, tasks, answers=kept)
    files = {path.name: path.stat().st_size for path in kept.iterdir()}
    assert len(files) == 3
    asked: list[str | None] = []
    run, written = opened.adapters.run, Target.engine

    def noted(parts: Any) -> Any:
        asked.extend(part.adapter for part in parts)
        return run(parts)

    def engine(target: Target, *limits: Any) -> Any:
        asked.append("engine")
        return written(target, *limits)

    monkeypatch.setattr(opened.adapters, "run", noted)
    monkeypatch.setattr(Target, "engine", engine)
    again = run_harness(opened, names, tasks, answers=kept)
    assert asked == []
    assert again == first
    assert {path.name: path.stat().st_size for path in kept.iterdir()} == files
    kit.randomize(opened.adapters["lora"], 9, scale=0.5)
    changed = run_harness(opened, names, tasks, answers=kept)
    assert set(asked) == {"lora", "engine"}
    assert len(list(kept.iterdir())) == 4
    assert items_of(changed, "lora") != items_of(first, "lora")
    assert items_of(changed, "prefix_tuning") == items_of(first, "prefix_tuning")


def test_a_run_that_was_cut_goes_on(tmp_path: Path, opened: Target) -> None:
    tasks, kept = find_tasks([animals(tmp_path)], HarnessSettings(bootstrap=10)), tmp_path / "answers"
    whole = run_harness(opened, [None], tasks, answers=kept)
    (path,) = kept.iterdir()
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    done: list[tuple[int, int]] = []
    again = run_harness(opened, [None], tasks, answers=kept, on_progress=lambda _, *counts: done.append(counts))
    own = items_of(whole)
    for key, item in items_of(again).items():
        assert item.scores == pytest.approx(own[key].scores, rel=1e-4)  # in other passes, and so rounded otherwise
    assert 0 < len(done) == done[-1][1] < 12 * 8
    path.write_text("{}\n")
    with pytest.raises(UserError, match="1: this is no kept answer"):
        run_harness(opened, [None], tasks, answers=kept)


def test_lm_eval_can_drive_a_contestant_itself(tmp_path: Path, opened: Target) -> None:
    """As someone who writes a program around lm_eval does; contexts and continuations may be tokens."""
    from lm_eval import simple_evaluate
    from lm_eval.tasks import TaskManager

    from weft.evaluate.harness_model import WeftLM

    tasks = [animals(tmp_path)]
    model = WeftLM(Together(opened, ["lora"]), "lora")
    manager = TaskManager(include_defaults=False)
    found: dict[str, Any] = simple_evaluate(model=model, tasks=tasks, task_manager=manager, bootstrap_iters=10)
    ours = run_harness(opened, ["lora"], find_tasks(tasks, HarnessSettings(bootstrap=10)))
    (accuracy,) = [one.value for one in ours.scores if one.metric == "acc"]
    assert found["results"]["animals"]["acc,none"] == accuracy
    pair = ("Once upon a time", " there was")
    context, whole = (model.tok_encode(text) for text in (pair[0], "".join(pair)))
    (by_tokens,) = model._loglikelihood_tokens([(pair, context, whole[len(context) :])])
    assert by_tokens == pytest.approx(model.together.loglikelihoods("lora", [pair])[0])


def test_drawn_answers_differ_and_are_the_same_again(opened: Target) -> None:
    asked = [("Once upon a time", {"until": [], "do_sample": True, "temperature": 1.5, "max_gen_toks": 8})] * 3
    first = Together(opened, [None, "lora"]).texts(None, asked)
    assert len(set(first)) > 1
    assert Together(opened, [None]).texts(None, asked) == first


def test_settings_of_answers() -> None:
    found = generation_settings({"until": "x", "max_new_tokens": 7, "do_sample": True, "top_p": 0.5, "top_k": None}, 3)
    assert found == (7, ("x",), Sampling(1.0, 0, 0.5, seed=3))
    assert generation_settings({"temperature": 0.7, "do_sample": False}, 3) == (256, (), Sampling(seed=3))
    with pytest.raises(UserError, match=r"'num_beams'.*which Weft does not know"):
        generation_settings({"num_beams": 4}, 0)


def test_what_cannot_be_evaluated_is_named(tmp_path: Path, opened: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from lm_eval.tasks import TaskManager

    own = HarnessSettings(include=tmp_path)
    (tmp_path / "animals.yaml").write_text(json.dumps(animals(tmp_path)))  # JSON is YAML
    with monkeypatch.context() as patch:  # the index of lm_eval's own tasks takes seconds
        patch.setattr("lm_eval.tasks.TaskManager", partial(TaskManager, include_defaults=False))
        with pytest.raises(UserError, match=r"lm_eval has no task 'anmals'.*animals"):
            find_tasks(["anmals"], own)
        assert [*find_tasks(["animals"], own).load()["tasks"]] == ["animals"]
    with pytest.raises(UserError, match="is no folder"):
        find_tasks(["animals"], HarnessSettings(include=tmp_path / "none"))
    with pytest.raises(UserError, match="no task is named"):
        find_tasks([])
    missing = animals(tmp_path) | {"dataset_kwargs": {"data_files": {"test": str(tmp_path / "gone.jsonl")}}}
    with pytest.raises(UserError, match=r"cannot load animals: .*gone\.jsonl"):
        run_harness(opened, [None], find_tasks([missing]))
    with pytest.raises(UserError, match="no adapter named 'nobody'"):
        run_harness(opened, ["nobody"], find_tasks([animals(tmp_path)]), answers=tmp_path / "answers")
    long = instructions(tmp_path) | {"generation_kwargs": {"max_gen_toks": 5000}}
    with pytest.raises(UserError, match="leaves no room for the question"):
        run_harness(opened, [None], find_tasks([long]))
    monkeypatch.setattr(opened.renderer, "template", replace(opened.renderer.template, origin="fallback"))
    with pytest.raises(UserError, match="has no chat template"):
        run_harness(opened, [None], find_tasks([animals(tmp_path)], HarnessSettings(chat_template=True)))
    monkeypatch.setitem(sys.modules, "lm_eval.tasks", None)
    with pytest.raises(UserError, match=r'pip install "weft\[harness\]"'):
        find_tasks(["animals"])
