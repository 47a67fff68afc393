"""Classification data with bad records: each is told of at its line, and the good ones are read as if there were none.

What is wrong with the settings is no bad record and ends the run in every mode.
"""

from __future__ import annotations

import copy
import gzip
import json
from pathlib import Path
from typing import Any

import pytest
from tests import kit
from tests.kit.tokenizers import bert_tokenizer, byte_tokenizer

from weft.data import Problems, Record, Renderer, load_labelled, read_records
from weft.data.auditing.items import collect
from weft.data.labelled import ClassRecipe, given_labels
from weft.data.pipeline import TOO_LONG, Fold, RecordBehindLimit, outcomes
from weft.data.problems import KINDS
from weft.errors import UserError
from weft.models import describe
from weft.training import make_config
from weft.training.reader import Reader, data_files

RENDERER = Renderer(byte_tokenizer(), max_length=60)
GOOD = [("a fine film", "pos"), ("a dull film", "neg"), ("very fine", "pos"), ("very dull", "neg")]
# What is wrong with a line of JSON: (line, kind, part of the message).
LINES: dict[str, tuple[bytes, str, str]] = {
    "malformed": (b'{"text": "a" "label": "pos"}', "malformed_json", "malformed JSON"),
    "bytes": (b'{"text": "\xff", "label": "pos"}', "not_utf8", "is not UTF-8"),
    "nul": (b'{"text": "a\\u0000", "label": "pos"}', "nul", "NUL"),
    "half": (b'{"text": "\\ud83d", "label": "pos"}', "half_character", "half of a character"),
    "twice": (b'{"text": "a", "text": "b", "label": "pos"}', "duplicate_key", "twice"),
    "nan": (b'{"text": "a", "label": NaN}', "not_a_number", "NaN"),
    "large": (b'{"text": "a", "label": 1e400}', "number_too_large", "1e400"),
    "deep": (b'{"text": ' + b"[" * 100_000, "too_deep", "nested too deeply"),
    "no object": (b'"pos"', "not_an_object", "must be an object"),
    "no text": (b'{"label": "pos"}', "format", "'text' must be a string, found None"),
    "null text": (b'{"text": null, "label": "pos"}', "format", "'text' must be a string, found None"),
    "number": (b'{"text": 3, "label": "pos"}', "format", "'text' must be a string, found 3"),
    "empty text": (b'{"text": " ", "label": "pos"}', "format", "'text' is empty"),
    "no label": (b'{"text": "a"}', "label", "'label' must be a label"),
    "empty label": (b'{"text": "a", "label": " "}', "label", "'label' must be a label"),
    "list": (b'{"text": "a", "label": ["pos"]}', "label", "'label' must be a label"),
    "too long": (json.dumps({"text": "long " * 99, "label": "pos"}).encode(), "render", "max_length is 60"),
}
UNKNOWN = (b'{"text": "a", "label": "odd"}', "label", "the label 'odd' is none of the labels neg, pos")
SCORE = (b'{"text": "a", "label": 0.5}', "label", "'label' is 0.5, a score")
TABLES: dict[str, tuple[str, bytes, str]] = {
    "wide": ("csv", b"a,pos,more", "row_width"),
    "narrow": ("tsv", b"a", "row_width"),
    "quote": ("csv", b'"a" b,pos', "malformed_row"),
    "no label": ("tsv", b"a\t", "label"),
    "no text": ("csv", b",pos", "format"),
}


def good(pair: tuple[str, str]) -> bytes:
    return json.dumps({"text": pair[0], "label": pair[1]}).encode()


def write(path: Path, bad: list[bytes]) -> tuple[Path, list[int]]:
    """The good records with bad ones after the first, one by one; and the lines of the bad ones."""
    lines = [good(GOOD[0])]
    places = []
    for number, line in enumerate(bad):
        lines.append(line)
        places.append(len(lines))
        lines.append(good(GOOD[(number + 1) % len(GOOD)]))
    lines += [good(pair) for pair in GOOD]
    path.write_bytes(b"\n".join(lines) + b"\n")
    return path, places


def texts(path: Path, problems: Problems | None = None, **options: Any) -> tuple[list[tuple[str, str]], Any]:
    samples, names = load_labelled(path, RENDERER, problems=problems, **options)
    return [(RENDERER.tokenizer.decode(one.input_ids), names[one.label or 0]) for one in samples], names


