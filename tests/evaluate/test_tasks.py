"""Tasks as files: what they ask, and what is refused before a model is loaded."""

from __future__ import annotations

import csv
import io
import os
import zipfile
from pathlib import Path
from typing import Any

import pytest
from tests.evaluate.asked import CHOICES, TEXTS, WRITING, rows, task

from weft.errors import UserError
from weft.evaluate.tasks import TaskSettings, find_tasks, task_names
from weft.evaluate.tasks.extraction import extracted
from weft.evaluate.tasks.settings import Extraction

SHARED = Path(os.environ.get("WEFT_SHARED_DATA", Path(__file__).parents[3] / "shared" / "data"))
needs_data = pytest.mark.skipif(not SHARED.is_dir(), reason=f"the data at {SHARED} is not there")


def test_all_built_in_tasks_can_be_read() -> None:
    assert task_names() == ("ceval", "cmmlu", "embedded", "gsm8k", "ifeval", "mmlu", "mt_bench")
    for name in task_names():
        assert find_tasks([name])[0].settings.name == name


@pytest.mark.parametrize(("settings", "said"), [
    ({**WRITING, "metrics": ["exact_mach"]}, r"metric is 'exact_mach'.*Did you mean 'exact_match'"),
    ({**WRITING, "promt": "x"}, r"unknown key 'promt'. Did you mean 'prompt'"),
    ({**WRITING, "few_shot": {"cont": 1}}, r"few_shot: unknown key 'cont'. Did you mean 'count'"),
    ({**WRITING, "kind": "generate"}, r"kind: expected one of .*Did you mean 'generation'"),
    ({**WRITING, "metrics": []}, r"name at least one"),
    ({**WRITING, "metrics": ["acc"]}, r"acc is for multiple_choice, and this task is generation"),
    ({**WRITING, "reference": None}, r"exact_match compares with 'reference', which is missing"),
    ({**WRITING, "prompt": "{{ question }}"}, r"no record of .* has a field 'question'"),
    ({**WRITING, "prompt": "{{ q "}, r"prompt: this is no template"),
    ({**WRITING, "prompt": "{{ q.x.y }}"}, r"sums\.jsonl:1: task sums: prompt fails"),
    ({**WRITING, "extract": {"regex": "("}}, r"is no regular expression"),
    ({**WRITING, "metrics": [{"metric": "exact_match", "ignor": []}]}, r"unknown key 'ignor'. Did you mean 'ignore'"),
    ({**WRITING, "metrics": ["f1", "f1"]}, r"'f1' stands twice"),
    ({**CHOICES, "choices": None}, r"'choices' is missing"),
    ({**CHOICES, "stop": ["x"]}, r"'stop' means nothing in a task of kind multiple_choice"),
    ({**TEXTS, "metrics": ["perplexitty"]}, r"Did you mean 'perplexity'"),
    ({**WRITING, "system": "x", "apply_chat_template": False}, r"'system' needs apply_chat_template: true"),
])  # fmt: skip
def test_a_wrong_file_is_refused_by_its_key(settings: dict[str, Any], said: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=said):
        task(tmp_path, settings)


@pytest.mark.parametrize(("changes", "said"), [
    ({"gold": ""}, r"animals\.jsonl:2: the record has no answer"),
    ({"gold": "a horse"}, r"jsonl:2: the answer 'a horse' is none of the choices"),
    ({"gold": 4}, r"jsonl:2: the answer '4' is none of the choices.*0 to 3.*A to D"),
    ({"choices": ["a", "b"], "gold": 0}, r"different numbers of choices: 2 at .*jsonl:2, 4 at .*jsonl:1"),
    ({"choices": ["a"], "gold": 0}, r"jsonl:2: choice 2 is empty or missing"),
    ({"choices": "a, b"}, r"jsonl:2: the field 'choices' must be a list"),
    ({"q": " "}, r"jsonl:2: the question is empty"),
])  # fmt: skip
def test_a_record_that_cannot_be_asked_is_refused_by_its_line(
    changes: dict[str, Any], said: str, tmp_path: Path
) -> None:
    records = rows(3)
    records[1] |= changes
    with pytest.raises(UserError, match=said):
        task(tmp_path, CHOICES, records)


