"""Data sets of a hub that are not one plain file, without a hub: what `datasets` reads lies in a folder here.

Only what lists and downloads is replaced; `datasets` itself reads the folder, and its cache is a temporary one.
"""

from __future__ import annotations

import importlib
import io
import json
import sys
import tarfile
from collections.abc import Callable
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest

from weft.data import Problems, iter_records, read_records
from weft.data.reading.files import Shards
from weft.errors import UserError
from weft.models import hub
from weft.models.hub_datasets import HubSplit, load_split

CONFIGS = """---
configs:
- config_name: en
  data_files:
  - {split: train, path: en/train.jsonl}
  - {split: validation, path: en/dev.jsonl}
- config_name: zh
  data_files:
  - {split: dev, path: zh/dev.jsonl}
  - {split: test, path: zh/test.jsonl}
---
"""


@pytest.fixture
def datasets(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The real package, with a cache of its own."""
    pytest.importorskip("datasets", reason="the extra weft[datasets] is not installed")
    package = importlib.import_module("datasets")
    monkeypatch.setattr(package.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    package.disable_progress_bars()
    return package


Serve = Callable[[dict[str, str | bytes]], Path]


@pytest.fixture
def serve(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Serve:
    """Make these files the repository ``owner/name``."""
    folder = tmp_path / "repository"

    def files(given: dict[str, str | bytes]) -> Path:
        for name, content in given.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content.encode() if isinstance(content, str) else content)
        return folder

    def listing(name: str, where: str, *, fetched: bool) -> list[str]:
        assert name == "owner/name"
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if path.is_file())

    monkeypatch.setattr(hub, "_list_files", listing)
    monkeypatch.setattr(hub, "_download", lambda name, file, where, *, fetched: str(folder / file))
    monkeypatch.setattr(hub, "load_split", lambda data, name, files: load_split(data, str(folder), files))
    return files


def lines(*rows: Any) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def said(text: str) -> dict[str, str]:
    return {"instruction": text, "output": "a"}


def table(name: str, *rows: Any) -> dict[str, str]:
    return {name: lines(*rows)}


def fetched(data: str) -> tuple[str, list[dict[str, Any]]]:
    """The name of what ``data`` is, and its records."""
    found = hub.fetch_dataset(data)
    assert isinstance(found, HubSplit), found
    assert all(file.is_file() for file in found.files)
    records = read_records(Shards(found.name, found.files))
    assert [record.source for record in records] == [f"{found.name}:{n + 1}" for n in range(len(records))]
    return found.name, [record.fields for record in records]


TWO: dict[str, str | bytes] = {
    "README.md": CONFIGS,
    **table("en/train.jsonl", said("one"), said("two")),
    **table("en/dev.jsonl", said("three")),
    **table("zh/dev.jsonl", said("四")),
    **table("zh/test.jsonl", said("五")),
}
PLAIN: dict[str, str | bytes] = {
    **table("data/train.jsonl", said("one"), said("two")),
    **table("data/validation.jsonl", said("three")),
}


def test_splits_and_configurations(datasets: Any, serve: Serve) -> None:
    serve(TWO)
    assert fetched("owner/name:en") == ("owner/name/en/train", [said("one"), said("two")])
    assert fetched("owner/name:en/validation") == ("owner/name/en/validation", [said("three")])
    assert fetched("owner/name:zh/test") == ("owner/name/zh/test", [said("五")])


def test_the_configuration_that_the_data_set_marks(datasets: Any, serve: Serve) -> None:
    serve({**TWO, "README.md": CONFIGS.replace("- config_name: en\n", "- config_name: en\n  default: true\n")})
    assert fetched("owner/name") == ("owner/name/en/train", [said("one"), said("two")])
    assert fetched("owner/name:validation") == ("owner/name/en/validation", [said("three")])
    assert fetched("owner/name:zh/test") == ("owner/name/zh/test", [said("五")])
    with pytest.raises(UserError, match="has no configuration 'fr': en, zh"):
        hub.fetch_dataset("owner/name:fr/train")


def test_one_configuration(datasets: Any, serve: Serve) -> None:
    serve(PLAIN)
    assert fetched("owner/name") == ("owner/name/train", [said("one"), said("two")])
    assert fetched("owner/name:validation") == ("owner/name/validation", [said("three")])
    assert fetched("owner/name:default/validation")[0] == "owner/name/validation"


def test_the_only_split_is_taken(datasets: Any, serve: Serve) -> None:
    serve({**table("a/test.jsonl", said("one")), **table("b/test.jsonl", said("two"))})
    assert fetched("owner/name") == ("owner/name/test", [said("one"), said("two")])


def test_files_and_patterns_win(datasets: Any, serve: Serve) -> None:
    folder = serve({**PLAIN, "train": "a file of this name"})
    assert hub.fetch_dataset("owner/name:data/train.jsonl") == folder / "data/train.jsonl"
    assert hub.fetch_dataset("owner/name:data/*.jsonl") == folder / "data/*.jsonl"
    assert hub.fetch_dataset("owner/name:train") == folder / "train"
    with pytest.raises(UserError, match=r"no such file there; there are: data/train\.jsonl, data/validation\.jsonl"):
        hub.fetch_dataset("owner/name:data/none.jsonl")


def test_one_file_needs_no_package(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    folder = serve({"README.md": "", **table("alpaca.json", said("one"))})
    assert hub.fetch_dataset("owner/name") == folder / "alpaca.json"


@pytest.mark.parametrize(
    ("files", "data", "parts"),
    [
        (TWO, "owner/name", ["has several configurations: en, zh", "owner/name:en", "owner/name:en/train"]),
        (TWO, "owner/name:fr/train", ["has no configuration 'fr': en, zh"]),
        (TWO, "owner/name:train", ["has no configuration 'train': en, zh"]),
        (TWO, "owner/name:en/test", ["no split (and no file) 'test'", "train, validation", "owner/name:en/train."]),
        (TWO, "owner/name:zh", ["no split 'train', but several: dev, test", "owner/name:zh/dev"]),
        (PLAIN, "owner/name:test", ["no split (and no file) 'test'; its splits are: train, validation"]),
        (PLAIN, "owner/name:x/train", ["neither such a file nor a configuration 'x'", "owner/name:train."]),
        ({"name.py": "", **PLAIN}, "owner/name", ["a script of its own (name.py)", "runs no code", "data/train.jsonl"]),
        ({"a.bin": "x", "b.bin": "y"}, "owner/name", ["cannot be read by the package `datasets`", "a.bin, b.bin"]),
        ({**table("a/train.jsonl", {"n": 1}), "b/train.jsonl": "{"}, "owner/name", ["cannot be read by", "a/train.j"]),
    ],
)
def test_what_is_not_clear_is_refused(
    files: dict[str, str | bytes], data: str, parts: list[str], datasets: Any, serve: Serve
) -> None:
    serve(files)
    with pytest.raises(UserError) as error:
        hub.fetch_dataset(data)
    for part in (f"data {data!r}", *parts):
        assert part in str(error.value)
    assert "\n" not in str(error.value)


def test_without_the_package(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "datasets", None)
    serve({**PLAIN, **{f"more/{n:02}.csv": "a" for n in range(30)}})
    for data, what in (("owner/name", "it is not one plain file"), ("owner/name:test", "'test' is no file")):
        with pytest.raises(UserError) as error:
            hub.fetch_dataset(data)
        for part in (what, 'pip install "weft[datasets]"', "owner/name:<file>", "data/train.jsonl, ", "and 12 more"):
            assert part in str(error.value)


def test_the_exact_call(serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    """The name and the configuration; nothing that would run code, and nothing held in memory."""
    calls: list[Any] = []
    package = ModuleType("datasets")

    def load_dataset(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return {"train": SimpleNamespace(cache_files=[{"filename": "/c/a-0.arrow"}, {"filename": "/c/a-1.arrow"}])}

    package.get_dataset_config_names = lambda name: ["en"] if name == "owner/one" else ["en", "zh"]  # type: ignore[attr-defined]
    package.get_dataset_default_config_name = lambda name: None  # type: ignore[attr-defined]
    package.load_dataset = load_dataset  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "datasets", package)
    found = load_split("owner/name:zh", "owner/name", ["a.tar"])
    assert found == HubSplit("owner/name/zh/train", (Path("/c/a-0.arrow"), Path("/c/a-1.arrow")))
    assert load_split("owner/one", "owner/one", []).name == "owner/one/train"
    in_cache = {"keep_in_memory": False, "trust_remote_code": False}
    assert calls == [(("owner/name", "zh"), in_cache), (("owner/one", None), in_cache)]


def test_modelscope(datasets: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "scope"
    for name, text in PLAIN.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(str(text))
    client = ModuleType("modelscope.hub.snapshot_download")
    client.dataset_snapshot_download = lambda name: str(folder)  # type: ignore[attr-defined]
    for name in ("modelscope", "modelscope.hub"):
        monkeypatch.setitem(sys.modules, name, ModuleType(name))
    monkeypatch.setitem(sys.modules, client.__name__, client)
    found = hub.fetch_dataset("owner/name:validation", "modelscope")
    assert isinstance(found, HubSplit)
    assert [record.fields for record in read_records(Shards(found.name, found.files))] == [said("three")]
    (folder / "dataset_dict.json").write_text("{}")
    assert hub.fetch_dataset("owner/name:train", "modelscope") == folder / "train"


# ------------------------------------------------------------------------------------------------------------- contents


def test_parquet_with_classes_and_media(datasets: Any, serve: Serve, tmp_path: Path) -> None:
    """Several files, names of classes, a picture in one record only; null is absent."""
    pa, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    features = datasets.Features(
        {
            "text": datasets.Value("string"),
            "label": datasets.ClassLabel(names=["neg", "pos"]),
            "tags": datasets.List(datasets.ClassLabel(names=["O", "B"])),
            "picture": datasets.Image(),
            "sounds": datasets.List(datasets.Audio()),
        }
    )
    blob = {"bytes": b"\x89PNG" + b"x" * 100, "path": None}
    rows = [
        {"text": "a", "label": 1, "tags": [0, 1], "picture": None, "sounds": []},
        {"text": "b", "label": 0, "tags": [], "picture": blob, "sounds": None},
        {"text": None, "label": -1, "tags": None, "picture": None, "sounds": [blob, blob]},
    ]
    folder = serve({"data/x": ""})
    for number, part in enumerate((rows[:2], rows[2:])):
        written = pa.Table.from_pylist(part, schema=features.arrow_schema)
        parquet.write_table(written, folder / f"data/train-0000{number}-of-00002.parquet")
    expected: list[dict[str, Any]] = [
        {"text": "a", "label": "pos", "tags": ["O", "B"]},
        {"text": "b", "label": "neg", "tags": [], "images": True},
        {"text": None, "label": None, "tags": None, "audios": True},
    ]
    assert fetched("owner/name")[1] == expected
    assert [record.fields for record in read_records(folder / "data")] == expected, "the files themselves read alike"
    problems = Problems("skip")
    found = hub.fetch_dataset("owner/name")
    assert isinstance(found, HubSplit)
    from weft.data import to_example

    second = list(iter_records(Shards(found.name, found.files), problems=problems))[1]
    del second.fields["label"]
    with pytest.raises(UserError, match="owner/name/train:2: the field 'images' is not read by the format 'text'"):
        to_example(second)


def test_nested_values(datasets: Any, serve: Serve) -> None:
    """Turns as lists of objects and as lists side by side, keys that only some records have, JSON in columns."""
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
    beside = {"role": ["user", "assistant"], "content": ["q", "a"]}
    call = {"role": "assistant", "content": None, "tool_calls": [{"name": "f", "arguments": {"x": 1}}]}
    other = {"role": "assistant", "content": None, "tool_calls": [{"name": "g", "arguments": {"y": ["z"]}}]}
    serve(
        {
            **table("test.jsonl", {"messages": turns, "answers": {"text": ["x"], "at": [3]}, "talk": beside}),
            **table(
                "train.jsonl",
                {"messages": turns, "answers": {"text": ["x"], "at": [3]}, "talk": beside},
                {"messages": [turns[0], call], "answers": None, "talk": beside},
                {"messages": [turns[0], other], "answers": None, "talk": None},
            ),
            "README.md": "---\nconfigs:\n- {config_name: one, data_files: train.jsonl}\n---\n",
        }
    )
    rows = fetched("owner/name")[1]

    def said_by(turn: dict[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in turn.items() if value is not None}

    assert [[said_by(turn) for turn in row["messages"]] for row in rows] == [
        turns,
        [turns[0], said_by(call)],
        [turns[0], said_by(other)],
    ]
    assert [row["talk"] for row in rows] == [turns, turns, None]
    assert rows[0]["answers"] == {"text": ["x"], "at": [3]}, "other lists side by side stay so"


def test_several_shards_in_the_cache(datasets: Any, serve: Serve, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.builder, "MAX_SHARD_SIZE", 20_000, raising=False)
    monkeypatch.setattr(datasets.config, "MAX_SHARD_SIZE", 20_000)
    monkeypatch.setattr(datasets.config, "DEFAULT_MAX_BATCH_SIZE", 50)
    rows = [said(f"{n} {'x' * 100}") for n in range(2000)]
    serve({**table("a/train.jsonl", *rows[:1500]), **table("b/train.jsonl", *rows[1500:])})
    assert fetched("owner/name")[1] == rows
    found = hub.fetch_dataset("owner/name")
    assert isinstance(found, HubSplit)
    assert len(found.files) > 1
    limited = list(iter_records(Shards(found.name, found.files), limit=3))
    assert [record.fields for record in limited] == rows[:3]


def test_other_builders(datasets: Any, serve: Serve) -> None:
    """What Weft has no reader for: archives of files (webdataset)."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w") as archive:
        for number, text in enumerate(("one", "two")):
            entry = tarfile.TarInfo(f"{number}.json")
            content = json.dumps(said(text)).encode()
            entry.size = len(content)
            archive.addfile(entry, io.BytesIO(content))
    serve({"train-0.tar": packed.getvalue()})
    assert [row["json"] for row in fetched("owner/name")[1]] == [said("one"), said("two")]


