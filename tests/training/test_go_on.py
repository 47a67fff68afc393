"""A run that goes on: from another folder, with data and base that have moved, with more steps; and what it refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from weft.errors import UserError
from weft.models import load_base
from weft.training.config import load_run_config, make_config
from weft.training.run import prepare, train
from weft.training.same_run import base_fingerprint, check_same_run, other_base


def settings(base: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(base), "method": ["lora", "ia3"], "steps": 4, "batch_size": 2, "output_dir": "run", **more}


def stopped(values: dict[str, Any], after: int) -> None:
    seen: list[int] = []
    result = train(
        make_config(values), on_event=lambda e: seen.append(e.get("step", 0)), should_stop=lambda: after in seen
    )
    assert not result.completed


def adapters(run: str | Path) -> dict[str, bytes]:
    return {path.parent.name: path.read_bytes() for path in sorted(Path(run).glob("adapters/*/*.safetensors"))}


@pytest.fixture
def place(tmp_path: Path, tiny_llama_dir: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a base and data, in which everything is named relatively."""
    shutil.copytree(tiny_llama_dir, tmp_path / "base")
    shutil.copy(tiny_data, tmp_path / "data.jsonl")
    (tmp_path / "sub").mkdir()
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_from_another_folder(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    values = settings(Path("base"), data="data.jsonl")
    train(make_config({**values, "output_dir": "whole"}))
    stopped(values, after=1)
    monkeypatch.chdir(place / "sub")
    assert train(load_run_config("../run", flags={"resume": True})).completed
    assert adapters("../run") == adapters("../whole")


def test_base_and_data_have_moved(place: Path) -> None:
    values = settings(Path("base"), data=[{"path": "data.jsonl", "limit": 6}])
    train(make_config({**values, "output_dir": "whole"}))
    stopped(values, after=1)
    Path("base").rename("sub/other")
    Path("data.jsonl").rename("sub/renamed.jsonl")
    moved = ['data=[{path: "sub/renamed.jsonl", limit: 6}]', "model=sub/other"]
    assert train(load_run_config("run", moved, flags={"resume": True})).completed
    assert adapters("run") == adapters("whole")


def test_another_base_or_other_data_is_refused(place: Path) -> None:
    stopped(settings(Path("base"), data="data.jsonl"), after=1)
    Path("other.jsonl").write_text("".join(Path("data.jsonl").read_text().splitlines(keepends=True)[::-1]))
    with pytest.raises(UserError, match="the data of job 'lora'"):
        train(load_run_config("run", ["data=other.jsonl"], flags={"resume": True}))
    with pytest.raises(UserError, match=r"over another base \(here .*tiny-bloom.*, in training .*base: "):
        train(load_run_config("run", ["model=tiny-bloom"], flags={"resume": True}))


def test_what_may_not_change_is_named_key_by_key(place: Path) -> None:
    base = settings(Path("base"), data="data.jsonl")
    begun = make_config(base)
    changes: dict[str, Any] = {"learning_rate": 1e-5, "r": 4, "max_length": 50, "logging_steps": 3, "steps": 90}
    with pytest.raises(UserError) as refused:
        check_same_run(make_config({**base, **changes}), begun)
    assert sorted(str(refused.value).splitlines()[1:-1]) == [
        "  jobs.ia3.learning_rate: None -> 1e-05",
        "  jobs.lora.learning_rate: None -> 1e-05",
        "  jobs.lora.r: None -> 4",
        "  max_length: None -> 50",
    ]
    assert len(str(refused.value)) < 400


def test_keys_of_jobs_are_understood_on_a_run(place: Path) -> None:
    stopped(settings(Path("base"), data="data.jsonl"), after=1)
    with pytest.raises(UserError, match=r"jobs\.ia3\.learning_rate: None -> 1e-05"):
        train(load_run_config("run", ["learning_rate=1e-5"], flags={"resume": True}))
    with pytest.raises(UserError, match=r"jobs\.lora\.r: None -> 3"):
        train(load_run_config("run", ["r=3"], flags={"resume": True}))
    with pytest.raises(UserError, match=r"unknown key 'learning_raet'\. Did you mean 'learning_rate'"):
        load_run_config("run", ["learning_raet=1e-5"], flags={"resume": True})


@pytest.mark.parametrize("schedule", ["constant", "cosine"])
def test_more_steps(place: Path, schedule: str) -> None:
    """With a constant rate and no warm-up, going on is what the longer run would have been, to the bit."""
    values = settings(Path("base"), data="data.jsonl", lr_scheduler_type=schedule, warmup_ratio=0)
    train(make_config(values))
    told: list[str] = []
    again = load_run_config("run", flags={"resume": True})
    assert train(again, on_event=lambda e: told.append(e.get("message", ""))).completed
    assert any("this run has finished, with 4 steps" in text for text in told)
    told.clear()
    more = load_run_config("run", ["steps=7"], flags={"resume": True})
    result = train(more, on_event=lambda e: told.append(e.get("message", "")))
    assert {job["step"] for job in result.jobs.values()} == {7}
    assert any("job 'lora' has 7 steps now, and 4 before" in text for text in told)
    train(make_config({**values, "steps": 7, "output_dir": "whole"}))
    assert (adapters("run") == adapters("whole")) == (schedule == "constant")


def test_fewer_steps_than_are_done(place: Path) -> None:
    stopped(settings(Path("base"), data="data.jsonl", logging_steps=1), after=3)
    result = train(load_run_config("run", ["steps=2"], flags={"resume": True}))
    assert result.completed
    assert {job["step"] for job in result.jobs.values()} == {3}


def test_run_json_names_no_place_that_depends_on_the_folder(place: Path) -> None:
    stopped(settings(Path("base"), data="0.5*data.jsonl + 0.5*./sub/../base/../data2.jsonl") | _second(place), after=1)
    config = json.loads(Path("run/run.json").read_text())["config"]
    assert config["model"] == str(place / "base")
    assert config["data"] == f"0.5*{place}/data.jsonl + 0.5*{place}/data2.jsonl"


def _second(place: Path) -> dict[str, Any]:
    (place / "data2.jsonl").write_text((place / "data.jsonl").read_text().replace("one", "uno"))
    return {}


def test_data_of_every_job_is_enough(place: Path) -> None:
    values = {"model": "base", "steps": 1, "jobs": [{"name": "a", "method": "lora", "data": "data.jsonl"}]}
    assert make_config(values).data is None
    assert train(make_config({**values, "output_dir": "run"})).completed
    with pytest.raises(UserError, match="'data' is missing"):
        make_config({**values, "jobs": [*values["jobs"], {"name": "b", "method": "ia3"}]})


def test_a_run_past_its_steps_says_only_that_it_has_finished(place: Path) -> None:
    train(make_config(settings(Path("base"), data="data.jsonl")))
    before, told = Path("run/run.json").read_bytes(), list[str]()
    again = load_run_config("run", ["steps=2"], flags={"resume": True})
    result = train(again, on_event=lambda e: told.append(e.get("message", "")))
    assert {(job["step"], job["total_steps"]) for job in result.jobs.values()} == {(4, 4)}
    assert [text for text in told if text] == [
        "this run has finished, with 4 steps. To go on give it more: steps=N, or epochs=N."
    ]
    assert Path("run/run.json").read_bytes() == before


def test_the_limit_is_for_what_is_learned(place: Path) -> None:
    values = settings(Path("base"), data="data.jsonl", limit=3)
    shutil.copy("data.jsonl", "dev.jsonl")
    sizes: dict[str, tuple[int, ...]] = {}
    for name, evaluated in {"all": "dev.jsonl", "own": [{"path": "dev.jsonl", "limit": 2}]}.items():
        setup = prepare(make_config({**values, "eval_data": evaluated}))
        setup.adapters.close()
        sizes[name] = (len(setup.jobs[0].samples), len(setup.jobs[0].eval_samples))
    assert sizes == {"all": (3, len(Path("dev.jsonl").read_text().splitlines())), "own": (3, 2)}


def test_a_run_of_before_whose_limit_cut_evaluation_data_goes_on_as_it_was(place: Path) -> None:
    values = settings(Path("base"), data="data.jsonl", limit=3)
    shutil.copy("data.jsonl", "dev.jsonl")
    stopped({**values, "eval_data": [{"path": "dev.jsonl", "limit": 3}]}, after=1)
    kept = json.loads(Path("run/run.json").read_text())
    kept["config"]["eval_data"] = str(place / "dev.jsonl")  # as it was written
    del kept["format"]
    Path("run/run.json").write_text(json.dumps(kept))
    with pytest.raises(UserError, match=r"eval_data: .*'limit': 3.* -> '…'"):
        train(make_config({**values, "eval_data": "dev.jsonl", "resume": True}))
    assert train(load_run_config("run", flags={"resume": True})).completed


def test_a_tied_head_counts_once_also_beside_a_run_of_before(place: Path) -> None:
    base = load_base("base", device="cpu")
    found, every = base_fingerprint(base), sum(t.numel() for t in base.model.state_dict().values())
    assert found["parameters"] == base.model.num_parameters() < every
    assert other_base(base, found) is None
    assert other_base(base, {**found, "parameters": every}) is None
    assert f"parameters {found['parameters']:,} instead of 3" in str(other_base(base, {**found, "parameters": 3}))
