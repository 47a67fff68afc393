"""Reading files: every record knows its line, every broken file gives one error that names the place."""

from __future__ import annotations

import json
import time
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from weft.data import Record, read_records
from weft.data.reading.records import first_rows
from weft.errors import UserError


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def lines(records: list) -> list[int]:
    return [int(record.source.rsplit(":", 1)[1]) for record in records]


def test_json_array_gives_fields_and_lines(tmp_path: Path) -> None:
    path = write(tmp_path, "a.json", '[\n {"a": "x\\ny"},\n\n {\n  "a": 2}, {"a": 3}\n]\n')
    records = read_records(path)
    assert [record.fields for record in records] == [{"a": "x\ny"}, {"a": 2}, {"a": 3}]
    assert [record.source for record in records] == [f"{path}:2", f"{path}:4", f"{path}:5"]


SPACE = st.text(alphabet=" \t\r\n", max_size=5)
TEXT = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]), max_size=8)  # NUL is malformed
VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | TEXT,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(TEXT, inner, max_size=3),
    max_leaves=6,
)
ROWS = st.lists(
    st.tuples(st.dictionaries(TEXT, VALUES, max_size=4), st.sampled_from([None, 0, 2]), SPACE, SPACE),
    min_size=1,
    max_size=8,
)


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=ROWS, head=SPACE, wrapper=st.sampled_from(["", "train", "data"]), ascii_only=st.booleans())
def test_property_lines_of_json_arrays(tmp_path: Path, rows: list, head: str, wrapper: str, ascii_only: bool) -> None:
    text = head + (f'{{"note": {{"data": [1, "["]}},\n"{wrapper}":\n' if wrapper else "") + "["
    expected = []
    for number, (fields, indent, before, after) in enumerate(rows):
        text += ("," if number else "") + before
        expected.append((fields, text.count("\n") + 1))
        text += json.dumps(fields, indent=indent, ensure_ascii=ascii_only) + after
    text += "]" + ("}\n" if wrapper else "\n")
    records = read_records(write(tmp_path, "p.json", text))
    assert list(zip([record.fields for record in records], lines(records), strict=True)) == expected


def test_wrapped_single_and_misnamed_json(tmp_path: Path) -> None:
    assert lines(read_records(write(tmp_path, "w.json", '{"info": 1,\n "data": [\n {"a": 1},\n {"a": 2}]}'))) == [3, 4]
    twice = read_records(write(tmp_path, "t.json", '{"data": [{"a": 1}],\n"data": [{"a": 2}]}'))
    assert (twice[0].fields, lines(twice)) == ({"a": 2}, [2])
    assert read_records(write(tmp_path, "one.json", '{"a": [1],\n "b": 2}'))[0].fields == {"a": [1], "b": 2}
    assert lines(read_records(write(tmp_path, "l.json", '{"a": 1}\n\n{"a": 2}\n'))) == [1, 3]


def test_jsonl_lines_blanks_bom_and_unicode_separators(tmp_path: Path) -> None:
    path = write(tmp_path, "a.jsonl", b"\xef\xbb\xbf" + '{"a": "x\u2028y"}\r\n\n{"a": 2}'.encode())
    records = read_records(path)
    assert [record.fields for record in records] == [{"a": "x\u2028y"}, {"a": 2}]
    assert lines(records) == [1, 3]


def test_jsonl_row_of_messages(tmp_path: Path) -> None:
    row = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    assert read_records(write(tmp_path, "m.jsonl", json.dumps(row)))[0].fields == {"messages": row}


def test_csv_and_tsv(tmp_path: Path) -> None:
    long = "x" * 200_000
    text = f'\ufeffa,b\r\n1,"two\nlines, ""q"""\n\n3,{long}\n'
    records = read_records(write(tmp_path, "a.csv", text))
    assert [record.fields for record in records] == [{"a": "1", "b": 'two\nlines, "q"'}, {"a": "3", "b": long}]
    assert lines(records) == [2, 5]
    records = read_records(write(tmp_path, "a.tsv", 'a\tb\n1\t"open\n2\tc\n'))
    assert [record.fields for record in records] == [{"a": "1", "b": '"open'}, {"a": "2", "b": "c"}]


def test_a_table_without_a_header(tmp_path: Path) -> None:
    path = write(tmp_path, "a.tsv", '1\t"a\n2\tb\tc\n')
    assert read_records(path, header=("n", "text"), limit=1)[0] == Record({"n": "1", "text": '"a'}, f"{path}:1")
    with pytest.raises(UserError, match=r"a\.tsv:2: 3 cells where expected are 2 columns: n, text"):
        read_records(path, header=("n", "text"))
    assert first_rows(path, 1) == [["1", '"a']]
    assert first_rows(write(tmp_path, "a.txt", "x"), 1) == []


def test_txt(tmp_path: Path) -> None:
    records = read_records(write(tmp_path, "a.txt", "one\n  \ntwo \n"), text_unit="line")
    assert [record.fields["text"] for record in records] == ["one", "two "]
    assert lines(records) == [1, 3]


