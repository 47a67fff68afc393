"""Tables and lines as office programs write them: read where they are clear, else one line says what to write."""

from __future__ import annotations

import json
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest

from weft.data import Problems, iter_records, read_records
from weft.data.reading.encoding import guess
from weft.data.reading.records import first_rows
from weft.errors import UserError

TWO = [{"instruction": "Name a fruit", "output": "apple, or pear"}, {"instruction": "Say hi", "output": "hi"}]


def write(tmp_path: Path, name: str, content: str | bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def fields(path: Path) -> list[dict[str, Any]]:
    return [record.fields for record in read_records(path)]


def refusal(path: Path) -> str:
    with pytest.raises(UserError) as error:
        read_records(path)
    assert "\n" not in str(error.value)
    return str(error.value)


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("mark", [",", ";", "\t", "|"])
@pytest.mark.parametrize("head", ["", "\ufeff", "sep={}", "\ufeffSEP={}", '"sep={}"'])
def test_every_separator_and_line_end(mark: str, end: str, head: str, tmp_path: Path) -> None:
    rows = [["instruction", "output"], *([f'"{cell}"' for cell in row.values()] for row in TWO)]
    lines = [head.format(mark)] if "{}" in head else []
    text = ("" if "{}" in head else head) + "".join(line + end for line in [*lines, *(mark.join(row) for row in rows)])
    records = read_records(write(tmp_path, "a.csv", text))
    assert [record.fields for record in records] == TWO
    if end != "\r\r\n":
        assert records[0].source.endswith(f":{2 + len(lines)}")


def test_one_of_several_separators_is_the_one_that_fits_all_rows(tmp_path: Path) -> None:
    text = "question, short;answer\nq;a\nr, s, t;b\n"
    assert fields(write(tmp_path, "a.csv", text))[1] == {"question, short": "r, s, t", "answer": "b"}
    assert "a comma or a semicolon could separate the columns" in refusal(write(tmp_path, "b.csv", "a,b;c\n1,2;3\n"))
    assert fields(write(tmp_path, "b.csv", "sep=,\na,b;c\n1,2;3\n")) == [{"a": "1", "b;c": "2;3"}]
    assert fields(write(tmp_path, "c.csv", "text\nwith; and | and, all\n".replace(",", "")))
    assert first_rows(write(tmp_path, "d.csv", "a;b\n1;2\n"), 5) == [["a", "b"], ["1", "2"]]


def test_a_tsv_without_tabs_is_named(tmp_path: Path) -> None:
    assert "Rename the file to end in .csv" in refusal(write(tmp_path, "a.tsv", "a,b\n1,2\n"))


def test_what_programs_add_to_a_table(tmp_path: Path) -> None:
    text = ',instruction,output,\r\n0,q,"a\r\nb",\r\n,,,\r\n1,r,"c\rd",\r\n\ufeff,instruction,output,\r\n2,s,e,\r\n'
    assert fields(write(tmp_path, "a.csv", text)) == [
        {"instruction": "q", "output": "a\nb"}, {"instruction": "r", "output": "c\nd"},
        {"instruction": "s", "output": "e"},
    ]  # fmt: skip
    assert "says 'note' in a column that the header" in refusal(write(tmp_path, "b.csv", ",a\nnote,x\n"))


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r"])
@pytest.mark.parametrize("suffix", ["jsonl", "json"])
def test_marks_and_line_ends_in_json(suffix: str, end: str, tmp_path: Path) -> None:
    text = "".join("\ufeff" + json.dumps(row) + end for row in TWO)
    records = read_records(write(tmp_path, f"a.{suffix}", text))
    assert [record.fields for record in records] == TWO
    if suffix == "jsonl":
        assert records[1].source.endswith(":2")


def test_a_line_across_pieces_and_beyond_the_limit(tmp_path: Path) -> None:
    rows = ["x" * n for n in (5, (1 << 20) - 14, 3, 1 << 20, 1)]
    path = write(tmp_path, "a.jsonl", "\r\n".join(f'{{"text": "{row}"}}' for row in rows) + "\r")
    assert [record.fields["text"] for record in read_records(path)] == rows
    problems = Problems("skip")
    kept = [record.fields["text"] for record in iter_records(path, problems=problems, record_limit=1000)]
    assert (kept, dict(problems.kinds)) == ([rows[0], rows[2], rows[4]], {"too_long": 2})


def test_a_wrapper_of_another_name(tmp_path: Path) -> None:
    for name in ("rows", "records", "samples"):
        assert fields(write(tmp_path, "a.json", json.dumps({"version": 1, name: TWO}))) == TWO


SAID = {
    "gbk": "写一首诗。春眠不觉晓，处处闻啼鸟。有什么可以帮助您的吗？",
    "big5": "請寫一首詩。春眠不覺曉，處處聞啼鳥。有什麼可以幫助您的嗎？",
    "shift_jis": "こんにちは。今日はいい天気ですね。詩を書いてください。",
    "euc_jp": "こんにちは。今日はいい天気ですね。詩を書いてください。",
    "euc_kr": "안녕하세요. 오늘은 날씨가 좋습니다. 시를 써 주세요.",
    "cp1251": "Привет, как дела? Напиши стихотворение о весне.",
    "cp1252": "Écris un poème sur l'été. Voilà, c'est déjà prêt, ça va.",
}
NAMES = {"gbk": "GB18030", "big5": "BIG5", "shift_jis": "SHIFT_JIS", "euc_jp": "EUC-JP", "euc_kr": "EUC-KR",
         "cp1251": "WINDOWS-1251", "cp1252": "WINDOWS-1252"}  # fmt: skip
UNICODE = {"utf-16": "UTF-16", "utf-16-le": "UTF-16LE", "utf-16-be": "UTF-16BE", "utf-32": "UTF-32"}


@pytest.mark.parametrize("suffix", ["csv", "json", "jsonl", "txt", "tsv"])
@pytest.mark.parametrize("encoding", [*NAMES, *UNICODE])
def test_one_line_names_the_encoding_and_the_command_works(encoding: str, suffix: str, tmp_path: Path) -> None:
    row = {"instruction": SAID.get(encoding, SAID["gbk"]), "output": "good"}
    mark = "\t" if suffix == "tsv" else ","
    table = f"instruction{mark}output\n{row['instruction'].replace(',', '')}{mark}good\n"
    text = {"json": f"[{json.dumps(row, ensure_ascii=False)}]", "jsonl": json.dumps(row, ensure_ascii=False),
            "txt": row["instruction"]}.get(suffix, table)  # fmt: skip
    path = write(tmp_path, f"my data.{suffix}", text.encode(encoding))
    said = refusal(path)
    assert f"iconv -f {NAMES.get(encoding) or UNICODE[encoding]} -t UTF-8" in said
    command = said.split("`")[1]
    subprocess.run(command, shell=True, check=True)  # noqa: S602
    assert len(fields(Path(shlex.split(command)[-1]))) == 1


def test_a_few_bad_bytes_are_the_records_problem(tmp_path: Path) -> None:
    lines = [json.dumps({"text": "天气很好"}, ensure_ascii=False).encode()] * 20 + [b'{"text": "\xe9\xe8"}']
    problems = Problems("skip")
    assert len(list(iter_records(write(tmp_path, "a.jsonl", b"\n".join(lines)), problems=problems))) == 20
    assert dict(problems.kinds) == {"not_utf8": 1}
    assert guess(b"plain") is None
    assert guess(bytes(range(128, 256))) is None