def test_the_right_choice_is_named_by_its_text_its_number_or_its_letter(tmp_path: Path) -> None:
    records = [{**row, "gold": gold} for row, gold in zip(rows(4), ["rain", 1, "D", "(a)"], strict=True)]
    assert [one.right for one in task(tmp_path, CHOICES, records).exercises] == [2, 1, 3, 0]


def test_questions_may_have_different_counts_if_the_file_says_so(tmp_path: Path) -> None:
    records = rows(2)
    records[1] |= {"choices": ["a", "b"]}
    made = task(tmp_path, {**CHOICES, "different_counts": True}, records)
    assert [len(one.choices) for one in made.exercises] == [4, 2]


def test_an_unknown_task_is_named_with_the_nearest() -> None:
    with pytest.raises(UserError, match=r"there is no task 'gsm8'. Did you mean 'gsm8k'"):
        find_tasks(["gsm8"])
    with pytest.raises(UserError, match=r"there is no task file nowhere\.yaml"):
        find_tasks(["nowhere.yaml"])
    with pytest.raises(UserError, match="task gsm8k has no data of its own"):
        find_tasks(["gsm8k"])[0].check()
    with pytest.raises(UserError, match="two tasks called 'embedded'"):
        find_tasks(["embedded", "embedded"])
    with pytest.raises(UserError, match="not clear which task"):
        find_tasks(["gsm8k", "mmlu"], data="somewhere")


def test_examples_come_from_where_the_file_says(tmp_path: Path) -> None:
    settings = {**WRITING, "few_shot": {"count": 2, "data": "same"}}
    made = task(tmp_path, settings)
    first, last = made.exercises[0], made.exercises[-1]
    # A question is never its own example.
    assert [one.item for one in made.frame(first).examples] == ["2", "3"]
    assert [one.item for one in made.frame(last).examples] == ["1", "2"]
    drawn = task(tmp_path, {**settings, "few_shot": {"count": 2, "data": "same", "pick": "random"}}, seed=1)
    found = {tuple(one.item for one in drawn.frame(exercise).examples) for exercise in drawn.exercises}
    assert len(found) > 2
    assert task(tmp_path, settings, num_fewshot=0).frame(first).examples == ()
    with pytest.raises(UserError, match="9 examples are wanted, and there are 5"):
        task(tmp_path, settings, num_fewshot=9)
    with pytest.raises(UserError, match="--fewshot-data"):
        task(tmp_path, WRITING, num_fewshot=1)


def mmlu_like(path: Path, subjects: dict[str, int]) -> Path:
    """A zip with the folders of MMLU, and questions of the made-up subjects."""
    with zipfile.ZipFile(path, "w") as archive:
        for split, extra in (("test", 0), ("dev", 2)):
            for subject, count in subjects.items():
                file = io.StringIO()
                csv.writer(file).writerows(
                    [f"{subject} {split} {n}, is it?", "w", "x", "y", "z", "ABCD"[n % 4]] for n in range(count + extra)
                )
                archive.writestr(f"data/{split}/{subject}_{split}.csv", file.getvalue())
        archive.writestr("data/README.txt", "nothing")
    return path


def test_mmlu_is_read_from_its_zip_with_examples_of_the_subject(tmp_path: Path) -> None:
    path = mmlu_like(tmp_path / "mmlu.zip", {"art_history": 3, "law": 5})
    made = find_tasks([f"mmlu={path}"])[0].load(num_fewshot=2)
    assert [one.item for one in made.exercises[:4]] == [
        "art_history_test:1", "art_history_test:2", "art_history_test:3", "law_test:1"
    ]  # fmt: skip
    assert made.exercises[3].source == f"{path}/data/test/law_test.csv:1"
    frame = made.frame(made.exercises[3])
    assert [one.prompts[0].splitlines()[0] for one in frame.examples] == ["law dev 0, is it?", "law dev 1, is it?"]
    assert frame.instruction.endswith("about law.")
    # Of groups the first of each come in turn.
    assert [one.item for one in made.limited(3)] == ["art_history_test:1", "art_history_test:2", "law_test:1"]


