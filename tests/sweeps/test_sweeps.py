"""Whole sweeps: trials together are what they are apart, whoever leaves, whatever interrupts."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file
from tests.cli.conftest import Run, weft  # noqa: F401  (the command line in this process)

from weft.errors import UserError
from weft.files.run_folder import RunStore, read_metrics
from weft.files.tensors import digest
from weft.sweeps import sharing
from weft.sweeps.halving import rungs_of
from weft.sweeps.record import Record, new_record, resumed
from weft.sweeps.space import dimension, grid
from weft.sweeps.sweep import begin, run_sweep
from weft.sweeps.trials import Trials, trials_of
from weft.training.loop import TrainResult
from weft.training.run import train
from weft.training.rungs import Rungs
from weft.training.settings import RunConfig

GRID = ("r=2,8", "learning_rate=3e-2,3e-3,1e-6")
# Bit for bit the same, whoever shares the pass.
COMMON = ["method=lora", "steps=8", "eval_size=6", "batch_size=4", "exact=true", "logging_steps=2", "save_steps=1"]


@pytest.fixture
def made(tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path) -> Callable[..., tuple[Record, Trials]]:
    """``made("name", halving=2, groups=…)``: a sweep in a folder of that name, ready to run."""

    def make(name: str, halving: int | None = None, together: int | None = None) -> tuple[Record, Trials]:
        words = [f"model={tiny_llama_dir}", f"data={tiny_data}", *COMMON]
        folder = tmp_path / name
        trials = trials_of(None, words, grid([dimension(word) for word in GRID]), {"output_dir": folder})
        rungs = rungs_of([trial.job for trial in trials.trials], halving) if halving else ()
        record = new_record(folder, trials, {"metric": "eval_loss"}, rungs)
        begin(folder, overwrite=False)
        if not resumed(record):
            record.groups = sharing.groups_of(trials, together)
            record.save()
        return record, trials

    return make


def runner(config: RunConfig, rungs: Rungs | None) -> TrainResult:
    return train(config, rungs=rungs)


def weights(folder: Path) -> str:
    tensors = load_file(folder / "adapter_model.safetensors")
    return "".join(key + digest(value) for key, value in sorted(tensors.items()))


def alone(trials: Trials, name: str, folder: Path) -> tuple[str, float]:
    """The weights and the last loss of one trial, trained by itself."""
    train(trials.run([name], folder))
    return weights(folder / "adapters" / name), read_metrics(folder, event="eval")[-1]["eval_loss"]


def test_all_trials_are_what_they_are_apart(made: Callable[..., Any], tmp_path: Path) -> None:
    record, trials = made("sweep")
    assert run_sweep(record, trials, runner)
    apart = {name: alone(trials, name, tmp_path / "apart" / name) for name in record.trials}
    for name, (own, loss) in apart.items():
        assert weights(Path(str(record.results[name].folder))) == own
        assert record.results[name].figure == loss
    assert record.winner == min(apart, key=lambda name: apart[name][1])
    assert [record.results[name].figure for name in record.table()] == sorted(loss for _, loss in apart.values())


def test_those_that_fall_behind_leave_and_the_winner_is_as_alone(made: Callable[..., Any], tmp_path: Path) -> None:
    record, trials = made("sweep", halving=2)
    assert run_sweep(record, trials, runner)
    rows = read_metrics(record.run(0))
    assert [(rung.step, rung.keep) for rung in record.rungs] == [(2, 3), (4, 1)]
    for name, result in record.results.items():
        steps = rows.where(job=name, event="step").column("step")
        # A trial that has left makes no step more.
        assert max(steps) == result.step == (8 if name == record.winner else result.step)
        assert (result.ended == "left") == (result.step < 8)
    assert sorted(one.step for one in record.results.values()) == [2, 2, 2, 4, 4, 8]
    name = str(record.winner)
    assert (weights(Path(str(record.results[name].folder))), record.results[name].figure) == alone(
        trials, name, tmp_path / "alone"
    )
    # Those that left are those that were worst at their rung.
    for rung in record.rungs:
        figures = record.reports[rung.step]
        stayed = [figures[one] for one in figures if one not in record.left[rung.step]]
        assert max(stayed) <= min(figures[one] for one in record.left[rung.step])


def outcome(record: Record) -> dict[str, Any]:
    """What must not depend on how a sweep was run."""
    return {
        "order": record.table(),
        "winner": record.winner,
        "left": record.left,
        "results": {name: (one.ended, one.step, one.figure) for name, one in record.results.items()},
        "weights": {name: weights(Path(str(one.folder))) for name, one in record.results.items()},
    }


def test_several_runs_wait_for_each_other_and_decide_as_one(made: Callable[..., Any]) -> None:
    one, trials = made("one", halving=2)
    assert run_sweep(one, trials, runner)
    several, trials = made("several", halving=2, together=4)
    assert several.groups == [[f"trial-0{n}" for n in range(4)], ["trial-04", "trial-05"]]
    assert run_sweep(several, trials, runner)
    assert outcome(several) == outcome(one)


class Killed(BaseException):
    """What ends a process at once, as far as the code inside can tell."""


@pytest.mark.parametrize("at", [1, 9, 14, 22])
def test_a_sweep_that_was_killed_goes_on(at: int, made: Callable[..., Any]) -> None:
    """``at``: after so many events it ends, without a word."""
    record, trials = made("unbroken", halving=2, together=4)
    assert run_sweep(record, trials, runner)
    heard: list[Any] = []

    def hear(event: Mapping[str, Any]) -> None:
        heard.append(event)
        if len(heard) == at:
            raise Killed

    broken, trials = made("broken", halving=2, together=4)
    with pytest.raises(Killed):
        run_sweep(broken, trials, lambda config, rungs: train(config, rungs=rungs, on_event=hear))
    again, trials = made("broken", halving=2, together=4)
    assert run_sweep(again, trials, runner)
    assert outcome(again) == outcome(record)


def test_a_sweep_that_is_stopped_says_so_and_goes_on(made: Callable[..., Any]) -> None:
    record, trials = made("sweep", halving=2)
    asked: list[int] = []

    def stop() -> bool:
        asked.append(1)
        return len(asked) > 12

    assert not run_sweep(record, trials, lambda config, rungs: train(config, rungs=rungs, should_stop=stop))
    assert record.winner is None or record.waiting
    assert json.loads((record.folder / "sweep.json").read_text())["winner"] is None
    again, trials = made("sweep", halving=2)
    assert run_sweep(again, trials, runner)
    other, trials = made("other", halving=2)
    assert run_sweep(other, trials, runner)
    assert outcome(again) == outcome(other)


def test_a_finished_sweep_trains_nothing(made: Callable[..., Any]) -> None:
    record, trials = made("sweep")
    assert run_sweep(record, trials, runner)
    again, trials = made("sweep")
    assert not again.waiting
    assert run_sweep(again, trials, lambda config, rungs: pytest.fail("it trained again"))
    assert again.json() == record.json()


def test_a_run_that_goes_on_at_a_rung_is_not_judged_there_again(made: Callable[..., Any]) -> None:
    """Also where the judge remembers nothing."""
    _, trials = made("sweep")
    names = [trial.name for trial in trials.trials]

    def worse_half(step: int, figures: Mapping[str, float]) -> dict[str, str]:
        order = sorted(figures, key=lambda name: figures[name])
        return {name: f"behind at {step}" for name in order[len(order) // 2 :]}

    ended = {}
    for where, stops in (("unbroken", False), ("broken", True)):
        left: list[str] = []
        config, rungs = (
            trials.run(names, Path(trials.config.output_dir).parent / where),
            Rungs((2, 4), "eval_loss", worse_half),
        )

        def hear(event: Mapping[str, Any], left: list[str] = left) -> None:
            left += [event["job"]] if event["event"] == "left" else []

        def stop(left: list[str] = left, stops: bool = stops) -> bool:
            return stops and len(left) == 3

        first = train(config, rungs=rungs, on_event=hear, should_stop=stop)
        assert first.completed is not stops
        result = train(config, rungs=rungs, on_event=hear)
        ended[where] = {name: (state["ended"], state["step"]) for name, state in result.jobs.items()}
    assert ended["broken"] == ended["unbroken"]
    assert sorted(step for _, step in ended["broken"].values()) == [2, 2, 2, 4, 4, 8]


def test_the_checkpoint_knows_who_left(made: Callable[..., Any]) -> None:
    record, trials = made("sweep", halving=2)
    assert run_sweep(record, trials, runner)
    state = RunStore(record.run(0)).newest_state()
    assert state is not None
    for name, result in record.results.items():
        assert (state["jobs"][name]["progress"]["ended"], state["jobs"][name]["progress"]["step"]) == (
            result.ended,
            result.step,
        )


def test_trials_share_runs_as_the_plan_allows(made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    def plan(room: int | None) -> Callable[[Trials, list[str]], tuple[Callable[[list[str]], int], int | None]]:
        # A base of 100, and trials that take more the later they come.
        return lambda trials, names: (lambda some: 100 + sum(10 + int(one[-1]) for one in some), room)

    _, trials = made("sweep")
    for room, most, wanted in [(146, None, [4, 2]), (1000, None, [6]), (1000, 4, [4, 2]), (None, None, [6]),
                               (145, None, [3, 3]), (1, None, [1] * 6)]:  # fmt: skip
        monkeypatch.setattr(sharing, "_planned", plan(room))
        assert [len(group) for group in sharing.groups_of(trials, most)] == wanted, room


@pytest.mark.slow
def test_the_plan_of_trials_is_the_planners(made: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    _, trials = made("sweep")
    planned = Trials(trials.config.model_copy(update={"check_memory": True}), trials.trials[:2])
    assert [len(group) for group in sharing.groups_of(planned, None)] == [2]
    monkeypatch.setattr("weft.sweeps.sharing.room", lambda device: 1)
    assert [len(group) for group in sharing.groups_of(planned, None)] == [1, 1]


# ----------------------------------------------------------------------------------------------------- the command line


@pytest.fixture
def call(weft: Callable[..., Run], tiny_llama_dir: Path, tiny_data: Path) -> Callable[..., Run]:  # noqa: F811
    """``call("--grid", …)``: ``weft sweep`` over a file in the working directory."""
    lines = [f"model: {tiny_llama_dir}", f"data: {tiny_data}", *(word.replace("=", ": ") for word in COMMON)]
    Path("run.yaml").write_text("\n".join(lines), encoding="utf-8")
    return lambda *words: weft("sweep", "run.yaml", *words)


def test_the_command_shows_a_table_and_the_winners_settings(
    call: Callable[..., Run],
    weft: Callable[..., Run],  # noqa: F811
) -> None:
    found = call("--grid", "r=2,8", "learning_rate=3e-2,1e-6", "--halving", 2, "-q")
    assert found.code == 0, found.err
    lines = [line.split() for line in found.out.splitlines() if line.startswith("trial")]
    assert lines[0] == ["trial", "r", "learning_rate", "eval_loss", "steps", "ended"]
    assert [line[-1] for line in lines[1:]] == ["finished", "left", "left", "left"]
    paste = next(line for line in found.out.splitlines() if line.startswith("the same alone:"))
    words = paste.split("weft ")[1].split()
    assert words[:2] == ["train", "run.yaml"]
    result = weft(*words, "output_dir=alone", "--json", "-q")
    told = json.loads(result.out)["jobs"][0]
    record = json.loads(Path("runs/sweep/sweep.json").read_text())
    assert told["eval_loss_last"] == record["results"][record["winner"]]["figure"]
    again = call("--grid", "r=2,8", "learning_rate=3e-2,1e-6", "--halving", 2, "--json", "-q")
    assert json.loads(again.out)["completed"] is True
    other = call("--grid", "r=2,4", "learning_rate=3e-2,1e-6", "--halving", 2, "-q")
    assert (other.code, "holds another sweep" in other.err) == (2, True)


@pytest.mark.parametrize(
    ("words", "told"),
    [(["--grid", "r2=4,5"], "no job has a key 'r2'. Did you mean 'r'?"),
     (["--grid", "dtype=float32,bfloat16"], "'dtype' is a setting of the base"),
     (["--grid", "quantization=nf4,int8"], "'quantization' is a setting of the base"),
     (["--grid", "load_in_4bit=true,false"], "'load_in_4bit' is a setting of the base"),
     (["--grid", "max_length=4,8"], "'max_length' is a setting of the run"),
     (["--grid", "r=4,x"], "r: Input should be a valid integer"),
     (["--grid", "num_virtual_tokens=4,8"], "no job's method takes it"),
     (["--grid", "data=a,b"], "cannot be compared"),
     ([], "nothing to try"),
     (["--grid", "r=4,8", "r=5,6"], "names r twice"),
     (["--grid", "r=4,8", "--halving", 2, "steps="], "needs steps=N"),
     (["--grid", "r=4,8", "eval_size=0"], "nothing to compare trials by"),
     (["--grid", "r=4,8", "--metric", "accuracy"], "evaluations have eval_loss"),
     (["--grid", "r=4,8", "method=[lora, ia3]"], "settings of one job"),
     (["--random", 9, "r=4,8"], "make 2 different trials"),
     (["--grid", "r=4,8", "stray"], "not of the form key=value")],
)  # fmt: skip
def test_bad_input_is_named_before_weights_are_loaded(
    words: list[str], told: str, call: Callable[..., Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("weft.training.settings.load_base", lambda *a, **k: pytest.fail("weights were loaded"))
    found = call(*words)
    assert (found.code, found.err.count("\n")) == (2, 1), found.err
    assert told in found.err
    assert not Path("runs").exists()


def test_a_folder_with_something_else_is_left_alone(call: Callable[..., Run]) -> None:
    Path("mine").mkdir()
    Path("mine/letter.txt").write_text("dear")
    for more in ([], ["overwrite_output_dir=true"]):
        found = call("--grid", "r=4,8", "--output-dir", "mine", *more)
        assert (found.code, "something else than a sweep" in found.err) == (2, True)
    assert Path("mine/letter.txt").read_text() == "dear"


def test_a_damaged_record_is_named(made: Callable[..., Any]) -> None:
    record, _ = made("sweep")
    path = record.folder / "sweep.json"
    text = json.loads(path.read_text())
    path.write_text(json.dumps({**text, "results": {"trial-00": {"wrong": 1}}}))
    with pytest.raises(UserError, match="result of trial-00 is damaged"):
        made("sweep")
    path.write_text(json.dumps({**text, "groups": 3}))
    with pytest.raises(UserError, match="groups: expected an array"):
        made("sweep")
