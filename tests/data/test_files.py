"""Which files a path means: folders, globs, compression, other kinds; what cannot be is refused in words."""

from __future__ import annotations

import bz2
import gzip
import importlib
import json
import lzma
import os
from pathlib import Path
from typing import Any

import pytest

from weft.data import Problems, iter_records, read_records
from weft.errors import UserError

ROWS = [{"instruction": f"q{i} é", "output": "a" * i + "\u2028"} for i in range(1, 400)]
LINES = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).encode()
PACKERS: dict[str, Any] = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}


def fields(path: Any, **options: Any) -> list[dict[str, Any]]:
    return [record.fields for record in iter_records(path, **options)]


def packed(suffix: str) -> Any:
    if suffix == ".zst":
        zstandard = pytest.importorskip("zstandard", reason="the extra weft[zstandard] is not installed")
        return zstandard.ZstdCompressor().compress
    return PACKERS[suffix]


@pytest.mark.parametrize("suffix", [*PACKERS, ".zst"])
def test_compressed_files(suffix: str, tmp_path: Path) -> None:
    pack = packed(suffix)
    for name, content in {"a.jsonl": LINES, "b.json": json.dumps(ROWS, indent=1).encode()}.items():
        path = tmp_path / (name + suffix.upper())
        path.write_bytes(pack(content))
        assert fields(path) == ROWS
        assert read_records(path)[-1].source == f"{path}:{len(ROWS) if 'jsonl' in name else 4 * len(ROWS) - 2}"
    parts = tmp_path / f"c.jsonl{suffix}"
    parts.write_bytes(pack(LINES) + pack(LINES))
    assert fields(parts) == ROWS + ROWS, "frames one after another"
    whole = pack(LINES)
    parts.write_bytes(whole[: len(whole) // 2])
    problems = Problems("skip")
    found = fields(parts, problems=problems)
    assert found == ROWS[: len(found)]
    assert problems.kinds["cut_off"] == 1
    parts.write_bytes(whole[: len(whole) // 2] + b"\xff" * 40 + whole[len(whole) // 2 + 40 :])
    problems = Problems("skip")
    found = fields(parts, problems=problems)
    assert problems.count


def test_zstandard_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "zstandard", None)
    (tmp_path / "a.jsonl.zst").write_bytes(b"\x28\xb5\x2f\xfd")
    with pytest.raises(UserError, match=r"weft\[zstandard\]"):
        fields(tmp_path / "a.jsonl.zst")


def test_xz_that_wants_gigabytes_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl.xz"
    path.write_bytes(lzma.compress(LINES, filters=[{"id": lzma.FILTER_LZMA2, "dict_size": 1 << 30}]))
    with pytest.raises(UserError, match=r"[Mm]emory"):
        fields(path)


def test_folders_and_patterns(tmp_path: Path) -> None:
    (tmp_path / "sub").mkdir()
    for name in ("b.jsonl", "a.jsonl.gz", "sub/c.json", ".hidden.jsonl"):
        content = json.dumps({"n": name}).encode() + b"\n"
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("gz") else content)
    (tmp_path / "README.txt").write_text("no data")
    (tmp_path / "LICENSE").write_text("no data")
    (tmp_path / "dataset_info.json").write_text("{}")
    (tmp_path / "picture.png").write_text("x")
    assert [row["n"] for row in fields(tmp_path)] == ["a.jsonl.gz", "b.jsonl", "sub/c.json"]
    assert [row["n"] for row in fields(str(tmp_path / "*.jsonl*"))] == ["a.jsonl.gz", "b.jsonl"]
    assert [row["n"] for row in fields(str(tmp_path / "**" / "?.js*"))] == ["a.jsonl.gz", "b.jsonl", "sub/c.json"]
    assert len(fields(tmp_path, limit=2)) == 2
    (tmp_path / "x[1].jsonl").write_bytes(LINES)
    assert len(fields(tmp_path / "x[1].jsonl")) == len(ROWS), "a file is itself before it is a pattern"


def refuse(path: Any, *parts: str) -> None:
    with pytest.raises(UserError) as error:
        fields(path)
    for part in parts:
        assert part in str(error.value)


def test_folders_that_cannot_be_read(tmp_path: Path) -> None:
    refuse(tmp_path, "is a directory without data files", "no files", ".jsonl")
    (tmp_path / "a.png").write_text("x")
    refuse(tmp_path, "a.png")
    refuse(str(tmp_path / "*.jsonl"), "no file matches")
    refuse(str(tmp_path / "*.png"), "'.png'", "not read")
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.csv").write_text("a\n1\n")
    refuse(tmp_path, "several kinds", ".csv (1)", ".jsonl (1)", f"such as {tmp_path}/*.jsonl,")
    assert len(fields(f"{tmp_path}/*.jsonl")) == len(ROWS)
    os.link(tmp_path / "a.jsonl", tmp_path / "c.jsonl")
    refuse(str(tmp_path / "*.jsonl"), "stands twice", "a.jsonl", "c.jsonl")
    refuse(tmp_path / "none.jsonl", "no data file at")
    refuse(tmp_path / "aa.jsonl", "no data file at", "Did you mean 'a.jsonl'?")


def test_an_empty_file_among_others_is_a_problem(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "b.jsonl").write_bytes(b"")
    refuse(tmp_path, "b.jsonl: the file is empty")
    problems = Problems("skip")
    assert fields(tmp_path, problems=problems) == ROWS
    assert problems.kinds == {"empty_file": 1}


@pytest.mark.parametrize(
    ("name", "content", "parts"),
    [
        ("a.jsonl", gzip.compress(LINES, mtime=0), ["compressed with gzip", "a", ".jsonl.gz"]),
        ("a.json", b"PAR1xxxx", ["a Parquet file", ".parquet"]),
        ("a.csv", b"PK\x03\x04xxxx", ["zip archive", ".csv"]),
        ("a.txt", "x".encode("utf-16"), ["UTF-16", "UTF-8"]),
        ("a.jsonl.gz", LINES, ["'.gz'", "something else"]),
        ("a.jsonl.xz", gzip.compress(LINES, mtime=0), ["'.xz'", "compressed with gzip"]),
        ("a.parquet", LINES, ["'.parquet'"]),
        ("a.parquet.gz", gzip.compress(b"PAR1", mtime=0), ["compressed inside", "'.gz'"]),
        ("a.tar.gz", gzip.compress(LINES, mtime=0), ["'.tar.gz'", "not read"]),
    ],
)
def test_a_suffix_that_is_not_the_content(name: str, content: bytes, parts: list[str], tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(content)
    refuse(tmp_path / name, str(tmp_path / name), *parts)


@pytest.mark.skipif(os.geteuid() == 0, reason="root may read everything")
def test_a_file_that_may_not_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)
    (tmp_path / "a.jsonl").chmod(0)
    refuse(tmp_path / "a.jsonl", "cannot be read", "Permission denied")


def test_a_read_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "a.jsonl").write_bytes(LINES)

    def fail(*_: Any, **__: Any) -> Any:
        raise OSError(5, "Input/output error")

    monkeypatch.setattr(Path, "open", fail)
    refuse(tmp_path / "a.jsonl", "cannot be read: Input/output error")


# ------------------------------------------------------------------------------------------------------------- columnar


def test_parquet_and_arrow(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow", reason="the extra weft[parquet] is not installed")
    parquet = importlib.import_module("pyarrow.parquet")
    turns = [[{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]] * len(ROWS)
    table = pa.table({"messages": turns, "n": list(range(len(ROWS)))})
    expected = [{"messages": turn, "n": n} for n, turn in enumerate(turns)]
    parquet.write_table(table, tmp_path / "a.parquet", row_group_size=100)
    with pa.ipc.new_file(tmp_path / "b.arrow", table.schema) as writer:
        writer.write_table(table, max_chunksize=70)
    with pa.ipc.new_stream(tmp_path / "c.arrow", table.schema) as writer:
        writer.write_table(table)
    for name in ("a.parquet", "b.arrow", "c.arrow"):
        records = read_records(tmp_path / name)
        assert [record.fields for record in records] == expected
        assert records[300].source == f"{tmp_path / name}:301"
    parquet.write_table(pa.table({"text": ["a", "b\0", "c"]}), tmp_path / "n.parquet")
    problems = Problems("skip")
    assert len(fields(tmp_path / "n.parquet", problems=problems)) == 2
    assert (problems.first[0].kind, problems.first[0].line) == ("nul", 2)
    whole = (tmp_path / "a.parquet").read_bytes()
    (tmp_path / "d.parquet").write_bytes(whole[: len(whole) // 2])
    refuse(tmp_path / "d.parquet", "d.parquet cannot be read")


def test_parquet_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    (tmp_path / "a.parquet").write_bytes(b"PAR1")
    refuse(tmp_path / "a.parquet", 'pip install "weft[parquet]"')


def test_a_folder_that_datasets_saved(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra weft[datasets] is not installed")
    pa = importlib.import_module("pyarrow")
    # Made from tables with a fingerprint of their own: what `datasets` computes one with differs between versions.
    data = datasets.Dataset(pa.Table.from_pylist(ROWS), fingerprint="all")
    indices = datasets.table.InMemoryTable(pa.table({"indices": pa.array([5, 3, 9], type=pa.uint64())}))
    chosen = datasets.Dataset(pa.Table.from_pylist(ROWS), indices_table=indices, fingerprint="three")
    chosen.save_to_disk(tmp_path / "one")
    assert fields(tmp_path / "one") == [ROWS[5], ROWS[3], ROWS[9]]
    datasets.DatasetDict({"train": data, "test": data}).save_to_disk(tmp_path / "two")
    refuse(tmp_path / "two", "splits train, test", str(tmp_path / "two" / "train"))
    assert fields(tmp_path / "two" / "train") == ROWS


def test_datasets_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "datasets", None)
    (tmp_path / "state.json").write_text("{}")
    refuse(tmp_path, 'pip install "weft[datasets]"')
