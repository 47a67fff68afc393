"""Bad records are listed, left out or reported; what is wrong with the settings is none of them."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
from tests.data.doubler import Doubler
from tests.kit.processes import quick_workers
from tests.kit.tokenizers import byte_tokenizer

from weft.data import BadRecordError, EmptyAnswerError, Problem, Problems, Renderer, iter_records, load_samples
from weft.data.problems import KINDS, about_record
from weft.data.workers import in_order
from weft.errors import UserError

RENDERER = Renderer(byte_tokenizer(), max_length=80)
BAD = {3: "malformed_json", 5: "format", 8: "render", 9: "not_utf8"}


def write(folder: Path, bad: int = 0, count: int = 10) -> Path:
    """Ten lines of which four are bad in four ways; ``bad`` more at the end."""
    lines = [json.dumps({"instruction": f"q{i}", "output": "a"}).encode() for i in range(1, count + 1)]
    lines[2], lines[4] = b'{"instruction": "q" "output"}', b'{"foo": 1}'
    lines[7], lines[8] = json.dumps({"instruction": "q", "output": "long " * 99}).encode(), b'{"text": "\xff"}'
    path = folder / "rows.jsonl"
    path.write_bytes(b"\n".join(lines + [b"{"] * bad) + b"\n")
    return path


def test_error_lists_each_at_its_place(tmp_path: Path) -> None:
    path = write(tmp_path)
    with pytest.raises(UserError) as error:
        load_samples(path, RENDERER)
    text = str(error.value).splitlines()
    assert text[0] == "4 records cannot be used:"
    places = [f"  {path}:3:21: malformed JSON", f"  {path}:5: the record fits no known format"]
    places += [f"  {path}:8: ", f"  {path}:9:11: byte 0xff is not UTF-8"]
    for line, place in zip(text[1:], places, strict=False):
        assert line.startswith(place), (line, place)
    assert "on_bad_record: skip" in text[5]


def test_error_stops_after_twenty(tmp_path: Path) -> None:
    path = write(tmp_path, bad=1000)
    with pytest.raises(UserError) as error:
        load_samples(path, RENDERER)
    lines = str(error.value).splitlines()
    assert lines[0] == "more than 20 records cannot be used:"
    assert [line.startswith(f"  {path}:") for line in lines[1:21]] == [True] * 20
    assert lines[21].strip() == "... and more"
    assert lines[20].startswith(f"  {path}:26:")


def test_error_reads_no_further_than_it_lists() -> None:
    problems = Problems()
    for line in range(20):
        problems.add(Problem("nul", "a", "b", line=line))
    with pytest.raises(UserError, match=r"and more"):
        problems.add(Problem("nul", "a", "b", line=21))


def test_one_problem_is_the_message_itself(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"text": "a"}\n{"text": \n')
    with pytest.raises(BadRecordError, match=r"^\S+a\.jsonl:2:10: malformed") as error:
        load_samples(path, RENDERER)
    assert error.value.problem.kind == "malformed_json"
    path.write_text('{"question": "a", "answer": ""}\n')
    with pytest.raises(EmptyAnswerError):
        load_samples(path, RENDERER)


def test_skip_says_how_many_and_the_first(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = write(tmp_path)
    with caplog.at_level(logging.WARNING):
        samples = load_samples(path, RENDERER, on_bad_record="skip")
    assert [int(sample.source.rsplit(":")[-1]) for sample in samples] == [1, 2, 4, 6, 7, 10]
    assert "left out 4 bad records" in caplog.text
    assert f"the first: {path}:3:21" in caplog.text
    assert not (tmp_path / "bad_records.jsonl").exists()


def test_report_writes_all_of_them(tmp_path: Path) -> None:
    path, report = write(tmp_path, bad=100), tmp_path / "new" / "report.jsonl"
    load_samples(path, RENDERER, on_bad_record="report", bad_records_file=report)
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    assert len(rows) == 104
    assert {row["line"]: row["kind"] for row in rows[:4]} == BAD
    assert rows[0].keys() == {"file", "line", "column", "kind", "message"}
    assert (rows[0]["file"], rows[0]["column"]) == (str(path), 21)
    assert [p.name for p in report.parent.iterdir()] == ["report.jsonl"], "nothing half-written is left"


def test_a_report_appears_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report = tmp_path / "report.jsonl"
    report.write_text("before")
    problems = Problems("report")
    problems.add(Problem("nul", "a", "b", line=1))

    def full(_: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(UserError, match=r"bad_records_file .*report.jsonl cannot be written, because the disk is full"):
        problems.write(report)
    assert report.read_text() == "before"
    assert [p.name for p in tmp_path.iterdir()] == ["report.jsonl"]


def test_nothing_left_is_an_error_that_lists(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text('{"foo": 1}\n' * 30)
    with pytest.raises(UserError, match="30 records cannot be used") as error:
        load_samples(path, RENDERER, on_bad_record="skip")
    assert f"a.jsonl: lines {', '.join(map(str, range(1, 21)))} ... and more" in str(error.value)


def test_what_all_have_in_common_is_said_once(tmp_path: Path) -> None:
    """A whole file that is made for another purpose, with other records before it or not."""
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text('{"prompt": "q", "chosen": "a", "rejected": "b"}\n' * 500)
    with pytest.raises(UserError) as error:
        load_samples(pairs, RENDERER)
    said = str(error.value).splitlines()
    assert len(said) == 3
    assert said[0].startswith("more than 20 records cannot be used, the first all for one reason: this is a preference")
    assert said[1] == f"  {pairs}: lines {', '.join(map(str, range(1, 21)))} ... and more"
    assert "on_bad_record: skip" in said[2]
    (tmp_path / "a.jsonl").write_text('{"instruction": "q", "output": "a"}\n{}\n{"foo": 1}\n')
    with pytest.raises(UserError) as error:
        load_samples(tmp_path, RENDERER)
    assert len(str(error.value).splitlines()) == 23, "of several kinds each is listed"


def test_the_formats_are_listed_once(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("".join(json.dumps({"instruction": "q", f"field{n % 7}": "a"}) + "\n" for n in range(15)))
    with pytest.raises(UserError) as error:
        load_samples(path, RENDERER)
    said = str(error.value)
    assert said.count("Known formats:") == 1
    assert said.count("Fields found:") == 15
    path.write_text("".join(json.dumps({"instruction": "q", "output": n}) + "\n" for n in range(15)))
    with pytest.raises(UserError) as error:
        load_samples(path, RENDERER)
    assert str(error.value).count("columns:") == 1
    report = tmp_path / "bad.jsonl"
    path.write_text('{"foo": 1}\n{"text": "a"}\n')
    load_samples(path, RENDERER, on_bad_record="report", bad_records_file=report)
    assert "Known formats" not in report.read_text()


def test_what_two_files_have_in_common() -> None:
    problems = Problems()
    for path, line, column in (("a", 3, None), ("b", 5, 7), ("a", 9, None), ("c", None, None)):
        assert "one reason" not in str(problems.error() if problems.count else ""), "three are listed"
        problems.add(Problem("nul", path, "a NUL.", line=line, column=column))
    said = str(problems.error()).splitlines()
    assert said[0] == "4 records cannot be used, all for one reason: a NUL."
    assert said[1:4] == ["  a: lines 3, 9", "  b: line 5:7", "  c"]
    problems.add(Problem("render", "a", "a NUL.", line=10))
    assert "one reason" not in str(problems.error()), "of another kind"


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"format": "alpca"}, "format 'alpca' is unknown"),
        ({"columns": {"outptu": "x"}}, "columns: 'outptu' is a field of no format"),
        ({"on_bad_record": "ignore"}, "on_bad_record is 'ignore'"),
        ({"bad_records_file": "x"}, "bad_records_file is for"),
        ({"data_workers": -1}, "data_workers is -1"),
    ],
)
def test_wrong_settings_are_no_bad_records(options: dict[str, Any], text: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=text):
        load_samples(write(tmp_path), RENDERER, **{"on_bad_record": "skip", **options})


def test_whose_error_it_is() -> None:
    problem = about_record(UserError("a b.json:7: turn 2 is odd."), "a b.json:7", "format")
    assert problem == Problem("format", "a b.json", "turn 2 is odd.", line=7)
    assert str(problem) == "a b.json:7: turn 2 is odd."
    assert about_record(UserError("a.json:77: odd"), "a.json:7", "format") is None
    assert about_record(UserError("the tokenizer has no end"), "a.json:7", "format") is None
    assert set(BAD.values()) <= set(KINDS)


def test_reading_goes_on_where_the_next_record_begins(tmp_path: Path) -> None:
    """(file, what is read, the lines of the problems)"""
    cases: list[tuple[str, str, list[Any], list[tuple[str, int | None]]]] = [
        ("json", '[{"n":1},{"n" 2},{"n":3}]', [1], [("malformed_json", 1), ("unread", 1)]),
        ("json", '[{"n":1},{"n":2,},{"n":3}]', [1, 3], [("malformed_json", 1)]),
        ("json", '[{"n":1},{"n":"a, {"n":3},{"n":4}]', [1], [("malformed_json", 1), ("unread", 1)]),
        ("json", '[{"n":1},,{"n":3}]', [1, 3], [("malformed_json", 1)]),
        ("json", '[{"n":1} {"n":2},\n{"n":3}]', [1, 2, 3], [("malformed_json", 1)]),
        ("json", '[\n{"n":1},\n{"n":"},\n{"n":3}\n]', [1, 3], [("malformed_json", 3)]),
        ("json", '[\n {"n":1},\n {"n":2\n {"n":3},\n null,\n {"n":4}\n]', [1, 3, 4],
         [("malformed_json", 3), ("not_an_object", 5)]),
        ("json", '[\n {\n  "n": [\n   {"m": }\n  ]\n },\n {"n":3}\n]', [3], [("malformed_json", 4)]),
        ("json", '[\n{\n"n": [\n{\n"m" 1\n},\n{\n"m": 1\n}\n]\n}\n]', [], [("malformed_json", 5), ("unread", 2)]),
        ("json", '[{"n":NaN},{"n":2}]', [2], [("not_a_number", 1)]),
        ("json", '[{"n":1}]\n{"n":2}', [1], [("unread", 2)]),
        ("json", '{"n":1}\n{"n":}\n{"n":3}', [1, 3], [("malformed_json", 2)]),
        ("json", '{"data": [{"n":1}], "train": "x"', [1], [("cut_off", 1)]),
        ("csv", 'n,m\n1,"x\n2,"y"\n3,z\n', ["2", "3"], [("malformed_row", 2)]),
        ("csv", 'n,m\n1,"x\ny "z" "\n3,z\n', ["3"], [("malformed_row", 2)]),
        ("csv", 'n,m\n1,"x\n2,y\n3,z\n', ["2", "3"], [("malformed_row", 2)]),
    ]  # fmt: skip
    for suffix, text, read, told in cases:
        path = tmp_path / f"a.{suffix}"
        path.write_text(text)
        problems = Problems("skip")
        found = [record.fields["n"] for record in iter_records(path, problems=problems)]
        assert (found, [(p.kind, p.line) for p in problems.first]) == (read, told), text


@pytest.mark.long
def test_workers_are_processes_of_their_own() -> None:
    """As in a run, with the seconds that each takes to start; the other tests of workers use copies of a process."""
    numbers = list(range(1100))
    assert list(in_order(iter(numbers), Doubler().make, 1)) == [2 * n for n in numbers]


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    quick_workers(monkeypatch)


@pytest.mark.long
@pytest.mark.usefixtures("quick")
def test_workers_keep_the_order() -> None:
    numbers = list(range(3000))
    assert list(in_order(iter(numbers), Doubler().make, 3)) == [2 * n for n in numbers]
    with pytest.raises(UserError, match="data_workers: 0"):
        list(in_order(iter([*numbers, -1]), Doubler().make, 2))
    with pytest.raises(UserError, match="a setting is wrong"):
        list(in_order(iter([*numbers, -2]), Doubler().make, 2))


@pytest.mark.parametrize("sizes", [[1] * 1500, [200_000] * 9, [1 << 30, 1, 1 << 30, *[1] * 600]])
def test_chunks_are_bounded_by_number_and_size(sizes: list[int]) -> None:
    """A chunk of long texts in the making would take gigabytes."""
    given: list[list[int]] = []

    def keep(items: list[int]) -> list[int]:
        given.append(items)
        return items

    assert list(in_order(iter(sizes), keep, 0, lambda size: size)) == sizes
    assert all(len(chunk) <= 512 and sum(chunk[:-1]) < 1 << 18 for chunk in given)
    assert len(given) <= 5


@pytest.mark.long
@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize("mode", ["skip", "report"])
def test_workers_find_the_same_problems(mode: Any, tmp_path: Path) -> None:
    path = write(tmp_path, bad=300, count=900)
    found = []
    for workers in (0, 2):
        report = tmp_path / f"{workers}.jsonl"
        options: dict[str, Any] = {"bad_records_file": report} if mode == "report" else {}
        samples = load_samples(path, RENDERER, on_bad_record=mode, data_workers=workers, **options)
        found.append((samples, report.read_text() if options else ""))
    assert found[0] == found[1]
