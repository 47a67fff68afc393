"""What a configuration says about data, down to the samples of a job."""

from __future__ import annotations

import gc
import hashlib
import json
import tracemalloc
import weakref
from itertools import compress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from tests import kit
from tests.kit.tokenizers import byte_tokenizer

from weft.core.head import TokenHead
from weft.data import Renderer, Sample, split_holdout
from weft.data.auditing.audit import audit_before_training
from weft.data.pipeline import Acceptance, TextRecipe, outcomes
from weft.data.settings import ReadSettings
from weft.data.sources import held_by_hash
from weft.errors import UserError
from weft.models import describe
from weft.training import Job, JobConfig, RunConfig, load_config, make_config
from weft.training.batches import Batches
from weft.training.reader import JobData, Reader, data_files

ARCHITECTURE = describe(kit.make_model("qwen2"))


def rows(folder: Path, name: str, count: int, bad: int = 0) -> str:
    lines = [json.dumps({"instruction": f"{name} {i}", "output": "a"}) for i in range(count)] + ["{"] * bad
    (folder / name).write_text("\n".join(lines) + "\n")
    return str(folder / name)


def config(data: Any, **more: Any) -> RunConfig:
    return make_config({"model": "none", "method": "lora", "data": data, **more})


def read(made: RunConfig) -> JobData:
    return read_with(made, Renderer(byte_tokenizer()))


def read_with(made: RunConfig, renderer: Renderer) -> JobData:
    return Reader(made, renderer, ARCHITECTURE, data_files(made)).job(made.jobs[0])


def test_sources_and_their_shares(tmp_path: Path) -> None:
    a, b = rows(tmp_path, "a.jsonl", 70), rows(tmp_path, "b.jsonl", 100)
    for data in (f"0.7*{a} + 0.3*{b}", [{"path": a, "weight": 7}, {"path": b, "weight": 3}]):
        found = read(config(data))
        assert (found.mixture.sizes, found.mixture.per_epoch, len(found.train)) == ((70, 100), 100, 170)
    found = read(config([a, {"path": b, "limit": 5}]))
    assert (found.mixture.sizes, found.mixture.per_epoch) == ((70, 5), 75)
    found = read(config(str(tmp_path)))
    assert found.mixture.sizes == (170,)
    found = read(config([a, b], eval_size=20))
    assert (sum(found.mixture.sizes), len(found.held)) == (150, 20)
    found = read(config([a, b], eval_split=0.2))
    assert sum(found.mixture.sizes) == len(found.train) == 170 - len(found.held)
    assert 15 < len(found.held) < 55


def test_the_split_is_the_same_for_other_files(tmp_path: Path) -> None:
    a, b = rows(tmp_path, "a.jsonl", 80), rows(tmp_path, "b.jsonl", 80)
    held = {tuple(sample.input_ids) for sample in read(config([a, b], eval_split=0.2)).held}
    again = {tuple(sample.input_ids) for sample in read(config(b, eval_split=0.2)).held}
    assert again
    assert again < held
    train = {tuple(sample.input_ids) for sample in read(config([a, b], eval_split=0.2)).train}
    assert not train & held


def listed(made: RunConfig, renderer: Renderer, paths: list[str]) -> tuple[list[Sample], list[Sample]]:
    """What a job trains on and holds out, made of lists."""
    keyed = TextRecipe(renderer=renderer, settings=ReadSettings(text_unit="line"), keyed=True)
    found = [[one for one in outcomes(path, keyed) if isinstance(one, Acceptance)] for path in paths]
    pairs = [(number, sample, one.key) for number, part in enumerate(found) for one in part for sample in one.samples]
    if made.eval_split is not None:
        held = held_by_hash((key for _, _, key in pairs), made.eval_split)
        sides = [pair for pair, out in zip(pairs, held, strict=True) if not out], list(compress(pairs, held))
    else:
        sides = split_holdout(pairs, made.eval_size, seed=0)
    numbers = range(len(paths))
    train, held = (
        [one for number in numbers for one in renderer.join(sample for n, sample, _ in side if n == number)]
        for side in sides
    )
    return train, held


