"""Trackers hear what ``metrics.jsonl`` is told, and none can end or change a run."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

import weft
from weft.errors import UserError
from weft.files.tensors import digest
from weft.training.trackers import reports
from weft.training.trackers.names import TRACKERS, check_installed, tracker_names
from weft.training.trackers.tracker import End, Facts, Scalar, Tracker


class Ear(Tracker):
    """Remembers what it is told, and fails where it is asked to."""

    heard: list[tuple[Any, ...]] = []
    fails: str = ""

    def __init__(self, facts: Facts) -> None:
        super().__init__(facts)
        self._say("begin", dict(facts.ids), facts.resumed, sorted(facts.jobs), dict(facts.jobs["lora"]))
        facts.ids["lora"] = "one"

    def _say(self, what: str, *more: object) -> None:
        type(self).heard.append((what, *more))
        if self.fails == what:
            raise RuntimeError(f"no {what}")

    def log(self, job: str, step: int, figures: Mapping[str, float]) -> None:
        self._say("log", job, step, dict(figures))

    def end(self, how: End, states: Mapping[str, Mapping[str, Scalar]]) -> None:
        self._say("end", how, {name: dict(state) for name, state in states.items()})


@pytest.fixture
def ear(monkeypatch: pytest.MonkeyPatch) -> type[Ear]:
    """The class that stands for a tracker."""
    Ear.heard, Ear.fails = [], ""
    monkeypatch.setattr(reports, "tracker_of", lambda name: Ear)
    monkeypatch.setattr("weft.training.trackers.names.importlib.util.find_spec", lambda name: object())
    return Ear


@pytest.fixture
def train(tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., Any]:
    """``train(steps=4, …)`` in ``tmp_path / "run"``."""

    def run(**settings: Any) -> Any:
        given = {"method": "lora", "steps": 4, "eval_size": 4, "logging_steps": 1, "output_dir": tmp_path / "run"}
        return weft.train(model=tiny_llama_dir, data=tiny_data, progress=False, **{**given, **settings})

    return run


def test_a_tracker_hears_the_events_the_settings_and_the_end(
    train: Callable[..., Any], ear: type[Ear], tmp_path: Path
) -> None:
    train(report_to="wandb", learning_rate=1e-3)
    kinds = [one[0] for one in ear.heard]
    assert kinds == ["begin", *["log"] * 6, "end"]
    settings = ear.heard[0][4]
    assert (settings["learning_rate"], settings["method"], settings["batch_size"]) == (1e-3, "lora", 8)
    logged = [row for row in weft.read_metrics(tmp_path / "run") if row["event"] in ("step", "eval")]
    for row, (_, job, step, figures) in zip(logged, ear.heard[1:-1], strict=True):
        assert (job, step) == (row["job"], row["step"])
        assert figures.items() <= row.items()
        assert ("loss" in figures and "learning_rate" in figures) or "eval_loss" in figures
    _, how, states = ear.heard[-1]
    assert (how, states["lora"]["ended"], states["lora"]["step"]) == ("finished", "finished", 4)
    assert states["lora"]["eval_loss"] == logged[-1]["eval_loss"]


@pytest.mark.parametrize("where", ["begin", "log", "end"])
def test_one_that_fails_is_off_with_one_warning_and_changes_nothing(
    where: str, train: Callable[..., Any], ear: type[Ear], tmp_path: Path
) -> None:
    train()
    plain = digest_of(tmp_path / "run")
    ear.fails = where
    told: list[Any] = []
    result = train(report_to=["wandb"], overwrite_output_dir=True, on_event=told.append)
    warnings = [event["message"] for event in told if event["event"] == "warning"]
    assert len(warnings) == 1, warnings
    assert f"wandb failed (RuntimeError: no {where})" in warnings[0]
    assert [one[0] for one in ear.heard].count(where) == 1
    assert result.completed
    assert digest_of(tmp_path / "run") == plain


def digest_of(run: Path) -> str:
    from safetensors.torch import load_file

    tensors = load_file(run / "adapters" / "lora" / "adapter_model.safetensors")
    return "".join(key + digest(value) for key, value in sorted(tensors.items()))


def test_an_error_of_the_run_is_its_own_and_the_tracker_learns_of_it(
    train: Callable[..., Any], ear: type[Ear], tmp_path: Path
) -> None:
    def burst(event: Mapping[str, Any]) -> None:
        if event["event"] == "step" and event["step"] == 2:
            raise ZeroDivisionError("mine")

    with pytest.raises(ZeroDivisionError, match="mine"):
        train(report_to="mlflow", on_event=burst)
    assert ear.heard[-1][:2] == ("end", "crashed")
    # Going on continues the same run of the tracker.
    ear.heard.clear()
    assert train(report_to="mlflow", resume=True).completed
    assert ear.heard[0][1:3] == ({"lora": "one"}, True)


def test_a_run_that_is_stopped_says_so(train: Callable[..., Any], ear: type[Ear]) -> None:
    assert not train(report_to="mlflow", should_stop=lambda: len(ear.heard) > 3).completed
    assert ear.heard[-1][:2] == ("end", "stopped")
    assert ear.heard[-1][2]["lora"]["ended"] == "interrupted"


@pytest.mark.parametrize(
    ("given", "wanted"),
    [("none", []), (None, []), (["none"], []), ("wandb", ["wandb"]), ("wandb, mlflow", ["wandb", "mlflow"]),
     (["MLflow", "mlflow"], ["mlflow"])],
)  # fmt: skip
def test_words_for_trackers(given: object, wanted: list[str]) -> None:
    assert tracker_names(given) == wanted


@pytest.mark.parametrize("given", ["wandbb", ["all"], 3, [3], {"wandb": 1}])
def test_other_words_are_refused(given: object, train: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"report_to.*tensorboard, wandb"):
        train(report_to=given)
    assert not (tmp_path / "run").exists()


def test_a_package_that_is_not_there_is_told_before_weights_are_loaded(
    train: Callable[..., Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr("weft.training.trackers.names.importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr("weft.training.settings.load_base", lambda *a, **k: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"trackio needs the package trackio: pip install 'weft\[trackio\]'"):
        train(report_to="trackio")
    assert not (tmp_path / "run").exists()


# ------------------------------------------------------------------------------- what the packages themselves write


def tried(name: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(name) is None
    return pytest.mark.skipif(missing, reason=f"pip install 'weft[{name}]'")


def wanted_losses(run: Path, job: str) -> list[tuple[int, float]]:
    return list(zip(*weft.read_metrics(run).curve("loss", job), strict=True))


@pytest.fixture
def two(train: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """A run of two jobs with a tracker, which has no network; interrupted and resumed."""
    for name in ("WANDB_MODE", "SWANLAB_MODE", "MLFLOW_TRACKING_URI", "TRACKIO_SPACE_ID", "TRACKIO_SERVER_URL"):
        monkeypatch.delenv(name, raising=False)

    def run(name: str) -> Path:
        seen: list[Any] = []
        given = {"method": ["lora", "ia3"], "report_to": name}
        train(**given, on_event=seen.append, should_stop=lambda: any(e.get("step") == 2 for e in seen))
        assert train(**given, resume=True).completed
        warnings = [e["message"] for e in seen if e["event"] == "warning"]
        assert not [text for text in warnings if "report_to" in text], warnings
        return tmp_path / "run"

    return run


@tried("tensorboard")
def test_tensorboard_has_what_was_logged(two: Callable[[str], Path]) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = two("tensorboard")
    for job in ("lora", "ia3"):
        events = EventAccumulator(str(run / "trackers" / "tensorboard" / job))
        events.Reload()
        found = [(one.step, one.value) for one in events.Scalars("loss")]
        assert found == [(step, pytest.approx(value)) for step, value in wanted_losses(run, job)]
        assert [one.step for one in events.Scalars("eval_loss")] == [0, 4]
        assert "learning_rate" in events.Tags()["scalars"]
        assert b"finished" in events.Tensors("end/text_summary")[-1].tensor_proto.string_val[0]


@tried("wandb")
def test_wandb_has_what_was_logged(two: Callable[[str], Path]) -> None:
    from wandb.proto.wandb_internal_pb2 import Record

    run = two("wandb")
    ids = json.loads((run / "trackers" / "wandb.json").read_text())
    for job in ("lora", "ia3"):
        found, told = {}, []
        files = sorted((run / "trackers" / "wandb").rglob(f"run-{ids[job]}.wandb"))
        for file in dict.fromkeys(path.resolve() for path in files):
            for data in log_records(file):
                record = Record.FromString(data)
                told.append(str(record))
                items = {one.key or ".".join(one.nested_key): one.value_json for one in record.history.item}
                if "loss" in items:
                    found[int(items["_step"])] = float(items["loss"])
        assert sorted(found.items()) == wanted_losses(run, job)
        assert any("learning_rate" in text and "config" in text for text in told)
        assert any("finished" in text for text in told)


@tried("mlflow")
def test_mlflow_has_what_was_logged(two: Callable[[str], Path]) -> None:
    from mlflow.tracking import MlflowClient

    run = two("mlflow")
    client = MlflowClient(tracking_uri=f"sqlite:///{run / 'trackers' / 'mlflow' / 'mlflow.db'}")
    ids = json.loads((run / "trackers" / "mlflow.json").read_text())
    experiment = client.get_experiment_by_name("weft")
    assert len(client.search_runs([experiment.experiment_id])) == 2
    for job in ("lora", "ia3"):
        history = {(one.step, one.value) for one in client.get_metric_history(ids[job], "loss")}
        assert sorted(history) == wanted_losses(run, job)
        found = client.get_run(ids[job])
        assert found.data.params["method"] == job
        assert (found.info.status, found.data.tags["weft.ended"]) == ("FINISHED", "finished")


@tried("swanlab")
def test_swanlab_has_what_was_logged(two: Callable[[str], Path]) -> None:
    from swanlab.proto.swanlab.record.v1.record_pb2 import Record

    run = two("swanlab")
    found: dict[str, set[tuple[int, float]]] = {}
    for file in (run / "trackers" / "swanlab").rglob("*.swanlab"):
        for data in log_records(file):
            record = Record.FromString(data)
            if record.WhichOneof("record_type") == "scalar":
                found.setdefault(record.scalar.key, set()).add((record.scalar.step, record.scalar.value.number))
    for job in ("lora", "ia3"):
        assert sorted(found[f"{job}/loss"]) == wanted_losses(run, job)


@tried("trackio")
def test_trackio_has_what_was_logged(
    two: Callable[[str], Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import trackio.sqlite_storage as storage
    import trackio.utils

    for module in (storage, trackio.utils, trackio):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    run = two("trackio")
    rows = storage.SQLiteStorage.get_logs("weft", "run")
    for job in ("lora", "ia3"):
        found = {(row["step"], row[f"{job}/loss"]) for row in rows if f"{job}/loss" in row}
        assert sorted(found) == wanted_losses(run, job)
    assert rows[-1]["end/lora/ended"] == "finished"


def log_records(path: Path) -> Iterator[bytes]:
    """The records of a log as LevelDB writes them (and wandb and SwanLab, after a header of seven bytes)."""
    data, block, place, whole = path.read_bytes(), 1 << 15, 7, b""
    while place + 7 <= len(data):
        if block - place % block < 7:
            place += block - place % block
            continue
        length, kind = int.from_bytes(data[place + 4 : place + 6], "little"), data[place + 6]
        whole += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):  # a whole one, or the last part of one
            yield whole
            whole = b""


def test_the_extras_have_the_names_of_the_packages() -> None:
    import tomllib

    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    for name in TRACKERS:
        assert extras[name][0].startswith(f"{name}>=")
    check_installed([])
