"""Forgetting while training: what is measured, where, for whom; the rule that stops a job; resuming; refusals."""

from __future__ import annotations

import json
import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit
from tests.kit.tokenizers import byte_tokenizer

from weft.api import Adapters
from weft.assets import base_text_path
from weft.cli.progress import TableReporter, plain_line
from weft.cli.train import _show, _summary
from weft.data import Sample
from weft.errors import UserError
from weft.evaluate.forgetting import read_documents
from weft.files.run_folder import RunStore
from weft.files.tensors import read_tensors
from weft.generation.rollouts import writer
from weft.models import describe
from weft.objectives.passes import evaluate_loss
from weft.training import Job, JobConfig, Trainer, make_config
from weft.training.checks import check_names
from weft.training.forgetting import OWN_TEXT_FILE, Forgetting
from weft.training.job import Progress
from weft.training.run import train

GENERAL = read_documents(base_text_path())[:30]
METHODS = ("lora", "prompt_tuning", "prefix_tuning", "bottleneck", "ia3")


def texts(count: int = 6, *, upper: bool = True) -> list[Sample]:
    """Texts in one half of the vocabulary: who learns the other half forgets them."""
    half = kit.VOCABULARY // 2
    made = [[half * upper + token % half for token in ids] for ids in kit.texts(count, 3, 14)]
    return [Sample(ids, [0.0] + [1.0] * (len(ids) - 1), f"text {i}") for i, ids in enumerate(made)]


def make(*given: dict[str, Any], dtype: torch.dtype = torch.float32) -> tuple[Adapters, list[Job]]:
    torch.manual_seed(0)
    adapters, jobs = Adapters(model := kit.make_model("llama", dtype), describe(model)), []
    for more in given:
        values = {"method": "lora", "name": more.get("method", "lora"), "steps": 6, "batch_size": 2, **more}
        config = JobConfig(**values)
        adapter = adapters.add(config.name, config.method_config())
        jobs.append(Job(config, adapter, texts(8, upper=False), kit.samples(3, seed=9)))
    return adapters, jobs