@pytest.mark.parametrize("labels", [None, ["neg", "pos"]])
def test_every_kind_at_its_line(tmp_path: Path, labels: list[str] | None) -> None:
    cases = [*LINES.values(), UNKNOWN if labels else SCORE]
    path, places = write(tmp_path / "d.jsonl", [line for line, _, _ in cases])
    problems = Problems("skip")
    found, names = texts(path, problems, labels=labels)
    assert [(p.line, p.kind) for p in problems.first] == [
        (line, kind) for line, (_, kind, _) in zip(places, cases, strict=True)
    ]
    for problem, (_, kind, part) in zip(problems.first, cases, strict=True):
        assert problem.path == str(path)
        assert part in problem.what
        assert kind in KINDS
    lines = [json.loads(line) for line in path.read_bytes().splitlines()[::2] if line]
    clean = tmp_path / "clean.jsonl"
    clean.write_text("\n".join(map(json.dumps, lines[: len(cases)])) + "\n")
    rest = [(row["text"], row["label"]) for row in lines[: len(cases)]]
    assert found[: len(cases)] == rest
    assert texts(clean)[0] == rest, "the good records are read as if there were no others"
    assert names == ("neg", "pos")


@pytest.mark.parametrize("name", TABLES)
def test_rows_of_tables(name: str, tmp_path: Path) -> None:
    suffix, bad, kind = TABLES[name]
    path = tmp_path / f"d.{suffix}"
    separator = b"\t" if suffix == "tsv" else b","
    rows = [separator.join(part.encode() for part in pair) for pair in (("text", "label"), *GOOD)]
    path.write_bytes(b"\n".join([*rows[:3], bad, *rows[3:]]) + b"\n")
    problems = Problems("skip")
    assert texts(path, problems)[0] == GOOD
    assert [(p.line, p.kind) for p in problems.first] == [(4, kind)]


def test_a_table_without_a_header_and_with_a_bad_row(tmp_path: Path) -> None:
    path = tmp_path / "cola.tsv"
    path.write_text("s\t1\t\ta\ns\t0\ns\t0\t*\tc\n")
    problems = Problems("skip")
    assert texts(path, problems) == ([("a", "1"), ("c", "0")], ("0", "1"))
    assert [(p.line, p.kind) for p in problems.first] == [(2, "row_width")]


