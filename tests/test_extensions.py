"""What users add from outside the package: the examples, by the command line and by Python; and what no file can do."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.nn import functional as F

import weft
from weft import extensions
from weft.cli.main import main
from weft.data import FORMATS, Record, format_of, to_example
from weft.data.formats import detect
from weft.errors import UserError
from weft.methods.registry import METHODS
from weft.objectives import OBJECTIVES, Supervised, likelihood, make_objective
from weft.ops.loss import losses_of_logits
from weft.training.callbacks import CALLBACKS
from weft.training.run import prepare
from weft.training.step import train_step

ROOT = Path(__file__).parents[1]
EXAMPLES = ROOT / "examples" / "extensions"
HOW = "--extension FILE.py"


@dataclass
class Run:
    """What a command left behind."""

    code: int
    out: str
    err: str


def forget() -> None:
    """As if no extension had been loaded."""
    for registry in (METHODS, OBJECTIVES, FORMATS, CALLBACKS):
        for name in list(registry._added_by):
            del registry[name]
    extensions._loaded.clear()
    detect._plan.cache_clear()
    detect.field_names.cache_clear()


@pytest.fixture(autouse=True)
def _as_before(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setattr(extensions, "_installed_searched", True)
    forget()
    yield
    forget()


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., Run]:
    """A command in a process that knows no extension: it forgets before each."""
    work = tmp_path / "work"
    work.mkdir()
    monkeypatch.chdir(work)

    def call(*words: object) -> Run:
        forget()
        before = dict(os.environ)
        code = main([str(word) for word in words])
        os.environ.clear()
        os.environ.update(before)
        captured = capsys.readouterr()
        return Run(code, captured.out, captured.err)

    return call


def example(name: str) -> tuple[str, Path]:
    return "--extension", EXAMPLES / f"{name}.py"


def settings(model: Path, data: Path, folder: Path, **more: Any) -> dict[str, Any]:
    return {"model": str(model), "data": str(data), "output_dir": str(folder), "batch_size": 4, "logging_steps": 1,
            "verify_packing": False, "method": "lora", **more}  # fmt: skip


def events(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


def test_the_examples_are_short() -> None:
    files = sorted(EXAMPLES.glob("*.py"))
    assert [file.stem for file in files] == ["brackets", "focal", "scaling", "ticket", "watch"]
    page = (ROOT / "docs" / "extending.md").read_text(encoding="utf-8")
    for file in files:
        assert file.read_text(encoding="utf-8").count("\n") < 60
        assert f"examples/extensions/{file.name}" in page


# ------------------------------------------------------------------------------------------------------------ a method


def test_a_method_trains_resumes_answers_and_merges(
    run: Callable[..., Run], tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path
) -> None:
    given = ["--model", tiny_llama_dir, "--data", tiny_data, "--method", "scaling", "--method", "lora", "steps=4",
             "save_steps=2", "logging_steps=1", "--quiet"]  # fmt: skip
    done = run("train", *given, "--output-dir", "whole", *example("scaling"))
    assert done.code == 0, done.err
    assert f"weft chat whole --extension {EXAMPLES / 'scaling.py'}" in done.out
    whole = load_file("whole/adapters/scaling/adapter_model.safetensors")
    assert len(whole) == 14
    assert all(key.endswith(".scale") and bool(value.any()) for key, value in whole.items())

    # Stopped after two steps, and resumed.
    weft.load_extension(EXAMPLES / "scaling.py")
    config = weft.make_config({"model": str(tiny_llama_dir), "data": str(tiny_data), "method": ["scaling", "lora"],
                               "steps": 4, "save_steps": 2, "logging_steps": 1, "output_dir": "half"})  # fmt: skip
    seen: list[int] = []
    weft.train(config, on_event=lambda event: seen.append(event.get("step", 0)), should_stop=lambda: 2 in seen)
    without = run("train", "half", "--resume")
    assert without.code == 2
    assert "no method named 'scaling'" in without.err
    assert HOW in without.err
    assert run("--extension", EXAMPLES / "scaling.py", "train", "half", "--resume", "--quiet").code == 0
    halves = load_file("half/adapters/scaling/adapter_model.safetensors")
    assert halves.keys() == whole.keys()
    assert all(torch.equal(halves[key], whole[key]) for key in whole)

    asks = ["--prompt", "What comes after one?", "--max-new-tokens", 3, "--json"]
    for target in ("whole", "whole/adapters/scaling"):
        answer = run("generate", target, *asks, f"--extension={EXAMPLES / 'scaling.py'}")
        assert answer.code == 0, answer.err
        assert len(json.loads(answer.out)["results"]) == 1
    merged = run("merge", "--adapter", "whole/adapters/scaling", "--output", "merged", *example("scaling"))
    assert merged.code == 0, merged.err
    # What was merged needs no extension.
    assert run("generate", "merged", *asks).code == 0

    # An adapter's folder that was moved away from its run, beside a run.
    shutil.copytree("whole/adapters/scaling", "moved")
    for words in (
        ["generate", "whole", *asks],
        ["generate", "moved", *asks],
        ["merge", "--adapter", "moved", "--output", "other"],
    ):
        refused = run(*words)
        assert refused.code == 2
        assert "no method named 'scaling'" in refused.err
        assert HOW in refused.err


def test_a_method_is_loaded_from_python(tiny_llama_dir: Path, tmp_path: Path) -> None:
    weft.load_extension(EXAMPLES / "scaling.py")
    weft.load_extension(EXAMPLES / "scaling.py")  # again changes nothing
    base = weft.load_base(str(tiny_llama_dir))
    adapters = weft.Adapters(base.model, base.architecture)
    adapter = adapters.add("it", METHODS["scaling"](target_modules=["q_proj"]))
    assert len(adapter.tensors()) == 2
    adapters.save("it", tmp_path / "saved")
    stored = json.loads((tmp_path / "saved" / "adapter_config.json").read_text())
    assert stored["peft_type"] == "SCALING"
    adapters.load("again", tmp_path / "saved")
    adapters.close()


@pytest.mark.slow
def test_a_method_inherits_the_contracts() -> None:
    words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "tests/contracts", "-k", "scaling"]
    words += map(str, example("scaling"))
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout[-3000:]
    assert " passed" in done.stdout


# ------------------------------------------------------------------------------------------------------- an objective


def test_an_objective_in_a_run(run: Callable[..., Run], tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    first = {}
    for name, more in {
        "plain": [],
        "zero": ["objective=focal", "objective_settings.gamma=0"],
        "two": ["objective=focal"],
    }.items():
        given = ["--model", tiny_llama_dir, "--data", tiny_data, "--method", "lora", "steps=2", "eval_size=4"]
        given += ["logging_steps=1", "--quiet", "--output-dir", name, *more]
        done = run("train", *given, *example("focal"))
        assert done.code == 0, done.err
        told = events(Path(name))
        first[name] = next(e["loss"] for e in told if e["event"] == "step")
        # Evaluation is the likelihood whatever is minimised, so jobs can be compared.
        first[f"{name} eval"] = next(e["eval_loss"] for e in told if e["event"] == "eval")
    assert first["zero"] == pytest.approx(first["plain"], rel=1e-5)
    assert first["two"] < 0.999 * first["plain"]
    assert first["two eval"] == first["plain eval"]
    # To talk to the adapter needs no objective.
    assert run("generate", "two", "--prompt", "one", "--max-new-tokens", 2).code == 0
    resumed = run("train", "two", "--resume", "--quiet")
    assert resumed.code == 2
    assert "no objective named 'focal'" in resumed.err


def test_an_objective_is_its_formula(tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    weft.load_extension(EXAMPLES / "focal.py")
    logits, targets = torch.randn(5, 11), torch.tensor([3, 0, 10, 4, 4])
    batch = Supervised(
        torch.arange(5),
        targets,
        torch.tensor([1.0, 1, 0.5, 1, 1]),
        sequence=torch.tensor([0, 0, 1, 1, 1]),
        num_sequences=2,
    )
    p = torch.softmax(logits, -1)[torch.arange(5), targets]
    losses = (1 - p) ** 2 * F.cross_entropy(logits, targets, reduction="none") * batch.weights
    torch.testing.assert_close(OBJECTIVES["focal"](logits, batch), torch.stack([losses[:2].sum(), losses[2:].sum()]))
    zero = make_objective("focal", {"gamma": 0})
    torch.testing.assert_close(zero(logits, batch), likelihood(losses_of_logits(logits, targets), batch))

    @weft.register_objective("mean")
    def mean(logits: torch.Tensor, batch: Supervised) -> torch.Tensor:
        return F.cross_entropy(logits, batch.targets)

    setup = prepare(weft.make_config(settings(tiny_llama_dir, tiny_data, tmp_path, objective="mean", steps=1)))
    with pytest.raises(UserError, match=r"must give one loss per sequence, of shape \(4,\); it gave \(\)"):
        train_step(setup.adapters, setup.jobs)
    setup.adapters.close()
    with pytest.raises(UserError, match="do not fit the objective 'focal': got an unexpected keyword argument 'gama'"):
        make_objective("focal", {"gama": 1})
    with pytest.raises(UserError, match="objective_settings need an objective"):
        weft.make_config(settings(tiny_llama_dir, tiny_data, tmp_path, objective_settings={"gamma": 1}))
    with pytest.raises(UserError, match=r"no objective named 'focl'\. Did you mean 'focal'"):
        prepare(weft.make_config(settings(tiny_llama_dir, tiny_data, tmp_path, objective="focl")))


# --------------------------------------------------------------------------------------------------------- a format

TICKETS = [{"subject": f"Printer {i}", "body": "It prints nothing.", "reply": "Is it switched on?"} for i in range(8)]


def test_a_format_is_recognised(run: Callable[..., Run], tiny_llama_dir: Path) -> None:
    data = Path("tickets.jsonl")
    data.write_text("".join(json.dumps(row) + "\n" for row in TICKETS))
    given = ["train", "--model", tiny_llama_dir, "--data", data, "--method", "lora", "steps=1", "--quiet"]
    assert "fits no known format" in run(*given, "--output-dir", "without").err
    assert "format 'ticket' is unknown" in (named := run(*given, "data_format=ticket").err)
    assert HOW in named
    done = run(*given, "--output-dir", "with", *example("ticket"))
    assert done.code == 0, done.err
    shown = run("preview", "--model", tiny_llama_dir, "--data", data, *example("ticket"))
    assert "Subject: Printer" in shown.out, shown.err
    assert run("generate", "with", "--prompt", "one", "--max-new-tokens", 2).code == 0  # needs no format


def test_a_format_reads_and_refuses() -> None:
    record = Record(TICKETS[0], "d:1")
    with pytest.raises(UserError, match="no known format"):
        to_example(record)
    weft.load_extension(EXAMPLES / "ticket.py")
    assert format_of(record) == "ticket"
    assert format_of(Record({" Subject": "s", "Body": "b", "reply": "r"}, "d:1")) == "ticket"
    found = to_example(record)
    assert [message.content for message in found.messages] == [  # type: ignore[union-attr]
        "Subject: Printer 0\n\nIt prints nothing.", "Is it switched on?"
    ]  # fmt: skip
    with pytest.raises(UserError, match="d:2: 'subject', 'body' and 'reply' must be text"):
        to_example(Record({**TICKETS[0], "reply": " "}, "d:2"))
    assert to_example(Record({"instruction": "i", "output": "o"}, "d:3"))  # the others are as before


@pytest.mark.slow
def test_a_format_is_known_to_the_workers(run: Callable[..., Run], tiny_llama_dir: Path) -> None:
    Path("tickets.jsonl").write_text("".join(json.dumps(row) + "\n" for row in TICKETS * 100))
    done = run("train", "--model", tiny_llama_dir, "--data", "tickets.jsonl", "--method", "lora", "steps=1", "--quiet",
               "data_workers=2", *example("ticket"))  # fmt: skip
    assert done.code == 0, done.err


# -------------------------------------------------------------------------------------------------------- a callback


def test_callbacks_hear_and_stop(
    run: Callable[..., Run], tiny_llama_dir: Path, tiny_data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    given = ["train", "--model", tiny_llama_dir, "--data", tiny_data, "--method", "lora", "steps=3", "logging_steps=1",
             "--quiet", "--output-dir", "out"]  # fmt: skip
    unknown = run(*given, "callbacks=[losses_csv]")
    assert unknown.code == 2
    assert "no callback named 'losses_csv'" in unknown.err
    assert not Path("out").exists()
    monkeypatch.setenv("MINUTES", "0")
    stopped = run(*given, "callbacks=[losses_csv, time_limit]", *example("watch"))
    assert stopped.code == 0, stopped.err
    assert "saved at step 1." in stopped.out
    assert f"weft train out --resume --extension {EXAMPLES / 'watch.py'}" in stopped.out
    # Who reports is no part of what a run is: it goes on without the time limit.
    assert run("train", "out", "--resume", "--quiet", "callbacks=[losses_csv]", *example("watch")).code == 0
    lines = Path("out/losses.csv").read_text().splitlines()
    wanted = [f"lora,{e['step']},{e['loss']}" for e in events(Path("out")) if e["event"] == "step"]
    assert lines == wanted
    assert len(lines) == 3


# --------------------------------------------------------------------------------------------- loading, and what fails


def test_files_that_cannot_be_loaded(run: Callable[..., Run], tmp_path: Path) -> None:
    (tmp_path / "broken.py").write_text("import weft\n\nweft.nothing\n")
    (tmp_path / "comma.py").write_text("x = (\n")
    (tmp_path / "taken.py").write_text("import weft\n\n@weft.register_objective('focal')\ndef mine(): ...\n")
    (tmp_path / "lora.py").write_text(
        "import weft\nfrom weft.core.adapter import MethodConfig\n\n"
        "@weft.register_method('lora')\nclass Mine(MethodConfig): ...\n"
    )
    for words, message in {
        ("--extension", "absent.py"): "there is no extension at absent.py",
        ("--extension", str(EXAMPLES)): "an extension is a Python file",
        ("--extension",): "an extension is a Python file",
        ("--extension", str(tmp_path / "broken.py")): "broken.py:3: the extension cannot be loaded: AttributeError",
        ("--extension", str(tmp_path / "comma.py")): "comma.py: the extension cannot be loaded: SyntaxError",
        (*map(str, example("focal")), "--extension", str(tmp_path / "taken.py")): "'focal' is there already",
        ("--extension", str(tmp_path / "lora.py")): "the method 'lora' is there already, from Weft itself",
    }.items():
        failed = run("doctor", *words)
        assert failed.code == 2
        assert message in failed.err


def test_the_same_function_again_takes_its_place() -> None:
    def define(value: float) -> None:
        @weft.register_objective("mine")
        def mine(logits: torch.Tensor, batch: Supervised) -> torch.Tensor:
            return torch.full((batch.num_sequences,), value)

    define(1)
    define(2)
    zeros = [torch.zeros(0) for _ in range(4)]
    batch = Supervised(*zeros[:3], sequence=zeros[3], num_sequences=1)
    assert make_objective("mine", {})(torch.zeros(0), batch) == 2


def package(folder: Path, name: str, code: str) -> None:
    """What an installer writes of a package with an entry point."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{name}.py").write_text(code)
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    (info / "entry_points.txt").write_text(f"[weft.extensions]\n{name} = {name}\n")


