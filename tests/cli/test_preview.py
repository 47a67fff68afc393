"""``weft preview``: what it shows, its exit codes, its JSON and its page."""

from __future__ import annotations

import html.parser
import io
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from rich.cells import cell_len
from rich.console import Console

from weft.cli.preview import _settings, _views
from weft.preview.text import show
from weft.preview.view import View

ROWS = [
    {"instruction": "What colour is the sky over Oslo?", "output": "Blue, most days of the year."},
    {"instruction": "请介绍一下河边的老图书馆。", "output": "老图书馆在山脚下，\n周一不开门😀。"},
    {"instruction": "Count from one to three, slowly.", "output": "One,\ttwo, three."},
    {"instruction": "Name a fruit that is yellow.", "output": "A ripe banana is."},
]


@pytest.fixture
def bare_model(tiny_llama_dir: Path, tmp_path: Path) -> Path:
    """A model's folder without its weights."""
    folder = tmp_path / "bare"
    shutil.copytree(tiny_llama_dir, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    assert not list(folder.glob("*.safetensors"))
    return folder


def write(path: Path, rows: list[Any]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return write(tmp_path / "some.jsonl", ROWS)


def test_without_weights(weft: Callable[..., Any], bare_model: Path, data: Path) -> None:
    result = weft("preview", "--model", bare_model, "--data", data)
    assert result.code == 0, result.err + result.out
    assert "audit: nothing found" in result.out
    assert "Blue, most days of the year.<|im_end|>" in result.out
    lines = [line.split(None, 2) for line in result.out.splitlines()]
    answer = next(line for line in lines if len(line) == 3 and line[2].startswith("Blue,"))
    assert answer[1] == "1"  # the weight
    assert next(line for line in lines if len(line) == 3 and "sky over Oslo" in line[2])[1] == "·"
    assert list(Path.cwd().iterdir()) == []


def test_a_tokenizer_alone_is_enough(weft: Callable[..., Any], bare_model: Path, data: Path) -> None:
    (bare_model / "config.json").unlink()
    assert weft("preview", "--model", bare_model, "--data", data).code == 0


def test_torch_loads_nothing(bare_model: Path, data: Path) -> None:
    """No tensor of the base is ever made."""
    code = (
        "import sys, weft.models.load as load, safetensors, weft.cli.main as main\n"
        "def no(*a, **k): raise AssertionError('weights')\n"
        "load.load_base = load._load_model = safetensors.safe_open = no\n"
        f"sys.exit(main.main(['preview', '--model', {str(bare_model)!r}, '--data', {str(data)!r}]))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False, capture_output=True).returncode == 0


def test_a_configuration_with_an_evaluation(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    rows = [{"instruction": f"Say number {n} in words, please.", "output": f"Number {n * 7919}."} for n in range(24)]
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {bare_model}\ndata: {write(tmp_path / 'd.jsonl', rows)}\nmethod: lora\neval_size: 12\n")
    result = weft("preview", config, "batch_size=3", "--json", "--ignore", "near-duplicate", "--ignore", "leak")
    value = json.loads(result.out)
    assert result.code == 0, value["data"][0]["findings"]
    figures = value["data"][0]["statistics"]
    assert (figures["train"]["records"], figures["eval"]["records"]) == (12, 12)
    (packing,) = value["data"][0]["packing"]
    assert (packing["jobs"], packing["batch_size"], packing["steps"], packing["packs"]) == (["lora"], 3, 4, 4)


def test_named_sets_to_evaluate_on_stand_apart(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    """A record in two sets is no copy; each set has figures and a size of its own."""
    files = {}
    for name, word, count in (("train", "Square of", 24), ("a", "Root of", 12), ("b", "Sign of", 3)):
        rows = [{"instruction": f"{word} {n}?", "output": f"{n * 7919}"} for n in range(count)]
        files[name] = write(tmp_path / f"{name}.jsonl", rows)
    sets = f"eval_data={{domain: {files['a']}, all: [{files['a']}, {files['b']}], few: {files['b']}}}"
    words = ["preview", "--model", bare_model, "--data", files["train"], sets, "--ignore", "near-duplicate"]
    value = json.loads(weft(*words, "--record", f"{files['b']}:2", "--json").out)["data"][0]
    records = {part: figures["records"] for part, figures in value["statistics"].items()}
    assert records == {"train": 24, "eval domain": 12, "eval all": 15, "eval few": 3}
    found = [finding["message"] for finding in value["findings"] if finding["code"] in ("duplicate", "small-eval")]
    assert found == ["3 records to evaluate on (few), beside 24 to train on; 10 or more would do"]
    assert value["samples"][0]["split"] == "eval all"
    told = weft(*words, "--record", f"{files['b']}:2").out
    assert "to evaluate on: all" in told
    assert "eval few data of lora" in told


def test_errors_are_code_1_and_usage_is_code_2(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    rows = [*ROWS, {"instruction": "Name a fruit that is yellow.", "output": "TODO"}, ROWS[0]]
    bad = write(tmp_path / "bad.jsonl", rows)
    result = weft("preview", "--model", bare_model, "--data", bad)
    assert result.code == 1
    assert "error: placeholder-answer" in result.out
    assert f"{bad}:5: the answer is a placeholder" in result.out
    assert f"{bad}:6: the same record as {bad}:1" in result.out
    assert "mend: " in result.out
    assert "audit: 2 errors, 1 warning" in result.out
    warned = weft("preview", "--model", bare_model, "--data", bad, "--ignore", "duplicate",
                  "--ignore", "placeholder-answer")  # fmt: skip
    assert warned.code == 0
    assert "warning: contradiction" in warned.out
    for words in (["--ignore", "nonsense"], ["--record", "99"], ["--record", "other.jsonl:1"], ["trainon=all"]):
        wrong = weft("preview", "--model", bare_model, "--data", bad, *words)
        assert wrong.code == 2, wrong.out
        assert wrong.err.startswith("error: ")
    assert weft("preview").code == 2
    assert weft("preview", "--model", bare_model).code == 2
    assert weft("preview", "--model", bare_model, "--data", "nowhere.jsonl").code == 2


def test_clean_records_are_written_as_they_were(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    extra = {"instruction": "Name a city with a harbour.", "output": "Genoa 🚢 is.", "id": 7, "tags": ["a", None]}
    todo = {"instruction": "Name a tree, please.", "output": "TODO"}
    bad = write(tmp_path / "bad.jsonl", [*ROWS, {"question": "x"}, ROWS[0], todo, extra])
    words = ("preview", "--model", bare_model, "--data", bad)
    result = weft(*words, "--write-clean", "clean.jsonl")
    assert result.code == 1
    assert "5 of 8 records -> clean.jsonl" in result.err
    assert [json.loads(line) for line in Path("clean.jsonl").read_text().splitlines()] == [*ROWS, extra]
    assert weft("preview", "--model", bare_model, "--data", "clean.jsonl").code == 0
    for other, why in (("clean.jsonl", "there already"), ("c.csv", "ends in .jsonl"), ("no/c.jsonl", "not there")):
        refused = weft(*words, "--write-clean", other)
        assert (refused.code, why in refused.err) == (2, True), refused.err
    Path("one.json").write_text(json.dumps([*ROWS, todo, extra]))  # all on one line
    (found,) = json.loads(weft(*words[:4], "one.json", "--write-clean", "one.jsonl", "--json").out)["data"]
    assert [json.loads(line) for line in Path("one.jsonl").read_text().splitlines()] == [*ROWS, extra]
    assert [finding["number"] for finding in found["findings"]] == [5]
    told = weft(*words[:4], "one.json", "--record", "5").out
    assert "TODO" in told
    assert "one.json:1 (record 5): the answer is a placeholder" in told
    alone = write(tmp_path / "todo.jsonl", [todo])
    assert "every record has an error" in weft(*words[:4], alone, "--write-clean", "none.jsonl").err
    assert not Path("none.jsonl").exists()


def test_clean_records_leak_nothing(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    """All records go that are evaluated on: the one, its copy, another answer to its prompt, and nearly the same."""
    story = "In spring the boats of {} come home late, and the whole town waits at the wall with lamps and bread."
    rows = [{"instruction": f"Tell me of {place}.", "output": story.format(place)} for place in ("Bergen", "Ayr")]
    again = [dict(rows[0]), {**rows[0], "output": "No."}, {**rows[1], "instruction": "Tell us of Ayr."}]
    data, held = write(tmp_path / "d.jsonl", [*ROWS, *rows, *again]), write(tmp_path / "held.jsonl", rows)
    words = (
        "preview",
        "--model",
        bare_model,
        f"eval_data={held}",
        "--ignore",
        "duplicate",
        "--ignore",
        "near-duplicate",
    )
    result = weft(*words, "--data", data, "--write-clean", "clean.jsonl")
    assert "error: leak" in result.out
    assert [json.loads(line) for line in Path("clean.jsonl").read_text().splitlines()] == ROWS
    assert "error: leak" not in weft(*words, "--data", "clean.jsonl").out


def test_a_record_that_training_refuses_is_shown(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [ROWS[0], {"instruction": "Say it.", "output": ""}, {"question": "x"}])
    result = weft("preview", "--model", bare_model, "--data", bad, "--record", "bad.jsonl:2", "--record", "3")
    assert result.code == 1
    assert "becomes no sample: the answer (turn 2 of 2) is empty" in result.out
    assert '{"question": "x"}' in result.out
    assert "error: empty-answer" in result.out
    assert "error: not-read" in result.out


def test_a_line_that_begins_no_record(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    table = tmp_path / "table.csv"
    table.write_text('prompt,completion\none,two\nthree,"four\nfive"\n')
    words = ("preview", "--model", bare_model, "--data", table, "--record")
    assert "no record begins at table.csv:4; the one at" in weft(*words, "table.csv:4").err
    for line in (5, 999):
        result = weft(*words, f"table.csv:{line}")
        assert (result.code, result.out) == (2, ""), result.out
        assert f"no such record; the file has 2, the last at {table}:3" in result.err


def test_json_has_everything(weft: Callable[..., Any], bare_model: Path, data: Path) -> None:
    result = weft("preview", "--model", bare_model, "--data", data, "--record", f"{data}:2", "--json")
    value = json.loads(result.out)
    assert value["ok"] is True
    (entry,) = value["data"]
    (sample,) = entry["samples"]
    assert sample["source"] == f"{data}:2"
    (tokens,) = sample["sequences"]
    assert [token["position"] for token in tokens] == list(range(len(tokens)))
    text = "".join(token["text"] for token in tokens)
    assert text == (
        "<|im_start|>user\n请介绍一下河边的老图书馆。<|im_end|>\n<|im_start|>assistant\n"
        "老图书馆在山脚下，\n周一不开门😀。<|im_end|>\n"
    )
    learned = "".join(token["text"] for token in tokens if token["weight"])
    assert learned == "老图书馆在山脚下，\n周一不开门😀。<|im_end|>"
    figures = entry["statistics"]["train"]
    assert figures["records"] == 4
    assert figures["languages"] == {"Latin": 3, "Chinese": 1}
    assert figures["learned_tokens"] == figures["weights"]["1"]


class Page(html.parser.HTMLParser):
    """What a browser would make of the page: its text, and the elements that must not be there."""

    def __init__(self) -> None:
        super().__init__()
        self.text: list[str] = []
        self.tags: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.attributes += attrs
        if tag not in ("meta", "br"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        if self.open and self.open[-1] not in ("style", "script"):
            self.text.append(data)


def test_the_page_escapes_and_fetches_nothing(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    attack = "<script>alert(1)</script> \"onmouseover='x' <img src=http://evil.example/a.png> </td></table></style>"
    rows = [{"instruction": attack, "output": f"No {attack} & more"}, {"instruction": attack}, *ROWS]
    rows.append({"instruction": "Who are you, please?", "output": "I am {{name}}."})
    bad = write(tmp_path / "<b>'\"&.jsonl", rows)
    result = weft("preview", "--model", bare_model, "--data", bad, "--html", "out.html", "--record=1", "--record=2")
    assert result.code == 1
    assert "page -> out.html" in result.out
    source = Path("out.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(source)
    page.close()
    assert page.open == []
    known = "html head meta title style body h1 h2 h3 p span div table tr th td details summary code br sup"
    assert set(page.tags) <= set(known.split())
    assert {name for name, _ in page.attributes} <= {"class", "style", "title", "lang", "charset", "name", "content",
                                                     "http-equiv"}  # fmt: skip
    assert not re.search(r"(src|href)=|url\(|@import", re.sub(r"src=http", "", source))
    text = "".join(page.text)
    assert "".join(attack.split()) in "".join(text.split())
    assert "error: template-variable" in text
    assert "Becomes no sample" in text
    assert "prefers-color-scheme: dark" in source
    assert "default-src 'none'" in source


def view_of(model: Path, data: Path, *words: str) -> View:
    (view,) = _views(_settings(list(words), str(model), str(data)), 4, (), ())
    return view


@pytest.mark.parametrize("width", [60, 80, 120])
def test_lines_fit_however_wide_the_characters(bare_model: Path, tmp_path: Path, width: int) -> None:
    long = "宽字符" * 70 + " and some words in between " + "😀" * 40
    rows = [*ROWS, {"instruction": "数一数", "output": long + "x" * 200}]
    view = view_of(bare_model, write(tmp_path / "wide.jsonl", rows), "max_length=256", "truncate=true")
    screen = io.StringIO()
    show(view, Console(file=screen, width=width, markup=False, highlight=False, force_terminal=True))
    plain = re.sub(r"\x1b\[[0-9;]*m", "", screen.getvalue())
    assert max(cell_len(line) for line in plain.splitlines()) <= width
    for mark in ("⏎", "⇥", "answer-cut"):
        assert mark in plain
    assert "\x1b[1;32m" in screen.getvalue()  # learned tokens: bold green


def test_what_is_typed_cannot_command_the_terminal(bare_model: Path, tmp_path: Path) -> None:
    row = {"instruction": "Say \x1b[31mred\x07 and \u202eturn.", "output": "[bold]No[/bold] \x1b]0;title\x07."}
    screen = io.StringIO()
    view = view_of(bare_model, write(tmp_path / "esc.jsonl", [row]))
    show(view, Console(file=screen, width=100, color_system=None, markup=False, highlight=False), tokens=True)
    assert "\x1b" not in screen.getvalue()
    assert "\x07" not in screen.getvalue()
    assert "\u202e" not in screen.getvalue()
    assert "⟨001B⟩" in screen.getvalue()
    assert "[bold]No[/bold]" in screen.getvalue()


def test_token_table(weft: Callable[..., Any], bare_model: Path, data: Path) -> None:
    result = weft("preview", "--model", bare_model, "--data", data, "--record", "2", "--tokens")
    assert re.search(r"position +id +weight +token +text", result.out)
    assert "(part of a character)" in result.out


def test_classification(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    table = tmp_path / "t.csv"
    words = ["kind", "plain", "loud", "warm", "odd", "slow", "bright", "old"]
    texts = [f"The {words[n % 8]} house {n} by {words[n * 3 % 7]} lake {n * 37}" for n in range(16)]
    rows = [f"{text},{'good' if n % 2 else 'bad'}\n" for n, text in enumerate(texts)]
    table.write_text("text,label\n" + "".join(rows))
    result = weft("preview", "--model", bare_model, "--data", table, "task=sequence_classification")
    assert result.code == 0, result.out
    assert "labels            bad: 8, good: 8" in result.out
    assert "label bad" in result.out


def test_jobs_with_the_same_data_come_together(weft: Callable[..., Any], bare_model: Path, data: Path) -> None:
    result = weft("preview", "--model", bare_model, "--data", data, "method=[lora,prefix_tuning]", "--json")
    assert [entry["jobs"] for entry in json.loads(result.out)["data"]] == [["lora", "prefix_tuning"]]


TEXTS = [{"text": f"Text {n}. " + " ".join(f"Word {n * 31 + i * 7} stands here." for i in range(12))} for n in range(6)]


def told(result: Any) -> dict[str, Any]:
    (entry,) = json.loads(result.out)["data"]
    return entry


def test_a_text_on_both_sides_is_told(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    texts = write(tmp_path / "t.jsonl", TEXTS)
    words = ["documents=windows", "max_length=40", "eval_size=5"]
    result = weft("preview", "--model", bare_model, "--data", texts, *words, "--ignore", "near-duplicate", "--json")
    entry = told(result)
    torn = [finding for finding in entry["findings"] if finding["code"] == "torn-text"]
    assert torn
    assert {finding["severity"] for finding in torn} == {"warning"}
    assert entry["statistics"]["eval"]["samples"] == 5
    whole = weft("preview", "--model", bare_model, "--data", texts, *words[:2], "eval_split=0.3", "--json",
                 "--ignore", "near-duplicate", "--ignore", "leak")  # fmt: skip
    assert not [finding for finding in told(whole)["findings"] if finding["code"] == "torn-text"]
    shown = weft("preview", "--model", bare_model, "--data", texts, *words, "--samples", "9")
    assert "cut from" not in shown.out, "windows cut nothing"


def test_what_is_left_out_is_named_by_its_reason(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    long = {"instruction": "Go on.", "output": "And on, then stop. " * 90}
    rows = [*ROWS, {"instruction": "Say it.", "output": ""}, long]
    data = write(tmp_path / "d.jsonl", rows)
    words = ("empty_answers=skip", "truncation=drop", "max_length=120")
    result = weft("preview", "--model", bare_model, "--data", data, *words)
    assert "1 left out for an empty answer, 1 left out for their length" in result.out
    for some in (words[:1], (*words[:2], "max_length=3")):
        nothing = weft("preview", "--model", bare_model, "--data", write(tmp_path / "e.jsonl", [rows[4]]), *some)
        assert nothing.code == 2, nothing.out + nothing.err
        assert "no record is left: 1 left out for an empty answer" in nothing.err


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["eval_size=4"], "some.jsonl: eval_size 4 leaves nothing to train on"),
        (["eval_data=0.5*some.jsonl + 0.5*other.jsonl"], "eval_data has weights"),
        (["batch_tokens=8"], "do not fit into batch_tokens: 8"),
        (["method=prefix_tuning", "num_virtual_tokens=950"], "tokens and the 950 learned ones of job"),
        (["task=seq2seq"], "task is seq2seq, but a llama model is no encoder-decoder"),
        (["--html", "nowhere/page.html"], "its folder is not there"),
        (["--html", "."], "that is a folder"),
    ],
)
def test_what_training_refuses(
    weft: Callable[..., Any], bare_model: Path, data: Path, tmp_path: Path, words: list[str], said: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "other.jsonl", ROWS)
    result = weft("preview", "--model", bare_model, "--data", data, *words)
    assert result.code == 2, result.out
    assert said in result.err


def test_bad_records_come_before_learned_tokens(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    bad = write(tmp_path / "bad.jsonl", [*ROWS, {"question": "x"}])
    words = ("--model", bare_model, "--data", bad, "method=prefix_tuning", "num_virtual_tokens=950")
    result = weft("preview", *words)
    assert result.code == 1, result.err
    assert f"{bad}:5: " in result.out


def test_records_that_training_leaves_out_are_warnings(
    weft: Callable[..., Any], bare_model: Path, tmp_path: Path
) -> None:
    data = write(tmp_path / "b.jsonl", [*ROWS, {"question": "x"}, {"instruction": "Say it.", "output": ""}])
    assert weft("preview", "--model", bare_model, "--data", data).code == 1
    for mode in ("skip", "report"):
        result = weft("preview", "--model", bare_model, "--data", data, f"on_bad_record={mode}")
        assert result.code == 0, result.out
        assert "left out (on_bad_record): " in result.out
        assert "audit: 0 errors, 2 warnings" in result.out


def test_a_mixture_with_a_source_of_bad_records(
    weft: Callable[..., Any], bare_model: Path, data: Path, tmp_path: Path
) -> None:
    bad = write(tmp_path / "bad.jsonl", [{"question": "x"}, {"question": "y"}])
    result = weft("preview", "--model", bare_model, f"data=0.5*{data} + 0.5*{bad}", "--json")
    assert result.code == 1, result.err
    entry = told(result)
    assert [finding["source"] for finding in entry["findings"]] == [f"{bad}:1", f"{bad}:2"]
    assert entry["packing"] == []


def test_a_fault_of_the_tokenizer_is_no_finding(weft: Callable[..., Any], bare_model: Path, data: Path) -> None:
    """It would be found at every record, with advice to mend the record."""
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        path = bare_model / name
        if path.is_file():
            kept = {key: value for key, value in json.loads(path.read_text()).items() if key != "eos_token"}
            path.write_text(json.dumps(kept))
    result = weft("preview", "--model", bare_model, "--data", data)
    assert result.code == 2, result.out
    assert "eos_token" in result.err
    assert "some.jsonl:1" not in result.err


@pytest.mark.parametrize(
    ("words", "code"),
    [
        (["data=bad.jsonl", "on_bad_record=skip"], 1),
        (["data=0.5*a.jsonl + 0.5*bad.jsonl", "on_bad_record=skip"], 1),
        (["data=a.jsonl", "eval_data=bad.jsonl", "on_bad_record=report"], 1),
        (["data=bad.jsonl", "on_bad_record=skip", "eval_size=4"], 2),
        (["data=empty.jsonl", "eval_data=a.jsonl", "empty_answers=skip"], 2),
        (["data=a.jsonl", "eval_data=empty.jsonl", "empty_answers=skip"], 2),
        (["data=[a.jsonl, empty.jsonl]", "empty_answers=skip"], 2),
    ],
)
def test_nothing_left_of_a_source(weft: Callable[..., Any], bare_model: Path, words: list[str], code: int) -> None:
    """Training ends there, so the preview must not say that all is well."""
    write(Path("a.jsonl"), ROWS)
    write(Path("bad.jsonl"), [{"question": "x"}, {"question": "y"}])
    write(Path("empty.jsonl"), [{"instruction": "Say it.", "output": ""}])
    result = weft("preview", "--model", bare_model, *words)
    assert result.code == code, result.out + result.err


def test_figures_of_a_torn_text_are_of_its_parts(weft: Callable[..., Any], bare_model: Path, tmp_path: Path) -> None:
    texts = write(tmp_path / "t.jsonl", TEXTS)
    result = weft("preview", "--model", bare_model, "--data", texts, "documents=windows", "max_length=40",
                  "eval_size=5", "--json", "--ignore", "near-duplicate")  # fmt: skip
    figures = told(result)["statistics"]
    assert figures["eval"]["lengths"]["max"] <= 80
    assert figures["eval"]["samples"] == 5
