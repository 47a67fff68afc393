"""Python as a first face: ``weft.train`` and its output, ``weft.read_metrics``, code of README and docs/python.md."""

from __future__ import annotations

import builtins
import inspect
import json
import re
import signal
import sys
import types
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pandas
import pytest

import weft
from weft import api
from weft.cli import progress
from weft.cli.train import settings_of
from weft.training.loop import Event, TrainResult
from weft.training.run import Setup

ROOT = Path(__file__).parents[1]


@pytest.fixture
def given(tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path) -> dict[str, Any]:
    """The settings of a small run, with paths as programs have them."""
    return {"model": tiny_llama_dir, "data": tiny_data, "method": "lora", "output_dir": tmp_path / "run", "steps": 4,
            "logging_steps": 1, "verify_packing": False}  # fmt: skip


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> list[weft.RunConfig]:
    """The configurations that ``weft.train`` would run; it runs none."""
    found: list[weft.RunConfig] = []

    def instead(config: weft.RunConfig, **others: object) -> TrainResult:
        found.append(config)
        return TrainResult(True, 0, 0.0, {})

    monkeypatch.setattr(api, "run_training", instead)
    return found


def test_a_file_a_mapping_keywords_and_a_configuration_mean_one_thing(
    given: dict[str, Any], asked: list[weft.RunConfig], tmp_path: Path
) -> None:
    texts = {key: str(value) if isinstance(value, Path) else value for key, value in given.items()}
    file = tmp_path / "run.yaml"
    file.write_text(json.dumps(texts | {"lr": 1.0}))
    weft.train(**given, learning_rate=1e-3, r=4)
    weft.train(given, learning_rate=1e-3, lora={"r": 4})
    weft.train(file, learning_rate=1e-3, r=4)
    weft.train(str(file), **{"jobs.0.learning_rate": 1e-3, "jobs.lora.r": 4})
    weft.train(weft.make_config(texts), learning_rate=1e-3, r=4)
    from_words = settings_of([str(file), "learning_rate=1e-3", "r=4"], {})
    assert [config.jobs[0].method_config() for config in asked] == [from_words.jobs[0].method_config()] * 5
    assert {config.jobs[0].learning_rate for config in asked} == {1e-3}
    assert {config.output_dir for config in asked} == {from_words.output_dir}
    weft.train(file, method=["ia3", "lora"])
    assert [job.method for job in asked[-1].jobs] == ["ia3", "lora"]
    weft.train(**given | {"method": [weft.LoraConfig(r=4), "ia3"]}, learning_rate=1e-3)
    assert asked[-1].jobs[0].method_config() == from_words.jobs[0].method_config()
    assert asked[-1].jobs[1].method == "ia3"


@pytest.mark.parametrize(
    ("wrong", "words"),
    [
        ({"learning_rat": 1e-3}, "unknown key 'learning_rat'. Did you mean 'learning_rate'?"),
        ({"method": "lorra"}, "no method named 'lorra'. Did you mean 'lora'?"),
        ({"optimizer": "adamv"}, "lion, sgd, apollo, not 'adamv'. Did you mean 'adamw'?"),
        ({"steps": True}, "steps: expected a whole number, not true."),
        ({"data": [{"instruction": "a", "output": "b"}]}, "Records are read from files"),
        ({"model": "tiny-lama"}, "no model at 'tiny-lama'. Did you mean 'tiny-llama'?"),
    ],
)
def test_a_mistake_is_told_in_the_words_of_the_command_line(
    given: dict[str, Any], wrong: dict[str, Any], words: str
) -> None:
    with pytest.raises(weft.UserError, match=re.escape(words)):
        weft.train(**given | wrong)


def test_the_signature_says_what_there_is() -> None:
    names = list(inspect.signature(weft.train).parameters)
    assert names[:5] == ["config", "model", "data", "method", "output_dir"]
    assert {"resume", "callbacks", "should_stop", "progress", "settings"} < set(names)
    assert all(f"{name}:" in str(weft.train.__doc__) for name in names), "each has its sentence"