def test_a_file_that_is_cut_off(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl.gz"
    packed = gzip.compress(b"\n".join(map(good, GOOD)) + b"\n{" + b"x" * 3_000_000, mtime=0)
    path.write_bytes(packed[:-200])
    with pytest.raises(UserError, match="the file is damaged or cut off here"):
        texts(path)
    problems = Problems("skip")
    assert texts(path, problems)[0] == GOOD
    assert [(p.line, p.kind) for p in problems.first] == [(5, "cut_off")]


def test_error_lists_up_to_twenty(tmp_path: Path) -> None:
    path, places = write(tmp_path / "d.jsonl", [line for line, _, _ in (*LINES.values(), SCORE)] * 2)
    with pytest.raises(UserError) as error:
        texts(path)
    said = str(error.value).splitlines()
    assert said[0] == "more than 20 records cannot be used:"
    for line, place in zip(said[1:21], places, strict=False):
        assert line.startswith(f"  {path}:{place}:")
    assert said[21] == "  ... and more"
    assert "on_bad_record: skip" in said[22]


def test_nothing_left_is_an_error_in_every_mode(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(LINES["no label"][0] + b"\n" + LINES["null text"][0] + b"\n")
    with pytest.raises(UserError, match="2 records cannot be used"):
        texts(path, Problems("skip"))
    path.write_bytes(b"{]\n")
    with pytest.raises(UserError, match=r"d\.jsonl:1:2: malformed"):
        texts(path, Problems("skip"))


def test_the_classes_are_those_of_good_records(tmp_path: Path) -> None:
    rest = json.dumps({"text": "long " * 99, "label": "long"}).encode()
    path, _ = write(tmp_path / "d.jsonl", [b'{"text": "", "label": "none"}', rest])
    assert texts(path, Problems("skip"))[1] == ("neg", "pos")
    path.write_bytes(good(GOOD[0]) + b'\n{"text": "", "label": "none"}\n')
    with pytest.raises(UserError, match=r":1: every record has the label 'pos'.*\(1 bad records were left out\.\)"):
        texts(path, Problems("skip"))
    with pytest.raises(UserError, match=r"d\.jsonl:2: 'text' is empty"):
        texts(path)


def test_behind_the_limit_only_the_label_is_looked_at(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    rows = [good(GOOD[0]), good(GOOD[1]), b'{"text": "", "label": "third"}', b'{"text": "a", "label": ""}']
    path.write_bytes(b"\n".join(rows) + b"\n")
    problems = Problems("skip")
    assert texts(path, problems, limit=2) == (GOOD[:2], ("neg", "pos", "third"))
    assert [p.line for p in problems.first] == [4]
    assert texts(path, None, limit=2, labels=["pos", "neg"]) == (GOOD[:2], ("pos", "neg"))


@pytest.mark.parametrize("mode", ["error", "skip", "report"])
def test_settings_are_no_bad_records(tmp_path: Path, mode: Any) -> None:
    path, _ = write(tmp_path / "d.jsonl", [])
    both = tmp_path / "both.csv"
    both.write_text("text,sentence,label\na,b,0\nc,d,1\n")
    bare = tmp_path / "bare.tsv"
    bare.write_text("a\tb\t1\nc\td\t0\n")
    cases: list[tuple[Path, dict[str, Any], str]] = [
        (path, {"text_columns": ["txt"]}, "there is no column 'txt'. Did you mean 'text'"),
        (both, {}, "more than one column could be the text"),
        (bare, {}, "add one"),
        (path, {"labels": ["pos"]}, "expected a list of two names"),
    ]
    for file, options, text in cases:
        with pytest.raises(UserError, match=text):
            texts(file, Problems(mode), **options)
    encoder = Renderer(bert_tokenizer(), max_length=3, truncation="left")
    with pytest.raises(UserError, match=r"^an encoder's texts are cut by `truncation: right` only.*jsonl:1 is too"):
        load_labelled(path, encoder, problems=Problems(mode))


def test_the_first_records_together_name_the_columns(tmp_path: Path) -> None:
    path = tmp_path / "d.jsonl"
    path.write_bytes(b'{"label": "pos"}\n' + b"\n".join(map(good, GOOD)))
    problems = Problems("skip")
    assert texts(path, problems)[0] == GOOD
    assert [p.line for p in problems.first] == [1]


def test_a_run_treats_them_as_it_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path, places = write(tmp_path / "d.jsonl", [LINES["malformed"][0], LINES["no label"][0], LINES["too long"][0]])
    held, _ = write(tmp_path / "held.jsonl", [UNKNOWN[0]])

    def read(mode: str) -> Reader:
        given = {"model": "none", "method": ["lora", "prefix_tuning"], "task": "sequence_classification"}
        made = make_config({**given, "data": str(path), "eval_data": str(held), "on_bad_record": mode})
        reader = Reader(made, RENDERER, describe(kit.make_model("qwen2")), data_files(made))
        for job in made.jobs:
            found = reader.job(job)
            assert (len(found.train), len(found.held)) == (8, 6)
            assert found.classes is not None
            assert found.classes.labels == ("neg", "pos")
        return reader

    with pytest.raises(UserError, match="3 records cannot be used"):
        read("error")
    assert read("skip").problems.count == 4, "what two jobs read alike counts once"
    assert f"left out 4 bad records (label 2, malformed_json 1, render 1); the first: {path}:2:14" in caplog.text
    read("report").problems.write(tmp_path / "report.jsonl")
    rows = [json.loads(line) for line in (tmp_path / "report.jsonl").read_text().splitlines()]
    assert [(row["file"], row["line"]) for row in rows] == [*((str(path), line) for line in places), (str(held), 2)]


def test_an_audit_goes_on(tmp_path: Path) -> None:
    cases = [*LINES.values(), SCORE]
    path, places = write(tmp_path / "d.jsonl", [line for line, _, _ in cases])
    recipe = ClassRecipe(renderer=RENDERER, watched=True)
    fold, found = Fold(path, recipe, Problems("skip")), list(outcomes(path, recipe))
    assert list(fold.samples(found))
    assert fold.names == ("neg", "pos")
    items, left_out = collect(found, RENDERER, classes=fold.names)
    bad = [item for item in items if item.problem is not None]
    assert [int(item.source.removeprefix(f"{path}:").split(":")[0]) for item in bad] == places
    codes = ["too-long" if kind == "render" else "not-read" for _, kind, _ in cases]
    assert [item.problem[0] for item in bad if item.problem] == codes
    assert bad[-1].shown == '{"text": "a", "label": 0.5}'
    assert [(item.text, item.label) for item in items if item.samples][:2] == GOOD[:2]
    assert left_out == {}
    assert [item.samples[0].label for item in items if item.samples][:2] == [1, 0]
    short = Renderer(byte_tokenizer(), max_length=10, truncation="drop")
    recipe = ClassRecipe(renderer=short, labels=given_labels([" pos", "neg"]), watched=True)
    items, left_out = collect(outcomes(write(tmp_path / "e.jsonl", [])[0], recipe), short, classes=recipe.labels or ())
    assert recipe.labels == ("pos", "neg")
    assert (len(items), left_out) == (2, {TOO_LONG: 3})


def test_through_the_command_line(
    tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from weft.cli.main import main

    monkeypatch.chdir(tmp_path)
    path, places = write(tmp_path / "d.jsonl", [LINES["malformed"][0], LINES["empty text"][0]])

    def run(verb: str, *words: str) -> int:
        return main([verb, "--model", str(tiny_llama_dir), "--data", str(path), *words])

    settings = ["task=sequence_classification", "steps=1", "--method", "lora", "--output-dir", "run"]
    assert run("train", *settings) == 2
    said = capsys.readouterr().err
    assert "2 records cannot be used" in said
    assert all(f"d.jsonl:{line}" in said for line in places)
    assert run("train", *settings, "on_bad_record=report") == 0
    rows = [json.loads(line) for line in Path("run/bad_records.jsonl").read_text().splitlines()]
    assert [row["line"] for row in rows] == places
    capsys.readouterr()
    assert run("preview", "task=sequence_classification", "--json") == 1
    findings = json.loads(capsys.readouterr().out)["data"][0]["findings"]
    unread = [one["source"] for one in findings if one["code"] == "not-read"]
    assert [place.split("jsonl:")[1].split(":")[0] for place in unread] == ["2", "4"]


@pytest.mark.parametrize("method", ["lora", "prefix_tuning"])
def test_a_preview_of_one_class_or_of_none(
    method: str, tmp_path: Path, tiny_llama_dir: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from weft.cli.main import main

    words = ["preview", "--model", str(tiny_llama_dir), "task=sequence_classification", f"method={method}", "--json"]
    bad = LINES["empty label"][0]
    for rows, codes in (([good(GOOD[0]), bad], {"not-read", "one-class"}), ([bad, bad], {"not-read"})):
        path = tmp_path / "d.jsonl"
        path.write_bytes(b"\n".join(rows) + b"\n")
        assert main([*words, "--data", str(path)]) == 1
        findings = json.loads(capsys.readouterr().out)["data"][0]["findings"]
        assert codes <= {one["code"] for one in findings}


def test_what_workers_are_sent_and_send_back(tmp_path: Path) -> None:
    """A deep copy is made as a pickle is."""
    path, _ = write(tmp_path / "d.jsonl", [LINES["no text"][0], LINES["too long"][0]])
    recipe = ClassRecipe(renderer=RENDERER, keyed=True, watched=True)
    records = list(map(behind, read_records(path)))
    made = recipe.begun(records).make(records)
    sent = copy.deepcopy((recipe.begun(records), records))
    assert copy.deepcopy(sent[0].make(sent[1])) == made
    assert [type(one).__name__ for one in made][-2:] == ["Omission", "Omission"]


def behind(record: Record) -> Record:
    """Records of the last two lines as those behind the limit."""
    return RecordBehindLimit(record.fields, record.source) if int(record.source.rpartition(":")[2]) > 7 else record


def test_a_preview_whose_first_source_has_no_class(tmp_path: Path, tiny_llama_dir: Path) -> None:
    from weft.preview.data_sets import examine

    first, second = tmp_path / "a.jsonl", write(tmp_path / "b.jsonl", [])[0]
    first.write_bytes(LINES["empty label"][0] + b"\n")
    settings = {"model": str(tiny_llama_dir), "method": "lora", "task": "sequence_classification"}
    (found,) = examine(make_config({**settings, "data": [str(first), str(second)]}))
    assert [(item.label, len(item.samples)) for item in found.items[:3]] == [(None, 0), ("pos", 1), ("pos", 1)]
    assert found.packings == []
