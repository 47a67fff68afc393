"""Texts: by paragraph, by file, by line; pages; and what an audit says of lines that were meant as one text."""

from __future__ import annotations

import json
import time
import tracemalloc
from pathlib import Path
from typing import Any

import pytest
from tests.kit.tokenizers import byte_tokenizer

from weft.data import Problems, Renderer, iter_records, load_samples, read_records
from weft.data.auditing.audit import audit_before_training
from weft.data.reading.pages import text_of
from weft.errors import UserError
from weft.files.run_folder import RUN_FILE
from weft.training.config import make_config, read_run_config

TEXT = "\n# One\ntwo \n  three\n\n \n\tfour\n\nfive"


def texts(path: Path, **options: Any) -> list[tuple[str, int]]:
    records = read_records(path, **options)
    return [(str(record.fields["text"]), int(record.source.rpartition(":")[2])) for record in records]


@pytest.mark.parametrize("end", ["\n", "\r\n", "\r", "\r\r\n"])
@pytest.mark.parametrize("suffix", ["txt", "md"])
def test_units(suffix: str, end: str, tmp_path: Path) -> None:
    path = tmp_path / f"a.{suffix}"
    path.write_bytes(TEXT.replace("\n", end).encode())
    units: dict[str, list[str]] = {
        "file": ["# One\ntwo \n  three\n\n\n\tfour\n\nfive"],
        "paragraph": ["# One\ntwo \n  three", "\tfour", "five"],
        "line": ["# One", "two ", "  three", "\tfour", "five"],
    }
    for unit, expected in units.items():
        assert [text for text, _ in texts(path, text_unit=unit)] == expected, unit
    default = "paragraph" if suffix == "txt" else "file"
    assert texts(path) == texts(path, text_unit=default)
    if end != "\r\r\n":
        assert [line for _, line in texts(path, text_unit="paragraph")] == [2, 7, 9]


def test_a_file_without_blank_lines_is_one_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one\ntwo\n")
    assert texts(tmp_path / "a.txt") == [("one\ntwo", 1)]


def test_a_bad_line_spoils_its_text_only(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_bytes(b"a\n\nb\nc\0\nd\n\nlong long\n\ne\n")
    problems = Problems("skip")
    found = [r.fields["text"] for r in iter_records(tmp_path / "a.txt", problems=problems, record_limit=8)]
    assert found == ["a", "e"]
    assert [(one.kind, one.line) for one in problems.first] == [("nul", 4), ("too_long", 7)]
    (tmp_path / "a.txt").write_text("1234\n5678\n")
    with pytest.raises(UserError, match=r"a\.txt:1: the text that begins here is longer.*text_unit: line"):
        list(iter_records(tmp_path / "a.txt", text_unit="file", record_limit=8))


def test_memory_does_not_grow_with_a_text(tmp_path: Path) -> None:
    peaks = []
    for count in (2, 6):
        (tmp_path / "a.txt").write_text("x" * 99 + "\n" * 1, encoding="utf-8")
        with (tmp_path / "a.txt").open("w") as file:
            for _ in range(count * 10_000):
                file.write("x" * 99 + "\n")
        tracemalloc.start()
        assert not list(iter_records(tmp_path / "a.txt", problems=Problems("skip"), record_limit=1 << 19))
        peaks.append(tracemalloc.get_traced_memory()[1])
        tracemalloc.stop()
    assert peaks[1] - peaks[0] < 1 << 19, peaks


def test_lines_that_were_meant_as_one_text_are_noticed(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "a.txt"
    path.write_text("".join(f"line {number}\n" for number in range(40)))
    renderer = Renderer(byte_tokenizer())
    for unit, told in {"line": True, "file": False}.items():
        caplog.clear()
        samples = load_samples(path, renderer, text_unit=unit)  # type: ignore[arg-type]
        audit_before_training(renderer, samples, [])
        assert ("short-texts" in caplog.text) is told, unit
        assert ("40 of 40 texts have fewer than 20 tokens" in caplog.text) is told
    answers = tmp_path / "a.jsonl"
    answers.write_text('{"prompt": "q", "completion": "a"}\n' * 40)
    assert audit_before_training(renderer, load_samples(answers, renderer), []) == []


def test_a_run_of_before_goes_on_by_line(tmp_path: Path) -> None:
    run = tmp_path / RUN_FILE
    made = make_config({"model": "m", "method": "lora", "data": "a.txt"}).model_dump(mode="json")
    run.write_text(json.dumps({"config": made}))
    assert read_run_config(tmp_path).text_unit is None
    del made["text_unit"]
    for data, unit in {"a.txt": "line", "a.jsonl": None}.items():
        run.write_text(json.dumps({"config": {**made, "data": data}}))
        assert read_run_config(tmp_path).text_unit == unit


# ---------------------------------------------------------------------------------------------------------------- pages

PAGE = """<!DOCTYPE html><html><head><title>T</title><style>p {}</style></head><!-- no > --><body class="a>b">
<h1>Head &amp; shoulders</h1><p>Some <b>bold</b>
text.<br>Next &lt; 3 < 4 中文<ul><li>one<li>two</ul>
<table><tr><td>a<td>b</tr><tr><td>c<td>d</table><pre>x
  y</pre><script>if (a < b) { "</p>" }</script><SCRIPT src=x></script>end</body></html>"""


def test_a_page_is_what_a_browser_shows(tmp_path: Path) -> None:
    (tmp_path / "a.html").write_text(PAGE, encoding="utf-8")
    expected = ["Head & shoulders", "Some bold text.\nNext < 3 < 4 中文", "one\ntwo", "a\tb\nc\td", "x\n  y", "end"]
    assert texts(tmp_path / "a.html") == [("\n\n".join(expected), 1)]
    assert [text for text, _ in texts(tmp_path / "a.html", text_unit="paragraph")] == expected


@pytest.mark.parametrize(
    "piece", ["<!", "<a ", "<a b='", "<a '\">", "<!--x>", "&#", "<", "<p>", "<![CDATA[", "<script>", "</scrip", "<?x"]
)
def test_hostile_pages_take_linear_time(piece: str) -> None:
    started = time.perf_counter()
    text_of(piece * 200_000)
    assert time.perf_counter() - started < 30, "the standard library's parser takes minutes to hours"
    text_of("&#" + "9" * 10_000 + ";")


def test_kinds_of_texts_may_lie_together_and_describe_records(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("one")
    (tmp_path / "b.md").write_text("two")
    (tmp_path / "c.html").write_text("<p>three")
    assert [text for text, _ in texts(tmp_path)] == ["one", "two", "three"]
    (tmp_path / "a.txt").unlink()
    (tmp_path / "d.jsonl").write_text('{"text": "record"}')
    assert [text for text, _ in texts(tmp_path)] == ["record"]
