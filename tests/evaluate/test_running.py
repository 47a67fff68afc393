"""An evaluation: all contestants together, the same as each alone, kept, and never computed again."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tests.evaluate.asked import CHOICES, TEXTS, WRITING, opened, rows, task

from weft.assets import instructions_path
from weft.errors import UserError
from weft.evaluate.encoding import encode, prefix_token, split
from weft.evaluate.entrants import Entrant, entrants_of
from weft.evaluate.exact_match import answer_questions, exact_match, read_questions
from weft.evaluate.items_file import ItemsFile
from weft.evaluate.panel import Panel
from weft.evaluate.results import Results
from weft.evaluate.running import EvaluationSettings, evaluate_entrants, evaluate_target
from weft.evaluate.scoring import score, score_texts
from weft.evaluate.tasks import Exercise, Frame, Task, find_tasks
from weft.generation.target import Target

# Log-probabilities of some tens of units in float32, from other batches.
LIMIT = 1e-3


@pytest.fixture(scope="module")
def target() -> Iterator[Target]:
    with opened(lora=0.05, prefix=3.0) as made:
        yield made


def value(results: Results, contestant: str, task_name: str, metric: str) -> float:
    (found,) = [
        one.value for one in results.scores
        if (one.contestant, one.task, one.metric) == (contestant, task_name, metric)
    ]  # fmt: skip
    return found


def answers_of(results: Results) -> dict[tuple[str, str, str], tuple[str, dict[str, float]]]:
    return {(one.contestant, one.task, one.item): (one.output, dict(one.scores)) for one in results.items}


def test_the_embedded_task_is_that_of_exact_match(target: Target) -> None:
    made = find_tasks(["embedded"])[0].load()
    results = evaluate_target(target, [made], EvaluationSettings(limit=30))
    questions = read_questions(instructions_path("eval"), limit=30)
    theirs = answer_questions(target.adapters, target.renderer, questions, [None, "lora", "prefix"])
    for name, answers in theirs.items():
        assert value(results, name or "base", "embedded", "exact_match") == exact_match(answers)
        said = [one.output.strip() for one in results.items if one.contestant == (name or "base")]
        assert said == [answer.text for answer in answers]
    assert len({tuple(one.text for one in answers) for answers in theirs.values()}) == 3


def test_together_is_as_each_alone(target: Target, tmp_path: Path) -> None:
    tasks = [task(tmp_path, settings) for settings in (CHOICES, WRITING, TEXTS)]
    together = evaluate_target(target, tasks)
    for name in ("base", "lora", "prefix"):
        alone = evaluate_target(target, tasks, names=[name])
        mine = {key: one for key, one in answers_of(together).items() if key[0] == name}
        theirs = answers_of(alone)
        assert mine.keys() == theirs.keys()
        for key, (text, scores) in mine.items():
            assert text == theirs[key][0]
            assert scores == pytest.approx(theirs[key][1], abs=LIMIT)
        for one in alone.scores:
            assert value(together, name, one.task, one.metric) == pytest.approx(one.value, rel=LIMIT)


def test_choices_and_texts_have_the_log_probabilities_of_scoring(target: Target, tmp_path: Path) -> None:
    settings = {**CHOICES, "few_shot": {"count": 2, "data": "same"}, "instruction": "Say what it is."}
    made, texts = task(tmp_path, settings), task(tmp_path, TEXTS)
    results = evaluate_target(target, [made, texts], names=["lora"])
    tokenizer, words = target.renderer.tokenizer, rows()[0]["choices"]
    # The first question after two others with their answers, by lm_eval's delimiters.
    before = "\n\n".join(f"{row['q']} {words[row['gold']]}" for row in rows()[1:3])
    asked = [split(tokenizer, f"Say what it is.\n\n{before}\n\n{rows()[0]['q']}", f" {word}") for word in words]
    logprobs = [one.logprob for one in score(target.adapters, {"lora": asked})["lora"]]
    best = words[max(range(4), key=lambda n: logprobs[n])]
    assert next(one.output for one in results.items if one.task == "animals") == best
    ids = [encode(tokenizer, row["q"], special=False) for row in rows()]
    total = sum(score_texts(target.adapters, {"lora": ids}, prefix_token(tokenizer))["lora"])
    size = sum(len(row["q"].encode()) for row in rows())
    bits = torch.tensor(2.0).log().item()
    assert value(results, "lora", "texts", "bits_per_byte") == pytest.approx(-total / bits / size, rel=1e-5)


def test_a_chat_template_and_examples_make_a_conversation(target: Target, tmp_path: Path) -> None:
    settings = {
        **WRITING, "few_shot": {"count": 1, "data": "same"}, "instruction": "Answer.", "system": "You are brief.",
    }  # fmt: skip
    made = task(tmp_path, settings)
    results = evaluate_target(target, [made], EvaluationSettings(limit=1), names=["base"])
    records = rows()
    turns = [
        {"role": "system", "content": "You are brief."}, {"role": "user", "content": f"Answer.\n\n{records[1]['q']}"},
        {"role": "assistant", "content": str(records[1]["gold"])}, {"role": "user", "content": records[0]["q"]},
    ]  # fmt: skip
    assert results.items[0].prompt_tokens == len(target.prompt_ids(turns))


def test_a_second_call_computes_nothing_and_a_cut_one_goes_on(
    target: Target, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks = [task(tmp_path, settings) for settings in (WRITING, CHOICES)]
    folder = tmp_path / "results"
    written: list[int] = []
    add = ItemsFile.add

    def cut(file: ItemsFile, item: Any) -> None:
        add(file, item)
        written.append(1)
        if len(written) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(ItemsFile, "add", cut)
    with pytest.raises(KeyboardInterrupt):
        evaluate_target(target, tasks, folder=folder)
    assert len((folder / "items.jsonl").read_text().splitlines()) == 5
    assert not (folder / "summary.json").exists()
    monkeypatch.setattr(ItemsFile, "add", add)
    first = evaluate_target(target, tasks, folder=folder)
    whole = evaluate_target(target, tasks)
    # What was paid for before the cut is not paid again.
    assert 0 < int(str(first.facts["tokens_written"])) < int(str(whole.facts["tokens_written"]))
    again = evaluate_target(target, tasks, folder=folder)
    assert (again.facts["tokens_read"], again.facts["tokens_written"]) == (0, 0)
    assert answers_of(first) == answers_of(again) == answers_of(whole)
    assert answers_of(Results.read(folder)) == answers_of(whole)
    # More items of the same task: only the new ones are asked.
    fewer = evaluate_target(target, tasks, EvaluationSettings(limit=2), folder=tmp_path / "few")
    more = evaluate_target(target, tasks, EvaluationSettings(limit=3), folder=tmp_path / "few")
    assert len(fewer.items) == 2 * 2 * 3
    assert int(str(more.facts["tokens_written"])) < int(str(whole.facts["tokens_written"])) / 2


def test_another_adapter_under_the_same_name_never_answers_from_old_state(tmp_path: Path) -> None:
    made, folder = task(tmp_path, WRITING), tmp_path / "results"
    with opened(lora=0.05) as first:
        old = evaluate_target(first, [made], folder=folder)
    with opened(lora=0.2) as second:
        new = evaluate_target(second, [made], folder=folder)
        fresh = evaluate_target(second, [made])
    assert answers_of(new) == answers_of(fresh) != answers_of(old)
    marks = [{one.name: one.facts["mark"] for one in results.contestants} for results in (old, new)]
    assert marks[0]["base"] == marks[1]["base"]
    assert marks[0]["lora"] != marks[1]["lora"]
    # The base's answers were taken from what was kept, and only the adapter's were computed.
    assert new.facts["tokens_read"] == sum(one.prompt_tokens for one in new.items if one.contestant == "lora")


def test_a_changed_answer_in_the_data_changes_the_figure_and_nothing_is_asked_again(
    target: Target, tmp_path: Path
) -> None:
    folder = tmp_path / "results"
    before = evaluate_target(target, [task(tmp_path, WRITING)], folder=folder, names=["base"])
    records = rows()
    records[0]["gold"] = before.items[0].output
    after = evaluate_target(target, [task(tmp_path, WRITING, records)], folder=folder, names=["base"])
    assert value(before, "base", "sums", "exact_match") == 0
    assert value(after, "base", "sums", "exact_match") == pytest.approx(1 / 6)
    assert after.facts["tokens_written"] == 0
    assert before.tasks[0].facts["data_sha256"] != after.tasks[0].facts["data_sha256"]


def test_an_adapter_that_changes_nothing_is_told(tmp_path: Path) -> None:
    with opened(lora=0.0, prefix=0.3) as made:
        results = evaluate_target(made, [task(tmp_path, WRITING)])
    changes = {one.name: one.facts.get("largest_change") for one in results.contestants}
    assert changes["base"] is None
    assert changes["lora"] == 0
    assert float(str(changes["prefix"])) > 0.01
    facts = {one.name: one.facts for one in results.contestants}
    assert facts["lora"]["method"] == "lora"
    assert facts["lora"]["bytes"] == 4 * int(str(facts["lora"]["trainable_parameters"]))
    assert facts["prefix"]["prompt_tokens"] == sum(
        one.prompt_tokens for one in results.items if one.contestant == "prefix")  # fmt: skip


def test_the_largest_change_is_that_of_the_logits(target: Target, tmp_path: Path) -> None:
    results = evaluate_target(target, [task(tmp_path, {**CHOICES, "name": "one"}, rows(1))], names=["base", "lora"])
    ids = encode(target.renderer.tokenizer, rows()[0]["q"])
    from weft.core.stream import Part

    with torch.no_grad():
        logits = []
        for name in (None, "lora"):
            stream, hidden = target.adapters.run([Part(name, [ids])])
            logits.append(target.adapters.logits(hidden[stream.rows[0][-1]][None], [(name, 1)]))
    change = (logits[1] - logits[0]).abs().max().item()
    assert results.contestants[1].facts["largest_change"] == pytest.approx(change, abs=LIMIT)


def test_turns_are_asked_one_after_the_other(target: Target, tmp_path: Path) -> None:
    settings = {
        "name": "talk", "kind": "generation", "turns": "turns", "max_new_tokens": 4, "metrics": ["length"],
    }  # fmt: skip
    made = task(tmp_path, settings, [{"turns": ["What is it?", "And why?"]}, {"turns": ["Who?"]}])
    results = evaluate_target(target, [made], names=["base"])
    assert [one.item for one in results.items] == ["1/1", "1/2", "2/1"]
    first, second, _ = results.items
    assert second.asked == "And why?"
    turns = [{"role": "user", "content": "What is it?"}, {"role": "assistant", "content": first.output},
             {"role": "user", "content": "And why?"}]  # fmt: skip
    assert second.prompt_tokens == len(target.prompt_ids(turns))
    assert first.scores == {"length": len(first.output.strip())}


def test_an_entrant_may_be_asked_in_another_way(target: Target, tmp_path: Path) -> None:
    """The seam of prompting baselines: the base, with other words around the question."""

    def with_instruction(task: Task, exercise: Exercise) -> Frame:
        return Frame(task.frame(exercise).examples, instruction="Say 3.")

    made = task(tmp_path, WRITING)
    entrants = [*entrants_of(target, ["base"]), Entrant("told", None, "prompt", frame=with_instruction)]
    results = evaluate_entrants(target, entrants, [made])
    read = {
        name: sum(one.prompt_tokens for one in results.items if one.contestant == name) for name in ("base", "told")
    }
    assert read["told"] > read["base"]
    assert [one.kind for one in results.contestants] == ["base", "prompt"]
    with pytest.raises(UserError, match="two contestants are called 'base'"):
        evaluate_entrants(target, [entrants[0], entrants[0]], [made])


def test_what_does_not_fit_is_refused_before_anything_is_computed(target: Target, tmp_path: Path) -> None:
    limit = target.adapters.architecture.max_length
    assert limit is not None
    records = rows(4)
    records[2]["q"] = "word " * limit
    for settings in (WRITING, CHOICES):
        made = task(tmp_path, settings, records)
        with pytest.raises(UserError, match=rf"{made.name}\.jsonl:3: .*reads {limit:,} at once"):
            evaluate_target(target, [made], folder=tmp_path / "results")
        assert not (tmp_path / "results" / "items.jsonl").exists()
    long = task(tmp_path, {**WRITING, "few_shot": {"count": 3, "data": "same"}}, records)
    with pytest.raises(UserError, match=r"with 3 examples takes .*--num-fewshot"):
        evaluate_target(target, [long])


def test_a_base_without_a_template_is_not_asked_through_one(tmp_path: Path) -> None:
    with opened(lora=0.1) as made:
        template = replace(made.renderer.template, origin="fallback")
        made.renderer.template = template
        with pytest.raises(UserError, match="task sums asks through the chat template"):
            evaluate_target(made, [task(tmp_path, WRITING)])
        plain = task(tmp_path, {**WRITING, "apply_chat_template": False})
        assert len(evaluate_target(made, [plain]).items) == 12


def test_nobody_classifies_where_all_write(target: Target, tmp_path: Path) -> None:
    settings = {"name": "classes", "kind": "classification", "reference": "{{ gold }}", "metrics": ["accuracy"]}
    with pytest.raises(UserError, match="nobody can answer task classes"):
        evaluate_target(target, [task(tmp_path, settings)])


def test_a_folder_with_other_files_is_left_alone(target: Target, tmp_path: Path) -> None:
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    with pytest.raises(UserError, match=r"holds other files \(dear\.txt\)"):
        evaluate_target(target, [task(tmp_path, WRITING)], folder=tmp_path / "letters")


def test_a_kept_answer_that_is_damaged_is_named(target: Target, tmp_path: Path) -> None:
    folder = tmp_path / "answers"
    panel = Panel(target, ["lora"], folder=folder)
    (folder / f"{panel.marks['lora']}.jsonl").write_text(json.dumps({"key": 1}) + "\n")
    with pytest.raises(UserError, match="this is no kept answer"):
        Panel(target, ["lora"], folder=folder)
