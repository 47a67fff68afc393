"""Malformed rows mixed into good ones: is each reported at its line, and is every good one read unchanged?

python benchmarks/malformed.py            10,000 malformed rows among 100,000 good ones, and lines of 1 GiB
python benchmarks/malformed.py --small    a hundredth of that, and no long lines
"""

from __future__ import annotations

import argparse
import csv
import gzip
import io
import json
import random
import resource
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from weft.data import Problems, Record, Renderer, iter_records
from weft.data.formats.turns import EmptyAnswerError
from weft.data.pipeline import Fold, TextRecipe, outcomes
from weft.data.settings import ReadSettings

MAX_LENGTH = 600
Bad = tuple[str, bytes]  # the kind of problem that is expected, and the row


def _alpaca(**fields: Any) -> bytes:
    return json.dumps({"instruction": "Say it.", "output": "It."} | fields).encode()


def _chat(*turns: dict[str, Any], **fields: Any) -> bytes:
    return json.dumps({"messages": list(turns), **fields}).encode()


_Q, _A = {"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}
# Rows that are no JSON object at all; also in arrays, one record per line.
SYNTAX: dict[str, Bad] = {
    "byte that is no UTF-8": ("not_utf8", b'{"instruction": "caf\xe9", "output": "x"}'),
    "truncated UTF-8 sequence": ("not_utf8", b'{"instruction": "\xe4\xb8", "output": "x"}'),
    "overlong UTF-8": ("not_utf8", b'{"instruction": "\xc0\xaf", "output": "x"}'),
    "surrogate encoded as UTF-8": ("not_utf8", b'{"instruction": "\xed\xa0\x80", "output": "x"}'),
    "high surrogate alone": ("half_character", b'{"instruction": "\\ud83d", "output": "x"}'),
    "low surrogate alone": ("half_character", b'{"instruction": "\\ude00 x", "output": "x"}'),
    "surrogates swapped": ("half_character", b'{"instruction": "\\ude00\\ud83d", "output": "x"}'),
    "surrogate in a key": ("half_character", b'{"instruction": "a", "output": "x", "\\uD800": 1}'),
    "NUL as an escape": ("nul", b'{"instruction": "a\\u0000", "output": "x"}'),
    "raw NUL": ("malformed_json", b'{"instruction": "a\x00b", "output": "x"}'),
    "raw control character": ("malformed_json", b'{"instruction": "a\x01", "output": "x"}'),
    "raw tab in a string": ("malformed_json", b'{"instruction": "a\tb", "output": "x"}'),
    "missing brace": ("malformed_json", b'{"instruction": "a", "output": "x"'),
    "missing quotation mark": ("malformed_json", b'{"instruction": "a, "output": "x"}'),
    "string not closed": ("malformed_json", b'{"instruction": "a", "output": "x}'),
    "missing colon": ("malformed_json", b'{"instruction" "a", "output": "x"}'),
    "missing comma": ("malformed_json", b'{"instruction": "a" "output": "x"}'),
    "trailing comma": ("malformed_json", b'{"instruction": "a", "output": "x",}'),
    "single quotation marks": ("malformed_json", b"{'instruction': 'a', 'output': 'x'}"),
    "bare key": ("malformed_json", b'{instruction: "a", "output": "x"}'),
    "Python's None": ("malformed_json", b'{"instruction": "a", "input": None, "output": "x"}'),
    "comment": ("malformed_json", b'{"instruction": "a", /* c */ "output": "x"}'),
    "unknown escape": ("malformed_json", b'{"instruction": "\\x41", "output": "x"}'),
    "cut escape": ("malformed_json", b'{"instruction": "\\u12", "output": "x"}'),
    "leading zero": ("malformed_json", b'{"instruction": "a", "output": "x", "n": 012}'),
    "NaN": ("not_a_number", b'{"instruction": "a", "output": "x", "n": NaN}'),
    "Infinity": ("not_a_number", b'{"instruction": "a", "output": "x", "n": [Infinity]}'),
    "-Infinity": ("not_a_number", b'{"instruction": "a", "output": "x", "n": -Infinity}'),
    "1e400": ("number_too_large", b'{"instruction": "a", "output": "x", "n": 1e400}'),
    "10^400": ("number_too_large", b'{"instruction": "a", "output": "x", "n": 1' + b"0" * 400 + b"}"),
    "5,000 digits": ("number_too_large", b'{"instruction": "a", "output": "x", "n": ' + b"7" * 5000 + b"}"),
    "field twice": ("duplicate_key", b'{"instruction": "a", "output": "x", "output": "y"}'),
    "field twice inside": ("duplicate_key", b'{"messages": [{"role": "user", "role": "system", "content": "a"}]}'),
    "string": ("not_an_object", b'"instruction"'),
    "number": ("not_an_object", b"7"),
    "null": ("not_an_object", b"null"),
    "true": ("not_an_object", b"true"),
    "list of strings": ("not_an_object", b'["instruction", "output"]'),
}
# Only where a line is a record.
LINES: dict[str, Bad] = {
    "UTF-16": ("malformed_json", '{"instruction": "a"}'.encode("utf-16-le")),
    "two objects": ("malformed_json", b'{"instruction": "a", "output": "x"} {"instruction": "b", "output": "y"}'),
    "comma after the object": ("malformed_json", b'{"instruction": "a", "output": "x"},'),
    "plain text": ("malformed_json", b"instruction: a"),
    "HTML": ("malformed_json", b"<html><body>502</body></html>"),
    "brackets 100,000 deep": ("too_deep", b"[" * 100_000),
    "objects 100,000 deep": ("too_deep", b'{"a":' * 100_000),
    "deep and closed": ("too_deep", b'{"a": ' + b"[" * 100_000 + b"]" * 100_000 + b"}"),
}
# JSON objects that cannot be learned from.
MEANING: dict[str, Bad] = {
    "no fields": ("format", b"{}"),
    "unknown fields": ("format", b'{"foo": "a", "bar": "b"}'),
    "instruction a number": ("format", _alpaca(instruction=7)),
    "instruction a list": ("format", _alpaca(instruction=["a"])),
    "output a list": ("format", _alpaca(output=["a"])),
    "output an object": ("format", _alpaca(output={"a": 1})),
    "output true": ("format", _alpaca(output=True)),
    "input a number": ("format", _alpaca(input=7)),
    "system a number": ("format", _alpaca(system=7)),
    "history a string": ("format", _alpaca(history="a")),
    "history with odd pairs": ("format", _alpaca(history=[["a"]])),
    "empty instruction": ("format", _alpaca(instruction=" ")),
    "empty answer": ("empty_answer", _alpaca(output="")),
    "answer of white space": ("empty_answer", _alpaca(output=" \n\t")),
    "messages a string": ("format", b'{"messages": "a"}'),
    "no messages": ("format", b'{"messages": []}'),
    "message a number": ("format", b'{"messages": ["a", 7]}'),
    "unknown role": ("format", _chat({"role": "wizard", "content": "q"}, _A)),
    "role a number": ("format", _chat({"role": 1, "content": "q"}, _A)),
    "no role": ("format", _chat({"content": "q"}, _A)),
    "no content": ("format", _chat(_Q, {"role": "assistant"})),
    "content a number": ("format", _chat(_Q, {"role": "assistant", "content": 7})),
    "no assistant": ("format", _chat(_Q)),
    "tools no JSON": ("format", _chat(_Q, _A, tools="{")),
    "tool call without a name": ("format", _chat(_Q, {"role": "assistant", "tool_calls": [{"arguments": {}}]})),
    "loss a word": ("format", _chat(_Q, _A | {"loss": "yes"})),
    "unknown speaker": ("format", b'{"conversations": [{"from": "elf", "value": "q"}, {"from": "gpt", "value": "a"}]}'),
    "prompt and completion of two types": ("format", b'{"prompt": "a", "completion": []}'),
    "empty text": ("format", b'{"text": "  "}'),
    "only an answer": ("render", _chat(_A)),
    "longer than max_length": ("render", _alpaca(output="word " * 2000)),
}
CSV: dict[str, Bad] = {
    "cell missing": ("row_width", b"only one"),
    "cell too many": ("row_width", b"a,b,c"),
    "quotation mark left open": ("malformed_row", b'"left open,answer'),
    "text after a quoted cell": ("malformed_row", b'"a"b,c'),
    "byte that is no UTF-8 (csv)": ("not_utf8", b"caf\xe9,b"),
    "NUL (csv)": ("nul", b"a\x00,b"),
    "empty answer (csv)": ("empty_answer", b"a,"),
    "empty instruction (csv)": ("format", b",b"),
}
TEXT: dict[str, Bad] = {
    "byte that is no UTF-8 (txt)": ("not_utf8", b"caf\xe9 noir"),
    "NUL (txt)": ("nul", b"a\x00b"),
}


_UNUSABLE = {"format", "empty_answer", "render"}  # read as records, but no samples


@dataclass
class Planted:
    """A file, what is good in it (line to fields) and what is bad (line to kind and name)."""

    path: Path
    good: dict[int, dict[str, Any]] = field(default_factory=dict)
    bad: dict[int, Bad] = field(default_factory=dict)


def _good(rng: random.Random, number: int) -> dict[str, Any]:
    words = [
        "loom",
        "weft",
        "Schuß",
        "织机",
        "a\u2028b",
        'he said "no"',
        "x, y",
        "😀",
        "{",
        "}, {",
        "\\",
        "tab\tand\nline",
    ]
    text = " ".join(rng.choices(words, k=rng.randint(1, 6)))
    return {"instruction": f"{number}: {text}", "output": rng.choice(words) + str(number)}


def _plan(good: int, kinds: dict[str, Bad], bad: int, rng: random.Random) -> list[str | int]:
    """Names of bad rows, every kind about equally often, among the numbers of good ones."""
    names: list[str | int] = [name for _, name in zip(range(bad), list(kinds) * (bad // len(kinds) + 1), strict=False)]
    rows: list[str | int] = [*range(good), *names]
    rng.shuffle(rows)
    return rows


def plant_lines(path: Path, good: int, bad: int, seed: int) -> Planted:
    """JSON Lines: mixed line ends, blank lines, a byte order mark; compressed if the name says so."""
    rng, planted, kinds = random.Random(seed), Planted(path), {**SYNTAX, **LINES, **MEANING}
    data, line = bytearray(b"\xef\xbb\xbf"), 0
    for row in _plan(good, kinds, bad, rng):
        line += 1
        if isinstance(row, int):
            planted.good[line] = _good(rng, row)
            data += json.dumps(planted.good[line], ensure_ascii=rng.random() < 0.5).encode()
        else:
            planted.bad[line] = (kinds[row][0], row.encode())
            data += kinds[row][1]
        data += b"\r\n" if rng.random() < 0.2 else b"\n"
        if rng.random() < 0.05:
            data, line = data + b" \n", line + 1
    path.write_bytes(gzip.compress(bytes(data), 1) if path.suffix == ".gz" else data)
    return planted


def plant_array(path: Path, good: int, bad: int, seed: int) -> Planted:
    """A JSON array of indented records; broken ones stand on one line each."""
    rng, planted, kinds = random.Random(seed), Planted(path), {**SYNTAX, **MEANING}
    parts, line = [b"["], 1
    rows = _plan(good, kinds, bad, rng)
    for place, row in enumerate(rows):
        line += 1
        if isinstance(row, int):
            planted.good[line] = _good(rng, row)
            text = json.dumps(planted.good[line], indent=2, ensure_ascii=False).replace("\n", "\n  ").encode()
        else:
            text = kinds[row][1]
            planted.bad[line] = (kinds[row][0], row.encode())
        parts.append(b"  " + text + (b"," if place + 1 < len(rows) else b""))
        line += text.count(b"\n")
    path.write_bytes(b"\n".join(parts) + b"\n]\n")
    return planted


def plant_table(path: Path, good: int, bad: int, seed: int) -> Planted:
    """CSV: cells with separators, quotation marks and line breaks."""
    rng, planted = random.Random(seed), Planted(path)
    data, line = bytearray(b"instruction,output\n"), 2
    for row in [*_plan(good, CSV, bad, rng), good]:  # a mark left open needs a row after it
        if isinstance(row, int):
            planted.good[line] = _good(rng, row)
            text = io.StringIO()
            quoting = csv.QUOTE_ALL if rng.random() < 0.5 else csv.QUOTE_MINIMAL
            csv.writer(text, lineterminator="\n", quoting=quoting).writerow(planted.good[line].values())
            raw = text.getvalue().encode()
        else:
            planted.bad[line] = (CSV[row][0], row.encode())
            raw = CSV[row][1] + b"\n"
        data += raw
        line += raw.count(b"\n")
    path.write_bytes(data)
    return planted


def plant_text(path: Path, good: int, bad: int, seed: int) -> Planted:
    """Lines of text."""
    rng, planted = random.Random(seed), Planted(path)
    rows = []
    for line, row in enumerate(_plan(good, TEXT, bad, rng), start=1):
        if isinstance(row, int):
            planted.good[line] = {"text": f"line {row} 织"}
            rows.append(planted.good[line]["text"].encode())
        else:
            planted.bad[line] = (TEXT[row][0], row.encode())
            rows.append(TEXT[row][1])
    path.write_bytes(b"\n".join(rows) + b"\n")
    return planted


PLANTERS: dict[str, tuple[Callable[[Path, int, int, int], Planted], float]] = {
    "rows.jsonl": (plant_lines, 0.6),
    "rows.jsonl.gz": (plant_lines, 0.1),
    "rows.json": (plant_array, 0.2),
    "rows.csv": (plant_table, 0.08),
    "rows.txt": (plant_text, 0.02),
}


def wrong(planted: Planted, renderer: Renderer) -> list[str]:
    """Everything about one file that is not as planted."""
    found: list[str] = []
    problems = Problems("report")
    read = {_line(record): record.fields for record in iter_records(planted.path, problems=problems, text_unit="line")}
    for line, fields in planted.good.items():
        if read.get(line) != fields:
            found.append(f"{planted.path.name}:{line}: good row changed or missed: {read.get(line)!r:.80}")
    extra = read.keys() - planted.good.keys() - {n for n, (kind, _) in planted.bad.items() if kind in _UNUSABLE}
    found += [f"{planted.path.name}:{line}: a malformed row was read" for line in extra]
    problems = Problems("report", errors={"empty_answer": EmptyAnswerError})
    recipe = TextRecipe(renderer=renderer, settings=ReadSettings(text_unit="line"))
    fold = Fold(planted.path, recipe, problems)
    sources = [sample.source for sample, _ in fold.samples(outcomes(planted.path, recipe))]
    if sources != [f"{planted.path}:{line}" for line in planted.good]:
        found.append(f"{planted.path.name}: {len(sources)} samples, expected {len(planted.good)} in order")
    report = planted.path.with_suffix(".report")
    problems.write(report)
    rows = [json.loads(line) for line in report.read_text().splitlines()]
    told = [(row["line"], row["kind"]) for row in rows]
    expected = [(line, kind) for line, (kind, _) in planted.bad.items()]
    if told != expected:
        for line, kind in (Counter(expected) - Counter(told)).elements():
            found.append(f"{planted.path.name}:{line}: not reported as {kind} ({planted.bad[line][1].decode()})")
        for line, kind in (Counter(told) - Counter(expected)).elements():
            what = planted.bad.get(line, ("", b"a good row"))[1].decode()
            found.append(f"{planted.path.name}:{line}: reported as {kind}, which is {what}")
    return found


def _line(record: Record) -> int:
    return int(record.source.rpartition(":")[2])


def peak_mb() -> float:
    """Most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (1 << 20 if sys.platform == "darwin" else 1 << 10)


def long_lines(folder: Path) -> list[str]:
    """Lines and records of 1 GiB, and 1 GiB packed into 1 MiB: reported, skipped, and the rows around them read."""
    found = []
    around = {
        "long.jsonl": (b'{"text": "a"}\n{"text": "', b'"}\n{"text": "b"}\n'),
        "long.json": (b'[{"text": "a"},\n{"text": "', b'"},\n{"text": "b"}]\n'),
        "long.txt": (b"a\n", b"\nb\n"),
        "long.csv": (b'text,n\na,1\n"', b'",2\nb,1\n'),
        "bomb.jsonl.gz": (b'{"text": "a"}\n{"text": "', b'"}\n{"text": "b"}\n'),
    }
    for name, (before, after) in around.items():
        path = folder / name
        with gzip.open(path, "wb", 1) if path.suffix == ".gz" else path.open("wb") as file:
            file.write(before)
            for _ in range(1024):
                file.write(b"x" * (1 << 20))
            file.write(after)
        problems, start = Problems("skip"), time.perf_counter()
        texts = [record.fields["text"] for record in iter_records(path, problems=problems, text_unit="line")]
        if texts != ["a", "b"] or problems.kinds != {"too_long": 1}:
            found.append(f"{name}: read {len(texts)} rows, problems {dict(problems.kinds)}")
        print(f"  {name}: {time.perf_counter() - start:.1f} s, peak so far {peak_mb():.0f} MB")
        path.unlink()
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true")
    small = parser.parse_args().small
    found: list[str] = []
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        if not small:
            base = peak_mb()
            print(f"lines of 1 GiB (memory before: {base:.0f} MB)")
            found += long_lines(folder)
            above = peak_mb() - base
            print(f"  memory above that before: {above:.0f} MB (limit 300)")
            found += [f"memory rose by {above:.0f} MB"] if above > 300 else []
        from transformers import AutoTokenizer

        from weft.models.load import resolve_model

        renderer = Renderer(AutoTokenizer.from_pretrained(resolve_model("tiny-llama")), max_length=MAX_LENGTH)
        good, bad, base, kinds = (1000, 100, peak_mb(), set()) if small else (100_000, 10_000, peak_mb(), set())
        total, start = Counter[str](), time.perf_counter()
        for seed, (file, (plant, share)) in enumerate(PLANTERS.items()):
            planted = plant(folder / file, round(good * share), round(bad * share), seed)
            found += wrong(planted, renderer)
            kinds |= {name for _, name in planted.bad.values()}
            total.update(kind for kind, _ in planted.bad.values())
        seconds = time.perf_counter() - start
        print(f"{total.total()} malformed rows of {len(kinds)} kinds among {good} good ones, {seconds:.0f} s")
        print(f"  by kind of problem: {', '.join(f'{kind} {count}' for kind, count in total.most_common())}")
        print(f"  memory above that before (with what was planted): {peak_mb() - base:.0f} MB")
    for line in found[:50]:
        print("WRONG", line)
    print("all reported at their line, all good rows unchanged" if not found else f"{len(found)} WRONG")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
