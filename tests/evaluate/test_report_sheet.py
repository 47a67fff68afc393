"""Where a report's figures come from: folders that are found, contestants told apart, tasks joined or refused."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from tests.evaluate.made import FACTS, QUIZ, make_run, quiz_items, results, simple, write

from weft.errors import UserError
from weft.evaluate.report.comparison import compare
from weft.evaluate.report.sheet import lay_out
from weft.evaluate.report.sources import find_sources
from weft.evaluate.results import Contestant, Results, TaskRecord


def test_a_run_gives_all_its_evaluations(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write(run / "evaluation" / "a", simple())
    write(run / "evaluation" / "b", simple())
    cut = run / "evaluation" / "c"
    cut.mkdir()
    (cut / "items.jsonl").write_text("")
    (source,) = find_sources([run])
    assert [one.name for one in source.results] == ["a", "b"]
    assert source.run == run
    assert source.unfinished == (cut,)
    (inner,) = find_sources([run / "evaluation" / "a"])
    assert inner.run == run.resolve()


def test_what_is_no_folder_of_results_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not there"):
        find_sources([tmp_path / "nowhere"])
    with pytest.raises(UserError, match=r"neither the folder of a run \(run.json\) nor of results"):
        find_sources([tmp_path])
    write(tmp_path / "one", simple())
    with pytest.raises(UserError, match="named twice"):
        find_sources([tmp_path / "one", tmp_path / "one" / ".." / "one"])
    (tmp_path / "cut").mkdir()
    (tmp_path / "cut" / "items.jsonl").write_text("")
    with pytest.raises(UserError, match="was cut"):
        find_sources([tmp_path / "cut"])


def test_folders_of_one_name_are_told_apart_by_what_is_above_them(tmp_path: Path) -> None:
    for name in ("a", "b"):
        write(tmp_path / name / "evaluation", simple())
    found = find_sources([tmp_path / "a" / "evaluation", tmp_path / "b" / "evaluation"])
    assert [one.label for one in found] == ["a/evaluation", "b/evaluation"]


def test_names_that_both_have_are_told_apart_and_equal_bases_are_one(tmp_path: Path) -> None:
    write(tmp_path / "a", simple({"lora": range(5)}))
    write(tmp_path / "b", simple({"lora": range(50, 55), "ia3": [99]}))
    sheet = lay_out(find_sources([tmp_path / "a", tmp_path / "b"]))
    assert list(sheet.contestants) == ["base", "lora (a)", "lora (b)", "ia3"]
    assert sheet.answers["lora (a)", "quiz"]["0"].scores == {"acc": 0.0}
    assert sheet.answers["lora (b)", "quiz"]["0"].scores == {"acc": 1.0}
    assert {sheet.reference(name) for name in ("lora (a)", "lora (b)", "ia3")} == {"base"}
    assert sheet.reference("base") is None
    assert sheet.reference("base", "ia3") == "ia3"


def test_bases_that_answer_otherwise_are_told_apart_each_with_its_own_adapters(tmp_path: Path) -> None:
    write(tmp_path / "a", simple({"lora": [0]}))
    write(tmp_path / "b", simple({"ia3": [0]}, base=(1,) * 61 + (0,) * 39))
    sheet = lay_out(find_sources([tmp_path / "a", tmp_path / "b"]))
    assert sheet.bases() == ["base (a)", "base (b)"]
    assert sheet.reference("lora") == "base (a)"
    assert sheet.reference("ia3") == "base (b)"


@pytest.mark.parametrize(
    ("facts", "said"),
    [
        ({"sha256": "cc33"}, "sha256 is 'cc33' in b and 'aa11' in a"),
        ({"num_fewshot": 5}, "num_fewshot is 5 in b and 0 in a"),
        ({"template": "x"}, "template is 'x' in b and not told in a"),
        ({"config": {"data_files": "x", "split": "dev"}}, "config.split is 'dev' in b and not told in a"),
    ],
)
def test_a_task_of_other_content_is_not_compared(tmp_path: Path, facts: dict[str, object], said: str) -> None:
    same = TaskRecord("shared", "multiple_choice", "acc")
    for name, task in (("a", QUIZ), ("b", replace(QUIZ, facts={**QUIZ.facts, **facts}))):
        items = [*quiz_items("base", [1, 0, 1]), *quiz_items("base", [1, 1, 0], "shared")]
        write(tmp_path / name, results([Contestant("base", "base", FACTS)], [task, same], items))
    sheet = lay_out(find_sources([tmp_path / "a", tmp_path / "b"]))
    assert list(sheet.tasks) == ["quiz (a)", "shared", "quiz (b)"]
    (note,) = sheet.notes
    assert note == f"Task quiz of b is not compared with that of a: {said}."


def test_where_a_file_lies_and_how_many_items_were_asked_is_no_other_task(tmp_path: Path) -> None:
    write(tmp_path / "a", simple())
    moved = replace(QUIZ, facts={**QUIZ.facts, "file": "/elsewhere/quiz.jsonl", "limit": 50})
    items = quiz_items("base", [1] * 50)
    write(tmp_path / "b", results([Contestant("base", "base", FACTS)], [moved], items))
    sheet = lay_out(find_sources([tmp_path / "a", tmp_path / "b"]))
    assert list(sheet.tasks) == ["quiz"]
    assert sheet.notes == []


def test_items_of_one_name_with_other_references_are_other_tasks(tmp_path: Path) -> None:
    write(tmp_path / "a", simple())
    items = [replace(item, reference="C") for item in quiz_items("base", [1] * 100)]
    write(tmp_path / "b", results([Contestant("base", "base", FACTS)], [QUIZ], items))
    with pytest.raises(UserError, match=r"has no task in common with the others.*a: quiz \(a\); b: quiz \(b\)"):
        lay_out(find_sources([tmp_path / "a", tmp_path / "b"]))


def test_folders_without_a_common_task_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", simple())
    other = TaskRecord("sums", "generation", "exact_match")
    found = results([Contestant("base", "base", FACTS)], [other], quiz_items("base", [1], "sums", "exact_match"))
    write(tmp_path / "b", found)
    with pytest.raises(UserError, match="no task in common"):
        lay_out(find_sources([tmp_path / "a", tmp_path / "b"]))


def test_two_evaluations_of_one_run_are_one_contestants(tmp_path: Path) -> None:
    run = make_run(tmp_path / "run")
    write(run / "evaluation" / "a", simple())
    sums = TaskRecord("sums", "generation", "exact_match")
    lora = [Contestant("base", "base", FACTS), Contestant("lora", "adapter", {"bytes": 7})]
    items = [*quiz_items("base", [0, 1], "sums", "exact_match"), *quiz_items("lora", [1, 1], "sums", "exact_match")]
    write(run / "evaluation" / "b", results(lora, [sums], items))
    write(run / "evaluation" / "c", simple())  # once more the same
    sheet = lay_out(find_sources([run]))
    assert list(sheet.contestants) == ["base", "lora"]
    assert sheet.contestants["lora"].facts["bytes"] == 7
    assert sheet.contestants["lora"].facts["method"] == "lora"
    assert list(sheet.tasks) == ["quiz", "sums"]
    (note,) = sheet.notes
    assert "repeats what another evaluation of this run holds" in note


def test_only_items_that_both_answered_are_paired(tmp_path: Path) -> None:
    found = simple({"lora": range(50, 80)})
    kept = [item for item in found.items if item.contestant == "base" or int(item.item) < 70]
    write(tmp_path / "a", replace(found, items=kept))
    sheet = lay_out(find_sources([tmp_path / "a"]))
    (_, lora) = compare(sheet).figures
    assert lora.difference is not None
    assert lora.difference.n == 70
    assert lora.n == 70, "the score of a summary that knows of other items does not count"
    assert lora.value == pytest.approx(60 / 70)


@pytest.mark.parametrize(
    ("file", "change", "said"),
    [
        ("items.jsonl", lambda text: text + '{"contestant": "lora", "tas', r"items.jsonl:201"),
        ("items.jsonl", lambda text: text.replace('"acc": 1.0', '"acc": "yes"', 1), r"items.jsonl:1: scores.acc"),
        ("items.jsonl", lambda text: text.replace('"contestant": "base"', '"contestant": "x"', 1), "contestant 'x'"),
        ("items.jsonl", lambda text: text + text.splitlines()[0].replace('"B"', '"C"').replace("1.0", "0.0") + "\n",
         "two different answers to item 0"),
        ("summary.json", lambda text: text.replace('"kind": "base"', '"kynd": "base"'), r"contestants\[0\].*kynd"),
        ("summary.json", lambda text: text.replace('"n": 100', '"n": "many"', 1), r"scores\[0\]: n: expected an int"),
        ("summary.json", lambda text: text[:200], "is not valid JSON"),
        ("summary.json", lambda text: text.replace('"format": 1', '"format": 9'), "format 9 is not known"),
    ],
)  # fmt: skip
def test_damaged_files_are_named(tmp_path: Path, file: str, change: object, said: str) -> None:
    folder = write(tmp_path / "a", simple())
    path = folder / file
    path.write_text(change(path.read_text()))  # type: ignore[operator]
    with pytest.raises(UserError, match=said):
        lay_out(find_sources([folder]))


def test_items_come_back_as_they_were_written(tmp_path: Path) -> None:
    found = simple()
    folder = write(tmp_path / "a", found)
    again = Results.read(folder)
    assert again.items == list(found.items)
    assert again.scores == list(found.scores)
    assert json.loads((folder / "summary.json").read_text())["format"] == 1