@pytest.mark.parametrize("split", [{}, {"eval_size": 17}, {"eval_split": 0.2}], ids=str)
@pytest.mark.parametrize("documents", ["separate", "joined", "windows"])
@pytest.mark.parametrize("memory", [0, 64 << 20])
def test_samples_from_the_store_are_those_of_lists(
    split: dict[str, Any], documents: Any, memory: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.training.reader.MEMORY", memory)
    paths = [str(tmp_path / name) for name in ("a.txt", "b.jsonl")]
    Path(paths[0]).write_text("".join(f"{n} {'ab' * (n % 31)}\n" for n in range(80)))
    Path(paths[1]).write_text("".join(json.dumps({"prompt": f"{n}", "completion": "c"}) + "\n" for n in range(40)))
    renderer = Renderer(byte_tokenizer(), max_length=50, truncation="right", documents=documents)
    made = config(paths, max_length=50, truncation="right", documents=documents, text_unit="line", **split)
    reader = Reader(made, renderer, ARCHITECTURE, data_files(made))
    found = reader.job(made.jobs[0])
    train, held = listed(made, renderer, paths)
    assert (list(found.train), list(found.held)) == (train, held)
    assert sum(found.mixture.sizes) == len(train)
    assert bool(held) is bool(split)

    digest = hashlib.sha256()
    for sample in (*train, *held):
        digest.update(repr((sample.input_ids, sample.weights)).encode())
    kept = SimpleNamespace(
        adapter=SimpleNamespace(head=TokenHead()), samples=found.train, eval_samples=found.held, eval_sizes={}
    )
    assert Job.__dict__["fingerprint"].func(kept) == digest.hexdigest()


@pytest.mark.parametrize("documents", [pytest.param("separate", marks=pytest.mark.slow), "joined"])
def test_memory_does_not_grow_with_the_data(documents: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From the file to the first batch; as lists the larger one's tokens would be 27 MB more."""
    monkeypatch.setattr("weft.training.reader.MEMORY", 0)
    renderer = Renderer(byte_tokenizer(), max_length=3000, documents=documents)
    peaks = []
    for count in (150, 450):
        path = tmp_path / f"{count}.txt"
        path.write_text("".join(f"{number} {'xyz' * 700}\n" for number in range(count)))
        made = config(str(path), max_length=3000, documents=documents, text_unit="line", eval_split=0.1)
        tracemalloc.start()
        try:
            found = read_with(made, renderer)
            audit_before_training(renderer, found.train, found.held, "warn")
            Job.__dict__["fingerprint"].func(
                SimpleNamespace(
                    adapter=SimpleNamespace(head=TokenHead()),
                    samples=found.train,
                    eval_samples=found.held,
                    eval_sizes={},
                )
            )
            batches = Batches(JobConfig(name="one", method="lora", batch_tokens=3000), found.train)
            assert batches[0][0]
            peaks.append(tracemalloc.get_traced_memory()[1])
        finally:
            tracemalloc.stop()
    assert peaks[1] - peaks[0] < 2 << 20, peaks


def test_documents_are_let_go_when_they_are_joined(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("some words\n" * 50)
    made = config(str(tmp_path / "a.txt"), max_length=50, documents="joined", text_unit="line")
    reader = Reader(made, Renderer(byte_tokenizer(), max_length=50, documents="joined"), ARCHITECTURE, data_files(made))
    documents = weakref.ref(reader.stores[0])
    found = reader.job(made.jobs[0])
    # pytest keeps what an assert compares.
    before = documents() is not None
    del reader
    gc.collect()
    gone = documents() is None
    assert before
    assert gone
    assert found.train[0].input_ids


def test_a_configuration_file_with_sources(tmp_path: Path) -> None:
    a, b = rows(tmp_path, "a.jsonl", 3), rows(tmp_path, "b.jsonl", 3)
    path = tmp_path / "run.yaml"
    path.write_text(
        f"model: none\nmethod: lora\ndata:\n  - {{path: {a}, weight: 0.5}}\n  - {{path: {b}, weight: 0.5}}\n"
    )
    made = load_config(path)
    assert read(made).mixture.weights == (0.5, 0.5)
    assert RunConfig.model_validate(json.loads(made.model_dump_json())) == made


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"data": "0.5*a + 0.2*b"}, "sum to 0.7"),
        ({"data": 7}, "data: data is 7; expected a path"),
        ({"eval_split": 0.1, "eval_size": 3}, "exclude each other"),
        ({"eval_split": 0.1, "eval_data": "x"}, "exclude each other"),
        ({"eval_split": 1.5}, "eval_split"),
        ({"bad_records_file": "x"}, "bad_records_file is for on_bad_record: report"),
        ({"on_bad_record": "ignore"}, "on_bad_record"),
        ({"data_workers": -1}, "data_workers"),
    ],
)
def test_configurations_that_cannot_be(more: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        config(**{"data": "x", **more})


def test_data_that_cannot_be(tmp_path: Path) -> None:
    a = rows(tmp_path, "a.jsonl", 5)
    for data, text in [
        ([a, a], "stands twice"),
        ([str(tmp_path), a], "stands twice"),
        (str(tmp_path / "none.jsonl"), "no data file at"),
        (str(tmp_path / "*.csv"), "no file matches"),
        (f"1*{a} + 999*{rows(tmp_path, 'b.jsonl', 5)}", "none of them from source 1"),
    ]:
        made = config(data)
        with pytest.raises(UserError, match=text):
            _ = read(made).mixture.per_epoch
    with pytest.raises(UserError, match="eval_data has weights"):
        read(config(a, eval_data=f"1*{a} + 2*{rows(tmp_path, 'b.jsonl', 5)}"))


def test_jobs_that_read_alike_read_once_and_problems_are_kept(tmp_path: Path) -> None:
    a = rows(tmp_path, "a.jsonl", 5, bad=30)
    made = config(a, method=["lora", "prefix_tuning"], on_bad_record="report")
    reader = Reader(made, Renderer(byte_tokenizer()), ARCHITECTURE, data_files(made))
    one, other = reader.job(made.jobs[0]), reader.job(made.jobs[1])
    assert one.train is other.train  # not only equal: nothing is kept twice
    assert len(one.train) == 5
    assert reader.problems.count == 30
    reader.problems.write(tmp_path / "report.jsonl")
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == 30
    with pytest.raises(UserError, match="more than 20 records"):
        read(config(a))


def test_the_report_lies_in_the_folder_of_the_run(tiny_llama_dir: Path, tmp_path: Path) -> None:
    from weft.training.run import train

    a = rows(tmp_path, "a.jsonl", 5, bad=2)
    made = config(
        a, model=str(tiny_llama_dir), on_bad_record="report", output_dir=str(tmp_path / "run"), steps=1, resume=True
    )
    for _ in range(2):
        train(made)
        lines = (tmp_path / "run" / "bad_records.jsonl").read_text().splitlines()
        assert [json.loads(line)["line"] for line in lines] == [6, 7]


@pytest.mark.parametrize("more", [{}, {"bad_records_file": "all.jsonl"}])
def test_the_report_is_there_when_nothing_is_left(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, more: dict[str, Any]
) -> None:
    """A source of bad records only ends the run, and then the list is wanted most; the next try may have the folder."""
    from weft.training.run import train

    monkeypatch.chdir(tmp_path)
    good, bad = rows(tmp_path, "a.jsonl", 5), rows(tmp_path, "b.jsonl", 0, bad=30)
    options = {"model": str(tiny_llama_dir), "on_bad_record": "report", "output_dir": "run", "steps": 1, **more}
    report = Path(more.get("bad_records_file", "run/bad_records.jsonl"))
    with pytest.raises(UserError, match=r"nothing would be left(.|\n)*" + str(report)) as error:
        train(config([good, bad], **options))
    assert "on_bad_record: skip" not in str(error.value)
    assert len(report.read_text().splitlines()) == 30
    assert train(config([good], **options)).completed


def test_a_bad_record_counts_once_however_often_it_is_read(tmp_path: Path) -> None:
    """Two jobs with labels of their own read a file each in its way."""
    path = tmp_path / "c.csv"
    path.write_text("text,label\n" + "one,a\ntwo,b\n,a\nthree,\n")
    jobs = [
        {"name": "".join(labels), "task": "sequence_classification", "labels": labels}
        for labels in (["a", "b"], ["b", "a"])
    ]
    made = config(str(path), jobs=jobs, on_bad_record="report")
    reader = Reader(made, Renderer(byte_tokenizer()), ARCHITECTURE, data_files(made))
    for job in made.jobs:
        reader.job(job)
    assert reader.problems.count == 2
    reader.problems.write(tmp_path / "report.jsonl")
    assert len((tmp_path / "report.jsonl").read_text().splitlines()) == 2


def test_bad_records_of_one_line_are_several(tmp_path: Path) -> None:
    """The records of a JSON array in one line share their place, and here their fault."""
    good = [{"instruction": f"a {n}", "output": "b"} for n in range(3)]
    path = tmp_path / "one.json"
    path.write_text(json.dumps([{"question": "x"}, good[0], {"question": "y"}, *good[1:], {"question": "z"}]))
    jobs = [{"name": name, "data": [{"path": str(path), **more}]}
            for name, more in (("a", {}), ("b", {"limit": 6}))]  # fmt: skip
    made = config(str(path), jobs=jobs, on_bad_record="report")
    reader = Reader(made, Renderer(byte_tokenizer()), ARCHITECTURE, data_files(made))
    for job in made.jobs:
        assert len(reader.job(job).train) == 3
    assert reader.problems.count == 3


@pytest.mark.parametrize(("file", "said"), [("a.jsonl/b.jsonl", "is a file"), (".", "is a folder")])
def test_a_report_that_cannot_be_is_refused_first(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, file: str, said: str
) -> None:
    from weft.training.run import train

    monkeypatch.chdir(tmp_path)
    rows(tmp_path, "a.jsonl", 5, bad=2)
    options = {"model": str(tiny_llama_dir), "on_bad_record": "report", "output_dir": "run", "steps": 1}
    with pytest.raises(UserError, match=f"bad_records_file .* {said}"):
        train(config("a.jsonl", bad_records_file=file, **options))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.jsonl"]


def test_the_report_of_a_finished_run_is_left_alone(
    tiny_llama_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from weft.training.run import train

    monkeypatch.chdir(tmp_path)
    rows(tmp_path, "a.jsonl", 5, bad=2)
    options = {"model": str(tiny_llama_dir), "on_bad_record": "report", "output_dir": "run", "steps": 1}
    train(config("a.jsonl", **options))
    before = {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()}
    rows(tmp_path, "a.jsonl", 0, bad=9)
    with pytest.raises(UserError, match=r"All bad records so far are in run\.bad_records\.jsonl"):
        train(config("a.jsonl", resume=True, **options))
    assert {path: path.read_bytes() for path in Path("run").rglob("*") if path.is_file()} == before
    rows(tmp_path, "a.jsonl", 5, bad=2)
    with pytest.raises(UserError, match=r"a\.jsonl: eval_size 99 leaves nothing to train on, of 5") as error:
        train(config("a.jsonl", eval_size=99, **{**options, "output_dir": "other"}))
    assert "bad records" not in str(error.value)
    assert not Path("other").exists()
