"""What Arrow's columns hold, as JSON would say it; what `datasets` notes in a schema is heeded without the package."""

from __future__ import annotations

import importlib
import json
from pathlib import Path
from typing import Any

import pytest

from weft.data import Problems, read_records
from weft.data.reading.files import Shards, find_files, unique
from weft.errors import UserError

TURNS = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
TEXT = {"dtype": "string", "_type": "Value"}


@pytest.fixture
def pa() -> Any:
    return pytest.importorskip("pyarrow", reason="the extra weft[parquet] is not installed")


def write(pa: Any, path: Path, table: Any, features: Any = None) -> Path:
    if features is not None:
        noted = json.dumps({"info": {"features": features}})
        table = table.replace_schema_metadata({"huggingface": noted})
    with pa.ipc.new_stream(path, table.schema) as writer:
        writer.write_table(table)
    return path


def fields(path: Any, problems: Problems | None = None) -> list[dict[str, Any]]:
    return [record.fields for record in read_records(path, problems=problems)]


def test_keys_that_arrow_filled_in_are_absent(pa: Any, tmp_path: Path) -> None:
    """A tool's schema would be rendered with the parameters of all other tools, null each."""
    schemas = [
        [{"name": "f", "parameters": {"x": {"type": "int"}}}],
        [{"name": "g", "parameters": {"y": None, "z": [1, None]}}],
    ]
    path = write(pa, tmp_path / "a.arrow", pa.table({"tools": schemas, "top": [None, "x"]}))
    assert fields(path) == [
        {"tools": schemas[0], "top": None},
        {"tools": [{"name": "g", "parameters": {"z": [1, None]}}], "top": "x"},
    ]


@pytest.mark.parametrize("kind", ["Sequence", "List", None])
def test_turns_as_lists_side_by_side(kind: str | None, pa: Any, tmp_path: Path) -> None:
    """As `datasets` before 4 noted it, as it does now, and without a note."""
    parts: dict[str, Any] = {"role": TEXT, "content": TEXT}
    noted: Any = {"feature": parts, "_type": "Sequence"}
    if kind == "List":
        noted = {name: {"feature": part, "_type": "List"} for name, part in parts.items()}
    beside = {"role": ["user", "assistant"], "content": ["q", "a"]}
    uneven = {"role": ["user"], "content": ["q", "a"]}
    table = pa.table({"messages": [beside, None, uneven], "n": [{"a": [1], "b": [2]}] * 3})
    path = write(pa, tmp_path / "a.arrow", table, {"messages": noted} if kind else None)
    assert [row["messages"] for row in fields(path)] == [TURNS, None, uneven]
    assert fields(path)[0]["n"] == {"a": [1], "b": [2]}
    one = {"role": "user", "content": "four"}
    assert fields(write(pa, tmp_path / "c.arrow", pa.table({"turn": [one], "turns": [[one]]}))) == [
        {"turn": one, "turns": [one]}
    ], "one turn is no list, though its texts are equally long"
    side = pa.table({"conversations": [{"from": ["human", "gpt"], "value": ["q", "a"], "extra": [None, "x"]}]})
    rows = fields(write(pa, tmp_path / "b.arrow", side))
    assert rows == [{"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a", "extra": "x"}]}]


def test_names_of_classes(pa: Any, tmp_path: Path) -> None:
    label = {"names": ["neg", "pos"], "_type": "ClassLabel"}
    table = pa.table({"label": [1, 0, -1, None, 7], "tags": [[0, 1], [], None, [None], [1]]})
    noted = {"label": label, "tags": {"feature": label, "_type": "Sequence"}}
    found = fields(write(pa, tmp_path / "a.arrow", table, noted))
    assert [row["label"] for row in found] == ["pos", "neg", None, None, 7]
    assert [row["tags"] for row in found] == [["neg", "pos"], [], None, [None], ["pos"]]
    plain = fields(write(pa, tmp_path / "b.arrow", table))
    assert [row["label"] for row in plain] == [1, 0, -1, None, 7]