def run(adapters: Adapters, jobs: list[Job], **more: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The result of a run, and its measurements of forgetting."""
    events: list[Any] = []
    measure = Forgetting(adapters, texts(), byte_tokenizer())
    result = Trainer(adapters, jobs, forgetting=measure, on_event=events.append, verify_packing=False, **more).run()
    return result, [event for event in events if event["event"] == "forgetting"]


# ------------------------------------------------------------------------------------------------------------ figures


def test_the_change_is_the_mean_over_tokens_for_every_method_at_once() -> None:
    """All methods in shared passes give what each gives when it is evaluated by itself."""
    adapters, jobs = make(*({"method": method} for method in METHODS), dtype=torch.float64)
    for job in jobs:
        kit.randomize(job.adapter)
    measure = Forgetting(adapters, texts(), byte_tokenizer())
    found = measure.measure([job.name for job in jobs], lambda: False)
    base = evaluate_loss(adapters, None, texts())
    assert found is not None
    for name, told in found.items():
        own = evaluate_loss(adapters, name, texts())
        assert told.general_loss == pytest.approx(own, rel=1e-6)
        assert told.general_base_loss == pytest.approx(base, rel=1e-6)
        assert told.forgetting == pytest.approx(own - base, abs=1e-6)
        assert told.forgetting_per_byte == pytest.approx((own - base) * measure.tokens / measure.bytes, abs=1e-6)
        assert abs(told.forgetting) > 1e-4


def test_bytes_are_those_of_the_tokens_that_count() -> None:
    """Not those of the first token, which nothing predicts, nor of an end token."""
    tokenizer = byte_tokenizer()
    ids = [*tokenizer("héllo")["input_ids"], tokenizer.eos_token_id]
    sample = Sample(ids, [0.0] + [1.0] * (len(ids) - 1), "it")
    adapters, _ = make()
    measure = Forgetting(adapters, [sample], tokenizer)
    assert (measure.tokens, measure.bytes) == (len(ids) - 1, len("éllo".encode()))


def test_the_error_is_that_of_a_ratio_of_sums() -> None:
    """By hand, of two texts with 1 and 3 tokens: the mean is 2, and each text is as far from it as it weighs."""
    adapters, _ = make()
    measure = Forgetting(adapters, texts(2), byte_tokenizer())
    measure.weights, measure.tokens = [1.0, 3.0], 4.0
    told = measure._compared([3.0, 5.0], [0.0, 0.0])
    assert told.forgetting == 2.0
    assert told.forgetting_stderr == pytest.approx(math.sqrt((1 + 1) * 2 / 1) / 4)


def test_an_exact_job_forgets_to_the_bit_what_it_forgets_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the texts take several passes, and not all jobs go into one."""
    monkeypatch.setattr("weft.training.forgetting.EVALUATION_TOKENS", 40)
    monkeypatch.setattr("weft.training.forgetting._PIECE", 20)
    found = []
    for names in (("lora",), ("prefix_tuning", "lora", "ia3")):
        adapters, jobs = make(*({"method": name} for name in names))
        adapters.exact = True
        for job in jobs:
            kit.randomize(job.adapter)
        told = Forgetting(adapters, texts(), byte_tokenizer()).measure(names, lambda: False)
        assert told is not None
        found.append(told["lora"])
    assert found[0] == found[1]


def test_the_bases_loss_is_computed_once() -> None:
    adapters, jobs = make({})
    measure = Forgetting(adapters, texts(), byte_tokenizer())
    asked: list[list[str | None]] = []
    losses = measure._losses

    def noted(names: Any, should_stop: Any) -> Any:
        asked.append(list(names))
        return losses(names, should_stop)

    measure._losses = noted  # type: ignore[method-assign]
    for _ in range(2):
        measure.measure([job.name for job in jobs], lambda: False)
    assert asked == [[None], ["lora"], ["lora"]]


def test_it_is_measured_at_evaluations_checkpoints_and_the_end(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    store = RunStore(tmp_path / "run")
    adapters, jobs = make({"eval_steps": 4}, {"method": "ia3"})
    _, told = run(adapters, jobs, store=store, save_steps=3)
    assert [event["step"] for event in told if event["job"] == "lora"] == [0, 3, 4, 6]
    assert [event["step"] for event in told if event["job"] == "ia3"] == [0, 3, 6], "each once a step"


# --------------------------------------------------------------------------------------------------------------- rule


def limited(folder: Path | None = None, **more: Any) -> tuple[Any, list[dict[str, Any]], list[Job]]:
    """A run of a job that learns far too fast, beside one that is slow."""
    rule = {"eval_steps": 1, "max_forgetting": 0.35, "learning_rate": 0.1, "steps": 8, **more}
    adapters, jobs = make(rule, {"method": "ia3", "eval_steps": 1, "steps": 8, "learning_rate": 1e-4})
    store = None
    if folder is not None:
        folder.mkdir(parents=True)
        store = RunStore(folder)
    result, told = run(adapters, jobs, store=store)
    return result, told, jobs


def test_a_job_stops_at_the_first_measurement_over_the_limit_and_keeps_the_last_below() -> None:
    result, told, jobs = limited()
    state, own = result.jobs["lora"], [event for event in told if event["job"] == "lora"]
    assert state["ended"] == "max_forgetting"
    assert result.jobs["ia3"]["ended"] == "finished", "the job beside it goes on"
    *below, over = own
    assert all(event["forgetting"] <= 0.35 for event in below), "and at the first one above it is over"
    assert over["forgetting"] > 0.35
    assert over["step"] == state["step"] < 8
    assert state["best_at"] == below[-1]["step"] > 0
    assert state["forgetting_kept"] == below[-1]["forgetting"]
    adapters, fresh = make({"eval_steps": 1, "learning_rate": 0.1, "steps": 8}, {"method": "ia3"})
    trainer = Trainer(adapters, fresh, verify_packing=False)
    for _ in range(state["best_at"]):
        trainer._step(fresh)
    for kept, there in zip(jobs[0].parameters, fresh[0].parameters, strict=True):
        assert torch.equal(kept, there), "the weights are those of that step"
    assert f"the weights of step {state['best_at']} are kept" in state["reason"]


def test_the_rule_wins_over_an_evaluation_that_gains_at_the_same_step() -> None:
    """Early stopping would keep the weights of the step at which too much was forgotten."""
    job = make({"eval_steps": 1, "max_forgetting": 0.5, "early_stopping_patience": 9})[1][0]
    from weft.training.forgetting import take_note

    for step, (change, loss) in enumerate([(0.0, 3.0), (0.4, 2.0), (0.45, 2.5), (0.6, 1.0)]):
        job.progress.step = step
        take_note(job, change)
        job.evaluated({"": loss}, {})
    assert job.progress.ended == "max_forgetting"
    assert (job.progress.best_at, job.progress.forgetting_kept, job.progress.best_eval_loss) == (1, 0.4, 2.0)


def test_a_checkpoint_between_evaluations_decides_nothing() -> None:
    """``save_steps`` may change when a run goes on, and must change no result."""
    from weft.training.forgetting import take_note

    job = make({"eval_steps": 2, "max_forgetting": 0.5})[1][0]
    take_note(job, 0.0)
    job.progress.step = 1
    take_note(job, 9.0)
    assert job.active
    assert job.progress.best_at == 0
    job.progress.step = 2
    take_note(job, float("nan"))
    assert job.progress.ended == "max_forgetting", "what is not a number is over any limit"
    assert job.progress.forgetting is None


def test_a_job_that_begins_over_the_limit_or_leaves_it_at_once_has_failed() -> None:
    result, _, _ = limited(max_forgetting=1e-9)
    assert result.jobs["lora"]["ended"] == "failed"
    assert "only the weights that it began with were below" in result.jobs["lora"]["reason"]
    adapters, jobs = make({"method": "prefix_tuning", "eval_steps": 1, "max_forgetting": 1e-9})
    kit.randomize(jobs[0].adapter)
    result, told = run(adapters, jobs)
    state = result.jobs["prefix_tuning"]
    assert (state["ended"], state["step"], len(told)) == ("failed", 0, 1)
    assert "no weights before were below" in state["reason"]


# ---------------------------------------------------------------------------------------------------------- whole runs


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with instructions and general text."""
    rows = [{"instruction": f"Say {i}.", "output": f"It is {i**2}."} for i in range(12)]
    (tmp_path / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "text.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in GENERAL))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def settings(**more: Any) -> Any:
    values = {
        "model": "tiny-llama", "data": "train.jsonl", "method": ["lora", "prompt_tuning"], "threads": 1, "steps": 8,
        "batch_size": 2, "eval_steps": 2, "save_steps": 3, "logging_steps": 1, "output_dir": "run",
        "forgetting_eval": "text.jsonl", "learning_rate": 5e-3,
    }  # fmt: skip
    if "jobs" in more:
        del values["method"]
    return make_config({**values, **more})


def measured(folder: Path) -> list[dict[str, Any]]:
    rows = map(json.loads, (folder / "metrics.jsonl").read_text().splitlines())
    return [{k: v for k, v in row.items() if k != "time"} for row in rows if row["event"] == "forgetting"]


def hashes(folder: Path) -> dict[str, str]:
    found = sorted((folder / "adapters").glob("*/adapter_model.safetensors"))
    return {path.parent.name: kit.sha256(list(read_tensors(path).values())) for path in found}


@pytest.mark.parametrize("text", ["text.jsonl", "base"])
def test_a_run_that_is_stopped_anywhere_goes_on_to_the_same_bits(place: Path, text: str) -> None:
    """The limit is such that LoRA has stopped at step 6 and is kept as of step 4; cuts lie before, at and after it."""
    config = settings(forgetting_eval=text, jobs=[
        {"method": "lora", "max_forgetting": LIMIT[text], "learning_rate": 1e-2}, {"method": "prompt_tuning"}
    ])  # fmt: skip
    whole = train(config, writer=writer)
    assert whole.jobs["lora"]["ended"] == "max_forgetting"
    assert 0 < whole.jobs["lora"]["best_at"] < whole.jobs["lora"]["step"] < 8
    wanted, events = hashes(place / "run"), measured(place / "run")
    kept, ended = whole.jobs["lora"]["best_at"], whole.jobs["lora"]["step"]
    for cut in (1, kept + 1, ended + 1) if text != "base" else (kept + 1,):
        shutil.rmtree(place / "run")
        seen: list[Any] = []
        train(config, writer=writer, on_event=seen.append, should_stop=lambda: _steps(seen) >= cut)  # noqa: B023
        train(config.model_copy(update={"resume": True}), writer=writer)
        assert hashes(place / "run") == wanted, cut
        assert measured(place / "run") == events, cut


# Of what LoRA forgets at steps 4 and 6, something in between.
LIMIT = {"text.jsonl": 0.067, "base": 0.038}


def _steps(events: list[Any]) -> int:
    return max((event["step"] for event in events if event["event"] == "step"), default=0)


def test_what_the_base_writes_is_the_same_for_every_run_and_can_be_given_as_a_file(place: Path) -> None:
    """It is written once, with the same seed; another run that names the file measures on the same tokens."""
    for name, text in (("a", "base"), ("b", "base"), ("c", f"a/{OWN_TEXT_FILE}")):
        train(settings(forgetting_eval=text, output_dir=name, steps=1, method="lora"), writer=writer)
    facts = [json.loads((place / name / "run.json").read_text())["forgetting_eval"] for name in "abc"]
    assert facts[0] == facts[1] == facts[2]
    assert facts[0]["texts"] > 32
    assert measured(place / "a") == measured(place / "c")
    assert not (place / "c" / OWN_TEXT_FILE).exists()


def test_a_run_does_not_go_on_with_another_text(place: Path) -> None:
    train(settings(method="lora", steps=4))
    (place / "text.jsonl").write_text('{"text": "Something else."}\n')
    with pytest.raises(UserError, match="the text of forgetting_eval is not what the run began with"):
        train(settings(method="lora", steps=6, resume=True))
    with pytest.raises(UserError, match="forgetting_eval: '…' -> None"):
        train(settings(method="lora", steps=6, resume=True, forgetting_eval=None))


def test_the_result_and_the_progress_tell_it(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = settings(learning_rate=1e-2, max_forgetting=LIMIT["text.jsonl"], method="lora")
    events: list[Any] = []
    result = train(config, on_event=events.append)
    facts = {"name": "lora", "method": "lora", "trainable_parameters": 1, "folder": "run/adapters/lora"}
    told = _summary(config, result, [facts])["jobs"][0]
    state = result.jobs["lora"]
    assert told["forgetting"] == {"last": state["forgetting"], "kept": state["forgetting_kept"]}
    _show({**_summary(config, result, [facts]), "output_dir": "run"})
    shown = capsys.readouterr().out
    assert "max_forgetting" in shown
    assert f"{state['forgetting_kept']:+.4f}" in shown
    assert f"lora: {state['reason']}" in shown
    lines = [plain_line(event) for event in events if event["event"] == "forgetting"]
    assert lines[0].startswith("forgetting job=lora step=0 forgetting=+0.0000 per_byte=+0.0000 general_loss=")
    table = TableReporter([("lora", 8)])
    for event in events:
        table.event(event)
    assert "forgot" in [column.header for column in table.table().columns]


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"max_forgetting": 0.5, "forgetting_eval": None}, "max_forgetting needs forgetting_eval"),
        ({"max_forgetting": -0.5}, "max_forgetting"),
        ({"max_forgetting": 0.0}, "max_forgetting"),
        ({"max_forgetting": 0.5, "eval_steps": None}, "max_forgetting needs eval_steps"),
        ({"forgetting_eval": "0.5*a.jsonl + 0.5*b.jsonl"}, "forgetting_eval has weights"),
        ({"task": "sequence_classification"}, "forgetting_eval is for jobs that write"),
    ],
)
def test_settings_that_cannot_be_are_named(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        settings(**{"method": "lora", **wrong})


def test_a_text_that_is_not_there_is_named_before_the_base_is_read(place: Path) -> None:
    with pytest.raises(UserError, match=r"nowhere\.txt"):
        check_names(settings(forgetting_eval="nowhere.txt"))


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "nothing to measure forgetting on|empty"),
        ('{"text": "   "}\n', "'text' is empty"),
        ('{"text": "' + "word " * 2000 + '"}\n', r"text\.jsonl:1.*1024|exceeds"),
    ],
)
def test_a_text_that_is_empty_or_too_long_is_named_before_weights_are_loaded(
    place: Path, monkeypatch: pytest.MonkeyPatch, content: str, message: str
) -> None:
    (place / "text.jsonl").write_text(content)
    monkeypatch.setattr("weft.training.settings.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=message):
        train(settings())
    assert not (place / "run").exists()


def test_a_text_must_leave_room_for_learned_tokens(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "text.jsonl").write_text('{"text": "' + "a 1 " * 330 + '"}\n')
    monkeypatch.setattr("weft.training.settings.load_base", lambda *_, **__: pytest.fail("weights were loaded"))
    with pytest.raises(UserError, match=r"text\.jsonl:1.* learned ones of job 'prompt_tuning' exceed"):
        train(settings(num_virtual_tokens=600))


def test_a_base_cannot_write_where_nothing_lets_it(place: Path) -> None:
    with pytest.raises(UserError, match=r"forgetting_eval: base: .*writer"):
        train(settings(forgetting_eval="base"))


def test_checkpoints_of_earlier_versions_have_no_forgetting() -> None:
    assert Progress(step=3, ended="early_stop").best_at is None


@pytest.mark.parametrize("objective", ["ppo", "dpo"])
def test_jobs_over_judged_answers_are_measured_and_what_scores_is_left_out(place: Path, objective: str) -> None:
    """PPO brings a job for values, which writes no text and has no limit."""
    rows = [{"prompt": f"How much is {i} + {i}?", "chosen": f"{2 * i}", "rejected": "no"} for i in range(1, 7)]
    (place / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    reward = {"reward": "length", "max_tokens": 2, "slack": 3}
    written = {"rewards": [reward], "num_generations": 2, "max_completion_length": 4}
    more: dict[str, Any] = {"objective_settings": written} if objective == "ppo" else {}
    config = settings(
        method="lora", objective=objective, data="pairs.jsonl" if objective == "dpo" else "train.jsonl", steps=2,
        max_forgetting=9.0, **more,
    )  # fmt: skip
    result = train(config, writer=writer)
    assert result.jobs["lora"]["ended"] == "finished"
    assert {event["job"] for event in measured(place / "run")} == {"lora"}
    assert [event["step"] for event in measured(place / "run")] == [0, 2]