@pytest.mark.parametrize(
    ("name", "content"),
    [("a.json", '[{"a": 1}, {"a": 2}, oops'), ("a.jsonl", '{"a": 1}\n{"a": 2}\noops'), ("a.csv", "a\n1\n2\n3,4\n")],
)
def test_limit_stops_before_what_follows(tmp_path: Path, name: str, content: str) -> None:
    path = write(tmp_path, name, content)
    assert len(read_records(path, limit=2)) == 2
    with pytest.raises(UserError):
        read_records(path)
    with pytest.raises(UserError, match="limit"):
        read_records(path, limit=0)


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.parquet", "x", ["'.parquet'", ".jsonl", ".csv"]),
        ("a.json", "", ["is empty"]),
        ("a.json", " \n", ["no records"]),
        ("a.json", "[ ]", ["no records"]),
        ("a.json", '{"train": []}', ["no records"]),
        ("a.csv", "a,b\n", ["no records"]),
        ("a.txt", "\n\n", ["no records"]),
        ("a.jsonl", b'{"a": 1}\n{"a": "\xff"}\n', [":2:", "UTF-8", "0xff"]),
        ("a.json", b'[{"a": 1},\n{"a": "\xff"}]', [":2:", "UTF-8"]),
        ("a.csv", b"a\nb\n\xe9\n", [":3:", "UTF-8"]),
        ("a.txt", b"a\nb\n\xe9\n", [":3:", "UTF-8"]),
        ("a.json", '[{"a": 1},\n {"a" 2}]', [":2:7:", "malformed", "':'"]),
        ("a.json", '[{"a": 1}\n {"a": 2}]', [":2:2:", "malformed", "','"]),
        ("a.json", '[{"a": 1},\n', [":2:1:", "malformed"]),
        ("a.json", '[{"a": 1}\n', [":2:1:", "cut off"]),
        ("a.json", '[{"a": 1},\n]', [":2:1:", "comma"]),
        ("a.json", '[{"a": 1}]\nx', [":2:1:", "follows"]),
        ("a.json", '{"data": [{"a": 1},\n{"a": }]}', [":2:7:", "malformed"]),
        ("a.json", '[{"a": 1},\n{"a":\n NaN}]', [":2:", "NaN", "null"]),
        ("a.jsonl", '{"a": 1}\n{"a": -Infinity}', [":2:", "Infinity"]),
        ("a.json", '[{"a": 1},\n"b"]', [":2:", "object", "a string"]),
        ("a.json", "[{},\n[]]", [":2:", "object", "an array"]),
        ("a.jsonl", '{"a": 1}\n7', [":2:", "object", "a number"]),
        ("a.jsonl", '{"a": 1}\n{"a": 2,}', [":2:", "malformed"]),
        ("a.jsonl", '{"a": 1} {"a": 2}', [":1:10:", "one object per line"]),
        ("a.jsonl", '[\n{"a": 1}\n]', [":1:", "Rename it to .json"]),
        ("a.json", '[{"a": "\\ud83d"}]', [":1:", "\\ud83d", "half"]),
        ("a.json", "[" * 100_000, [":1:", "nested too deeply"]),
        ("a.csv", "a,b\n1,2\n\n1,2,3\n", [":4:", "3 cells", "2 columns", "a, b"]),
        ("a.csv", "a,a\n1,2\n", [":1:", "each once"]),
        ("a.csv", 'a,b\n1,"x\n2,y\n', [":2:", "malformed"]),
        ("a.tsv", "a\tb\n1\n", [":2:", "1 cells", "no quoting"]),
    ],
)
def test_errors_name_the_place(tmp_path: Path, name: str, content: str | bytes, parts: list[str]) -> None:
    path = write(tmp_path, name, content)
    with pytest.raises(UserError) as error:
        read_records(path)
    assert str(path) in str(error.value)
    for part in parts:
        assert part in str(error.value)


def test_missing_file_and_directory(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no data file at"):
        read_records(tmp_path / "none.json")
    with pytest.raises(UserError, match="is a directory"):
        read_records(tmp_path)


def test_real_alpaca_is_read_in_linear_time(shared: Path) -> None:
    path = shared / "sft" / "alpaca_en.json"
    started = time.perf_counter()
    records = read_records(path)
    # 0.8 s here; a reader that counts lines from the start for every record needs minutes
    assert time.perf_counter() - started < 20
    text = path.read_text(encoding="utf-8").split("\n")
    assert len(records) == 42_148
    for record in (records[0], records[20_000], records[-1]):
        line = int(record.source.rsplit(":", 1)[1])
        assert text[line - 1] == "{"
        assert json.loads(text[line].strip().removeprefix('"instruction":').rstrip(",")) == record.fields["instruction"]


def test_real_files_of_every_kind_are_read(shared: Path) -> None:
    files = [
        path for folder in ("sft", "preference", "text", "formats") for path in sorted((shared / folder).iterdir())
    ]
    assert len(files) > 20
    for path in files:
        assert read_records(path, limit=50)