def test_what_is_shown(given: dict[str, Any], capfd: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    weft.train(given, steps=1, eval_size=2)
    out, err = capfd.readouterr()
    assert re.fullmatch(rf"lora: trainable params: .* -> {tmp_path}/run/adapters/lora\n", out)
    assert [line.split()[0] for line in err.splitlines()] == ["eval", "step", "eval"]
    weft.train(given, steps=1, output_dir=tmp_path / "other", progress=False)
    assert capfd.readouterr() == ("", "")


def test_a_notebook_shows_one_table_that_changes(monkeypatch: pytest.MonkeyPatch) -> None:
    shown: list[Any] = []

    class Handle:
        def update(self, table: Any) -> None:
            shown.append(table)

    def display(table: Any, *, display_id: bool) -> Handle:
        shown.append(table)
        return Handle()

    kernel = type("ZMQInteractiveShell", (), {})()
    monkeypatch.setattr(builtins, "get_ipython", lambda: kernel, raising=False)
    module = types.ModuleType("IPython.display")
    vars(module)["display"] = display
    monkeypatch.setitem(sys.modules, "IPython", types.ModuleType("IPython"))
    monkeypatch.setitem(sys.modules, "IPython.display", module)
    reporter = progress.make_reporter([("lora", 100)], quiet=False)
    for step in range(1, 100):
        reporter.event({"event": "step", "job": "lora", "step": step, "total_steps": 100, "loss": 1.25})
    assert len(shown) < 10, "a browser need not draw every step"
    reporter.close()
    assert isinstance(reporter, progress.NotebookReporter)
    html = shown[-1]._repr_mimebundle_([], [])["text/html"]
    assert all(part in html for part in ("lora", "99/100", "1.2500"))


# ----------------------------------------------------------------------------------------- callbacks, stopping, metrics


def test_callbacks_stop_a_run_and_its_metrics_have_times(given: dict[str, Any], tmp_path: Path) -> None:
    begun, heard = [], []

    class StopAt:
        def __init__(self, setup: Setup) -> None:
            begun.append([job.name for job in setup.jobs])

        def __call__(self, event: Event) -> bool:
            return event.get("step") == 2

    before = datetime.now(UTC) - timedelta(milliseconds=1)
    assert not weft.train(given, callbacks=[StopAt], on_event=heard.append, progress=False).completed
    (first, second) = weft.read_metrics(tmp_path / "run")
    assert weft.train(tmp_path / "run", resume=True, progress=False, callbacks=[StopAt]).steps == 4
    rows = weft.read_metrics(str(tmp_path / "run"))
    assert rows[:2] == [first, second], "a resumed run keeps the lines of before"
    assert begun == [["lora"], ["lora"]]
    assert [event.get("step") for event in heard] == [1, 2, 2]
    table = pandas.DataFrame(rows)
    assert str(table.time.dtype).endswith("UTC]")
    assert table.time.is_monotonic_increasing
    assert before <= table.time.min()
    assert table.time.max() <= datetime.now(UTC)
    assert list(table.step) == [1, 2, 3, 4]
    assert (tmp_path / "run/adapters/lora").is_dir()


def test_metrics_of_before_there_were_times(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"event": "step", "loss": 1.0}\n')
    assert weft.read_metrics(tmp_path) == [{"time": None, "event": "step", "loss": 1.0}]
    for wrong in ('"noon"', "7"):
        path.write_text(f'{{"event": "step"}}\n{{"time": {wrong}}}\n')
        with pytest.raises(weft.UserError, match=r"metrics.jsonl:2: time"):
            weft.read_metrics(tmp_path)
    with pytest.raises(weft.UserError, match="give the folder of a run"):
        weft.read_metrics(tmp_path / "none")


@pytest.fixture
def _usual_interruption() -> Iterator[None]:
    """A shell lets what it starts in the background ignore SIGINT."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("_usual_interruption")
def test_an_interruption_saves_and_is_raised(given: dict[str, Any], tmp_path: Path) -> None:
    def press(event: Event) -> None:
        if event["event"] == "step" and event["step"] == 2:
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        weft.train(given, on_event=press, progress=False)
    assert (tmp_path / "run/checkpoints/step-00000002").is_dir()
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    assert weft.train(given, resume=True, progress=False).completed

    def twice(event: Event) -> None:
        for _ in range(2):
            signal.raise_signal(signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        weft.train(given, output_dir=tmp_path / "left", on_event=twice, progress=False)
    assert list((tmp_path / "left/checkpoints").iterdir()) == [], "the second leaves at once"


# -------------------------------------------------------------------------------------------------- adapters, documents


@pytest.mark.parametrize("shape", ["full", "tiny"])
def test_a_saved_adapter_names_its_base(tiny_llama_dir: Path, tmp_path: Path, shape: Any) -> None:
    base = weft.load_base(str(tiny_llama_dir), shape=shape)
    adapters = weft.Adapters(base.model, base.architecture)
    adapters.add("mine", weft.LoraConfig(r=2))
    adapters.save("mine", tmp_path / "known")
    adapters.save("mine", tmp_path / "said", base_name="owner/name")
    adapters.close()
    names = [json.loads((tmp_path / name / "adapter_config.json").read_text())["base_model_name_or_path"]
             for name in ("known", "said")]  # fmt: skip
    assert names == [str(tiny_llama_dir), "owner/name"]
    if shape == "full":
        opened = weft.open_target(tmp_path / "known")
        assert opened.names == ("known",)
        opened.close()


@pytest.mark.parametrize("page", ["README.md", "docs/python.md"])
def test_the_code_of_the_pages_runs(
    page: str, tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Every block in order, as one program: with a smaller base, in a folder with the data and a configuration."""
    monkeypatch.chdir(tmp_path)
    Path("train.jsonl").write_bytes(tiny_data.read_bytes())
    Path("run.yaml").write_text(
        f"{{model: {tiny_llama_dir}, data: train.jsonl, method: lora, epochs: 1, eval_size: 2, output_dir: runs/five}}"
    )
    reviews = [{"text": f"It {word} a day.", "label": word == "held"} for word in ("broke after", "held") * 4]
    Path("reviews.jsonl").write_text("".join(json.dumps(r | {"label": str(r["label"])}) + "\n" for r in reviews))
    blocks = re.findall(r"^```python\n(.*?)^```", (ROOT / page).read_text(encoding="utf-8"), re.M | re.S)
    assert len(blocks) == {"README.md": 2, "docs/python.md": 12}[page]
    names: dict[str, Any] = {}
    for block in blocks:
        exec(compile(block.replace("tiny-llama", str(tiny_llama_dir)), page, "exec"), names)
    assert max(sum(bool(line.strip()) for line in block.splitlines()) for block in blocks) <= 40
    if page == "docs/python.md":
        assert weft.open_target("my-adapter").names == ("my-adapter",)
        with weft.Adapters(names["base"].model, names["base"].architecture) as adapters:
            assert names["loss"] < 5 < names["evaluate_loss"](adapters, None, names["held"])
