"""What is on a hub, without one: its clients are replaced."""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from weft.errors import UserError
from weft.models import hub


@pytest.mark.parametrize(
    ("data", "expected"),
    [
        ("shibing624/alpaca-zh", True),
        ("owner/name:data/train.json", True),
        ("owner/name.v2", True),
        ("owner/name:validation", True),
        ("owner/name:20231101.en/train", True),
        ("data/train.json", False),
        ("train.json", False),
        ("../x/train", False),
        ("./train", False),
        ("tests/data", False),  # a folder that is there
        ("a/b/c", False),
    ],
)
def test_what_reads_as_a_data_sets_id(data: str, expected: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(Path(__file__).parents[2])
    assert hub.is_dataset_id(data) == expected


class Repository:
    """A stand-in for the hub's client."""

    def __init__(self, files: list[str]) -> None:
        self.files = files

    def list_repo_files(self, name: str, repo_type: str) -> list[str]:
        assert (name, repo_type) == ("owner/name", "dataset")
        return self.files


@pytest.fixture(autouse=True)
def _online(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever the environment says; nothing is reached all the same."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(hub, "_no_answer", lambda endpoint: None)


def with_files(monkeypatch: pytest.MonkeyPatch, files: list[str]) -> None:
    import huggingface_hub

    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: Repository(files))
    monkeypatch.setattr(
        huggingface_hub, "hf_hub_download", lambda name, file, repo_type, local_files_only: f"/cache/{name}/{file}"
    )


def test_one_file_is_taken_and_of_several_the_named_one(monkeypatch: pytest.MonkeyPatch) -> None:
    with_files(monkeypatch, ["README.md", ".gitattributes", "alpaca.json"])
    assert hub.fetch_dataset("owner/name") == Path("/cache/owner/name/alpaca.json")
    with_files(monkeypatch, ["a.json", "b.jsonl"])
    assert hub.fetch_dataset("owner/name:b.jsonl") == Path("/cache/owner/name/b.jsonl")
    with pytest.raises(UserError, match=r"no such file there; there are: a\.json"):
        hub.fetch_dataset("owner/name:c.json")
    with_files(monkeypatch, ["README.md", "dataset_infos.json", "train.csv"])
    assert hub.fetch_dataset("owner/name") == Path("/cache/owner/name/train.csv")


def test_parts_of_one_data_set_are_named_by_a_pattern(monkeypatch: pytest.MonkeyPatch) -> None:
    with_files(monkeypatch, ["data/train-0.parquet", "data/test-0.parquet", "data/train-1.parquet", "train-9.parquet"])
    assert hub.is_dataset_id("owner/name:data/train-*.parquet")
    found = hub.fetch_dataset("owner/name:data/train-*.parquet")
    assert found == Path("/cache/owner/name/data/train-*.parquet")
    with pytest.raises(UserError, match="no such file there"):
        hub.fetch_dataset("owner/name:data/dev-*.parquet")


def test_offline_what_was_fetched_before_is_used(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """``HF_HUB_OFFLINE``, with the hub's own package and a cache as it lays it out."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    folder = tmp_path / "datasets--owner--name"
    for path, text in {"refs/main": "0" * 40, f"snapshots/{'0' * 40}/a.json": "[]"}.items():
        (folder / path).parent.mkdir(parents=True)
        (folder / path).write_text(text)
    assert hub.fetch_dataset("owner/name") == folder / "snapshots" / ("0" * 40) / "a.json"
    with pytest.raises(
        UserError, match="data 'owner/other' is no file here and was not fetched before, and HF_HUB_OFFLINE"
    ):
        hub.fetch_dataset("owner/other")
    with pytest.raises(UserError, match="`hf download owner/other --repo-type dataset --local-dir other`"):
        hub.fetch_dataset("owner/other:a.json")
    with pytest.raises(UserError, match=r"`hf download owner/base --local-dir base`; .*config\.json, .*\.safetensors"):
        hub.fetch_model("owner/base")


def test_an_unreachable_hub_is_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    import huggingface_hub

    def fail() -> None:
        raise ConnectionError("no route\nand much more")

    monkeypatch.setattr(huggingface_hub, "HfApi", fail)
    with pytest.raises(UserError, match=r"'owner/name' is no file here, .* cannot be fetched: no route$"):
        hub.fetch_dataset("owner/name")


def test_modelscope(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setitem(sys.modules, "modelscope", None)
    with pytest.raises(UserError, match=r"pip install \"weft\[modelscope\]\""):
        hub.fetch_model("modelscope/Llama-2-7b-ms", "modelscope")
    client = ModuleType("modelscope")
    client.snapshot_download = lambda name, ignore_file_pattern: f"/cache/{name}"  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "modelscope", client)
    assert hub.fetch_model("modelscope/Llama-2-7b-ms", "modelscope") == "/cache/modelscope/Llama-2-7b-ms"
    assert hub.fetch_model("owner/name") == "owner/name"
    assert hub.fetch_model(str(tmp_path), "modelscope") == str(tmp_path)


def test_a_run_fetches_its_data(monkeypatch: pytest.MonkeyPatch, tiny_llama_dir: Path, tiny_data: Path) -> None:
    from weft.training import make_config, reader, run

    monkeypatch.setattr(reader, "fetch_dataset", lambda data, where: tiny_data)
    given = {"model": str(tiny_llama_dir), "data": "owner/name", "method": "lora", "threads": 1}
    setup = run.prepare(make_config(given))
    assert len(setup.jobs[0].samples) == 24
    setup.adapters.close()


class NoNetwork:
    """A client that reaches nothing; counts how often it was asked."""

    asked = 0

    def head(self, url: str, timeout: float) -> None:
        assert timeout <= 5
        NoNetwork.asked += 1
        raise OSError("no route to host")


@pytest.mark.parametrize("ask", [hub.fetch_model, hub.fetch_dataset])
def test_offline_is_said_at_once(ask: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.undo()
    from huggingface_hub import constants, utils

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", f"https://{ask.__name__}.example")
    monkeypatch.setattr(utils, "get_session", NoNetwork)
    before = NoNetwork.asked
    for _ in range(2):
        with pytest.raises(UserError, match=r"offline.*no route to host") as caught:
            ask("owner/name-that-nobody-fetched")
        for way in ("HF_ENDPOINT", "mirror", "folder", "modelscope", f"{ask.__name__}.example"):
            assert way in str(caught.value)
    assert NoNetwork.asked == before + 1
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(UserError, match="HF_HUB_OFFLINE is set"):
        ask("owner/name-that-nobody-fetched")