def test_ceval_and_cmmlu_are_read_by_their_columns(tmp_path: Path) -> None:
    for split in ("val", "dev", "test"):
        (tmp_path / split).mkdir()
    (tmp_path / "val" / "law_val.csv").write_text("id,question,A,B,C,D,answer\n0,问,甲,乙,丙,丁,B\n", encoding="utf-8")
    (tmp_path / "dev" / "law_dev.csv").write_text(
        "id,question,A,B,C,D,answer,explanation\n0,例,甲,乙,丙,丁,C,因为\n", encoding="utf-8")  # fmt: skip
    ceval = find_tasks([f"ceval={tmp_path}"])[0].load(num_fewshot=1)
    assert ceval.exercises[0].prompts == ("问\nA. 甲\nB. 乙\nC. 丙\nD. 丁\n答案：",)
    assert (ceval.exercises[0].right, ceval.frame(ceval.exercises[0]).examples[0].answer) == (1, "C")
    # CMMLU writes its columns with capitals.
    (tmp_path / "test" / "law.csv").write_text(",Question,A,B,C,D,Answer\n0,问,甲,乙,丙,丁,D\n", encoding="utf-8")
    assert find_tasks([f"cmmlu={tmp_path}"])[0].load(num_fewshot=0).exercises[0].right == 3
    # The part of C-Eval that was published without answers.
    (tmp_path / "val" / "law_val.csv").write_text("id,question,A,B,C,D,answer\n0,问,甲,乙,丙,丁,\n", encoding="utf-8")
    with pytest.raises(UserError, match=r"law_val\.csv:2: the record has no answer"):
        find_tasks([f"ceval={tmp_path}"])[0].load(num_fewshot=0)


def test_an_archive_that_points_out_of_its_folder_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bad.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("../test/x_test.csv", "q,a,b,c,d,A\n")
    with pytest.raises(UserError, match="points out of its folder"):
        find_tasks([f"mmlu={path}"])[0].load(num_fewshot=0)
    path.write_bytes(b"PK\x03\x04 torn")
    with pytest.raises(UserError, match="cannot be read as a zip archive"):
        find_tasks([f"mmlu={path}"])[0].load(num_fewshot=0)


@needs_data
def test_the_published_files_are_read() -> None:
    folder = SHARED / "evaluation"
    words = ["gsm8k", "ifeval", "mt_bench"]
    files = ["gsm8k_test.jsonl", "ifeval_input_data.jsonl", "mt_bench_question.jsonl"]
    examples = [f"gsm8k={SHARED / 'sft' / 'gsm8k_train.jsonl'}"]
    named = find_tasks([f"{word}={folder / file}" for word, file in zip(words, files, strict=True)],
                       fewshot_data=examples)  # fmt: skip
    made = [one.load() for one in named]
    assert [len(one.exercises) for one in made] == [1319, 540, 80]
    assert made[0].exercises[0].references[0].endswith("#### 18")
    assert len(made[0].frame(made[0].exercises[0]).examples) == 5
    assert len(made[2].exercises[0].prompts) == 2


@pytest.mark.parametrize(("text", "how", "found"), [
    (" a\nb ", "whole", "a\nb"), ("\n a\nb", "first_line", "a"), ("", "first_line", None),
    ("5 and $1,234.5 in all.", "last_number", "$1,234.5"), ("none", "last_number", None), ("x -3", "last_number", "-3"),
    ('Here: {"a": "}", "b": [1]} so', "json", '{"a": "}", "b": [1]}'), ("[1, 2", "json", None), ("no", "json", None),
    (r'{"a": "\"}"} x', "json", r'{"a": "\"}"}'),
    ("#### 1\n#### 2", Extraction(regex=r"#### (\d)"), "1"),
    ("#### 1\n#### 2", Extraction(regex=r"#### (\d)", take="last"), "2"),
    ("x", Extraction(regex=r"\d"), None), ("a7", Extraction(regex=r"\d"), "7"),
])  # fmt: skip
def test_answers_are_taken_out(text: str, how: Any, found: str | None) -> None:
    assert extracted(text, how) == found


def test_the_hash_of_a_task_is_that_of_what_it_asks(tmp_path: Path) -> None:
    made = task(tmp_path, CHOICES)
    assert task(tmp_path, CHOICES).data_hash == made.data_hash
    records = rows()
    records[3] |= {"gold": 0}
    assert task(tmp_path, CHOICES, records).data_hash != made.data_hash
    assert isinstance(made.settings, TaskSettings)
