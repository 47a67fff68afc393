"""A small version of benchmarks/malformed.py: every malformed row at its line, every good row unchanged."""

from __future__ import annotations

import gzip
import lzma
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
from benchmarks import malformed
from tests.kit.tokenizers import byte_tokenizer

from weft.data import Problems, Renderer, iter_records

RENDERER = Renderer(byte_tokenizer(), max_length=malformed.MAX_LENGTH)
KINDS = {**malformed.SYNTAX, **malformed.LINES, **malformed.MEANING, **malformed.CSV, **malformed.TEXT}


def test_there_are_enough_kinds() -> None:
    assert len(KINDS) >= 80


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("name", malformed.PLANTERS)
def test_malformed_rows_among_good_ones(name: str, seed: int, tmp_path: Path) -> None:
    plant, _ = malformed.PLANTERS[name]
    planted = plant(tmp_path / name, 300, 2 * len(KINDS), seed)
    assert len(planted.good) >= 300
    assert malformed.wrong(planted, RENDERER) == []


def test_the_check_sees(tmp_path: Path) -> None:
    planted = malformed.plant_lines(tmp_path / "rows.jsonl", 20, 5, 0)
    planted.good[next(iter(planted.good))] = {"instruction": "other"}
    line, (_, name) = planted.bad.popitem()
    planted.bad[line + 1] = ("nul", name)
    assert [text.split(": ")[1].split(" ")[0] for text in malformed.wrong(planted, RENDERER)] == [
        "good",
        "not",
        "reported",
    ]


@pytest.mark.long
@pytest.mark.parametrize(("suffix", "before", "after"), [
    ("jsonl", b'{"text": "a"}\n{"text": "', b'"}\n{"text": "b"}\n'),
    ("json", b'[{"text": "a"},\n{"text": "', b'"},\n{"text": "b"}]\n'),
    ("json", b'[{"text":"a"},{"text":["', b'"]},{"text":"b"}]'),
    ("json", b'{"text":"a"}{"text":"', b'"}{"text":"b"}'),
    ("txt", b"a\n", b"\nb\n"),
    ("csv", b'text,n\na,1\n"', b'",2\nb,1\n'),
])  # fmt: skip
@pytest.mark.parametrize("unit", ["x", '\\"', "\\\\", "é", "{", "},", '\\\\\\"]'])
def test_a_record_beyond_the_limit_is_skipped(
    suffix: str, before: bytes, after: bytes, unit: str, tmp_path: Path
) -> None:
    path = tmp_path / f"long.{suffix}"
    filling = unit.replace('"', "").replace("\\", "/") if suffix in ("csv", "txt") else unit
    path.write_bytes(before + filling.encode() * (3_000_000 // len(unit)) + after)
    problems = Problems("skip")
    assert [
        r.fields["text"] for r in iter_records(path, problems=problems, record_limit=700_000, text_unit="line")
    ] == ["a", "b"]
    assert dict(problems.kinds) == {"too_long": 1}
    whole = [str(record.fields["text"]) for record in iter_records(path, text_unit="line")]
    assert len(whole) == 3
    assert len(whole[1]) > 700_000


READER = """
import resource, sys
from weft.data import Problems, iter_records
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for path in sys.stdin:
    problems = Problems("skip")
    assert [r.fields for r in iter_records(path.strip(), problems=problems)] == [{"text": "b"}]
    assert problems.kinds == {"too_long": 1}
    print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before, flush=True)
"""


@pytest.mark.long
@pytest.mark.parametrize(
    "suffixes", [("jsonl.gz", "json", "csv"), pytest.param(("jsonl", "jsonl.xz"), marks=pytest.mark.slow)], ids=str
)
def test_memory_does_not_grow_with_a_line(suffixes: tuple[str, ...], tmp_path: Path) -> None:
    """Lines of 160 MiB in a process of its own; benchmarks/malformed.py does it with 1 GiB."""
    with subprocess.Popen(
        [sys.executable, "-c", READER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdin is not None
        assert process.stdout is not None
        for suffix in suffixes:
            path = write_long(tmp_path / f"long.{suffix}", suffix)
            print(path, file=process.stdin, flush=True)
            told = process.stdout.readline()
            path.unlink()
            assert told, f"{suffix}: the reader has ended"
            # MB; 130 for a line (64 twice), 80 in an array. The most so far: what is below the limit was always below.
            assert int(told) / 1024 < 200, suffix


def write_long(path: Path, suffix: str) -> Path:
    """A record of 160 MiB before a short one."""
    packer: Any = {"gz": gzip.open, "xz": partial(lzma.open, preset=0)}.get(suffix.rpartition(".")[2], open)
    with packer(path, "wb") as file:
        file.write({"json": b'[{"text": "', "csv": b'text\n"'}.get(suffix, b'{"text": "'))
        for _ in range(160):
            file.write(b"x" * (1 << 20))
        file.write({"json": b'"},\n{"text": "b"}]', "csv": b'"\nb\n'}.get(suffix, b'"}\n{"text": "b"}\n'))
    return path