def test_installed_packages_are_loaded_when_a_name_is_looked_up(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    places = tmp_path / "site-packages"
    package(places, "weft_scaling_of_a_test", (EXAMPLES / "scaling.py").read_text())
    package(places, "weft_broken_of_a_test", "import weft\nraise RuntimeError('no')\n")
    monkeypatch.syspath_prepend(str(places))
    monkeypatch.setattr(extensions, "_installed_searched", False)
    assert "weft_scaling_of_a_test" not in sys.modules
    assert METHODS.find("scaling").method == "scaling"
    assert "weft_broken_of_a_test cannot be loaded: RuntimeError: no" in caplog.text


# ------------------------------------------------------------------------------------------------------ files of others


def test_no_file_makes_weft_run_code(
    run: Callable[..., Run], tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A stranger's run, adapter, configuration and model, with code beside them, looked at from their own folder."""
    evil = "import pathlib\npathlib.Path({!r}).touch()\n".format(str(marker := tmp_path / "ran"))
    weft.load_extension(EXAMPLES / "scaling.py")
    run_folder = tmp_path / "work" / "run"
    weft.train(weft.make_config(settings(tiny_llama_dir, tiny_data, run_folder, method="scaling", steps=1)))
    names = ("extension", "extensions", "evil", "scaling", "weft_scaling", "sitecustomize", "conftest")
    adapter, model = run_folder / "adapters" / "scaling", tmp_path / "work" / "model"
    shutil.copytree(tiny_llama_dir, model)
    shutil.copytree(adapter, alone := tmp_path / "work" / "alone")
    for folder in (run_folder, adapter, alone, model, Path.cwd()):
        for name in names:
            (folder / f"{name}.py").write_text(evil)
        package(folder, "evil", evil)
    named = {"extension": "evil.py", "extensions": ["evil.py", str(alone / "evil.py"), "evil"]}
    for path in (run_folder / "run.json", adapter / "weft.json", alone / "weft.json", alone / "adapter_config.json",
                 model / "config.json"):  # fmt: skip
        path.write_text(json.dumps({**json.loads(path.read_text()), **named}))
    asks = ["--prompt", "one", "--max-new-tokens", 1]
    Path("run.yaml").write_text(f"model: {tiny_llama_dir}\ndata: {tiny_data}\nmethod: lora\nextensions: [evil.py]\n")
    monkeypatch.syspath_prepend("")  # as in python -m, where the working directory is searched for modules
    commands = [["generate", run_folder, *asks], ["generate", alone, *asks], ["train", run_folder, "--resume"],
                ["merge", "--adapter", alone, "--output", "m"], ["train", "run.yaml"]]  # fmt: skip
    for words in commands:
        monkeypatch.setattr(extensions, "_installed_searched", False)
        refused = run(*words)
        assert refused.code == 2
        assert HOW in refused.err
    assert run("generate", model, *asks).code == 0

    # In the place of the configuration itself, and as a name.
    stored = json.loads((run_folder / "run.json").read_text())
    for change in ({"extensions": ["evil.py"]}, {"callbacks": ["evil.py"]}):
        (run_folder / "run.json").write_text(json.dumps({**stored, "config": {**stored["config"], **change}}))
        refused = run("train", run_folder, "--resume", *example("scaling"))
        assert refused.code == 2
        assert HOW in refused.err
    (alone / "weft.json").write_text(json.dumps({**json.loads((alone / "weft.json").read_text()), "method": "evil.py"}))
    assert "no method named 'evil.py'" in run("generate", alone, *asks).err
    assert not marker.exists()


@pytest.mark.slow
def test_no_package_in_a_models_folder_is_installed(tmp_path: Path) -> None:
    """In a fresh process, whose working directory is searched for modules."""
    package(tmp_path, "evil", "print('ran')\n")
    code = "from weft.methods import METHODS; print('lora' in METHODS, 'evil' in METHODS)"
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout == "True False\n"