def test_pictures_are_not_read(pa: Any, tmp_path: Path) -> None:
    blob = {"bytes": b"\xff", "path": "x.png"}
    media = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    table = pa.table(
        {
            "scan": pa.array([blob, None], media),
            "audio": pa.array([[], [blob]], pa.list_(media)),
            "parts": pa.array([[{"image": blob, "text": None}], [{"image": None, "text": "t"}]],
                              pa.list_(pa.struct([("image", media), ("text", pa.string())]))),
        }
    )  # fmt: skip
    noted: Any = {
        "scan": {"_type": "Image"},
        "audio": {"feature": {"_type": "Audio"}, "_type": "List"},
        "parts": {"feature": {"image": {"_type": "Image"}, "text": TEXT}, "_type": "List"},
    }
    found = fields(write(pa, tmp_path / "a.arrow", table, noted))
    assert found == [{"images": True, "parts": [{"image": True}]}, {"audio": True, "parts": [{"text": "t"}]}]


def test_json_in_a_column(pa: Any, tmp_path: Path) -> None:
    table = pa.table({"tools": ['[{"name": "f", "default": null}]', None, "[1", "{}"]})
    path = write(pa, tmp_path / "a.arrow", table, {"tools": {"_type": "Json"}})
    problems = Problems("skip")
    assert fields(path, problems) == [{"tools": [{"name": "f", "default": None}]}, {"tools": None}, {"tools": {}}]
    assert [(p.kind, p.line) for p in problems.first] == [("malformed_json", 3)]


def test_bytes_that_are_no_text(pa: Any, tmp_path: Path) -> None:
    raw = pa.array([b"a", b"b\xff", b"c"], pa.binary()).view(pa.string())
    problems = Problems("skip")
    assert fields(write(pa, tmp_path / "a.arrow", pa.table({"text": raw})), problems) == [{"text": "a"}, {"text": "c"}]
    assert [(p.kind, p.line) for p in problems.first] == [("not_utf8", 2)]
    assert "byte 0xff" in problems.first[0].what


@pytest.mark.parametrize("noted", [b"{", b"[]", b'{"info": null}', b'{"info": {"features": []}}', b"\xff"])
def test_a_damaged_note_is_no_note(noted: bytes, pa: Any, tmp_path: Path) -> None:
    table = pa.table({"label": [1]}).replace_schema_metadata({b"huggingface": noted})
    assert fields(write(pa, tmp_path / "a.arrow", table)) == [{"label": 1}]


def test_maps_are_objects(pa: Any, tmp_path: Path) -> None:
    table = pa.table({"m": pa.array([[("a", 1)], None], pa.map_(pa.string(), pa.int64()))})
    assert fields(write(pa, tmp_path / "a.arrow", table)) == [{"m": {"a": 1}}, {"m": None}]


def test_shards_are_one_data_set(pa: Any, tmp_path: Path) -> None:
    tables = [pa.table({"text": [f"{n}.{i}" for i in range(300)]}) for n in range(3)]
    files = tuple(write(pa, tmp_path / f"{n}.arrow", table) for n, table in enumerate(tables))
    shards = Shards("owner/name/train", files)
    records = read_records(shards)
    assert [record.fields["text"] for record in records] == [f"{n}.{i}" for n in range(3) for i in range(300)]
    assert [record.source for record in records[298:302]] == [f"owner/name/train:{n}" for n in range(299, 303)]
    assert find_files(shards) == list(files)
    with pytest.raises(UserError, match="stands twice"):
        unique([*find_files(shards), files[1]])
    empty = Shards("owner/name/none", (write(pa, tmp_path / "none.arrow", tables[0].slice(0, 0)),))
    with pytest.raises(UserError, match=r"^owner/name/none: the data set holds no records"):
        read_records(empty)


def test_a_saved_folder_reads_like_the_files(pa: Any, tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets", reason="the extra weft[datasets] is not installed")
    info = importlib.import_module("datasets").DatasetInfo
    features = datasets.Features({"label": datasets.ClassLabel(names=["neg", "pos"]), "image": datasets.Image()})
    table = pa.Table.from_pylist(
        [{"label": 1, "image": None}, {"label": 0, "image": {"bytes": b"no picture", "path": None}}],
        schema=features.arrow_schema,
    )
    data = datasets.Dataset(table, info=info(features=features), fingerprint="pictures")
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved")
    assert fields(tmp_path / "saved" / "train") == [{"label": "pos"}, {"label": "neg", "image": True}]