def test_bad_rows_stand_at_the_data_sets_name(datasets: Any, serve: Serve) -> None:
    serve({**table("a/train.jsonl", said("one"), said("a\0b")), **table("b/train.jsonl", said("two"))})
    found = hub.fetch_dataset("owner/name")
    assert isinstance(found, HubSplit)
    problems = Problems("skip")
    records = list(iter_records(Shards(found.name, found.files), problems=problems))
    assert [record.fields for record in records] == [said("one"), said("two")]
    assert [(p.kind, p.place) for p in problems.first] == [("nul", "owner/name/train:2")]


# ----------------------------------------------------------------------------------------------------------------- runs


def test_a_run_and_a_preview(
    datasets: Any,
    serve: Serve,
    tmp_path: Path,
    tiny_llama_dir: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    from weft.cli.main import main

    held = table("data/validation.jsonl", said("x"), {"output": "a"})
    serve({**table("data/train.jsonl", *map(said, "abcdef")), **held})
    monkeypatch.chdir(tmp_path)
    words = ["--model", str(tiny_llama_dir), "--data", "owner/name"]
    run = ["train", *words, "--output-dir", "run", "method=lora", "steps=1"]
    assert main([*run, "eval_data=owner/name:validation"]) == 2
    assert "owner/name/validation:2: the record fits no known format" in capsys.readouterr().err
    assert main(run) == 0
    kept = json.loads((tmp_path / "run/adapters/lora/weft.json").read_text())["data"]
    assert (kept["settings"]["data"], kept["records"]) == ("owner/name", 6)
    capsys.readouterr()
    main(["preview", *words, "--json"])
    shown = json.loads(capsys.readouterr().out)["data"][0]
    assert shown["samples"][0]["source"] == "owner/name/train:1"


def test_classes_by_their_names(datasets: Any, serve: Serve) -> None:
    from tests.kit.tokenizers import byte_tokenizer

    from weft.data import Renderer, load_labelled

    pa, parquet = importlib.import_module("pyarrow"), importlib.import_module("pyarrow.parquet")
    features = datasets.Features({"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["pos", "neg"])})
    folder = serve({"data/x": ""})
    rows = [{"text": f"t{n}", "label": n % 2} for n in range(4)]
    for split in ("train", "test"):
        parquet.write_table(pa.Table.from_pylist(rows, schema=features.arrow_schema), folder / f"data/{split}.parquet")
    found = hub.fetch_dataset("owner/name:test")
    assert isinstance(found, HubSplit)
    shards = Shards(found.name, found.files)
    samples, names = load_labelled(shards, Renderer(byte_tokenizer()))
    assert names == ("neg", "pos")
    assert [names[sample.label or 0] for sample in samples] == ["pos", "neg"] * 2
    assert load_labelled(shards, Renderer(byte_tokenizer()), labels=["pos", "neg"])[0][0].label == 0


def test_a_saved_data_set_without_rows(datasets: Any, tmp_path: Path) -> None:
    datasets.Dataset.from_dict({"instruction": [], "output": []}).save_to_disk(str(tmp_path / "empty"))
    with pytest.raises(UserError, match="holds no records"):
        read_records(tmp_path / "empty")
