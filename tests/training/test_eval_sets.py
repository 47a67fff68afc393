"""Evaluation on named sets: a loss each, as alone; early stopping on one of them; forgetting; resuming; refusals."""

from __future__ import annotations

import functools
import io
import itertools
import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from tests import kit
from transformers import T5Config, T5ForConditionalGeneration

from weft.api import Adapters
from weft.cli.progress import LiveReporter, plain_line
from weft.cli.train import _show, _summary
from weft.data import Sample
from weft.errors import UserError
from weft.files.run_folder import RunStore
from weft.heads.classification import ClassificationTask
from weft.models import describe
from weft.objectives.passes import evaluate_loss
from weft.preview.data_sets import examine
from weft.training import Job, JobConfig, RunConfig, Trainer, make_config
from weft.training.checks import check_names
from weft.training.config import build_config
from weft.training.loop import TrainResult
from weft.training.run import train
from weft.training.same_run import check_same_run, rooted

SETS = {"domain": "domain.jsonl", "general": ["b.jsonl", "c.jsonl"]}
RECORDS = {"train": 8, "domain": 5, "b": 3, "c": 4}
SIZES = {"domain": 3, "general": 5}
CLASSES = ClassificationTask(("bad", "good"))


def answered(count: int, kind: str, seed: int) -> list[Sample]:
    """Samples to be written, classified, or answered by an encoder-decoder."""
    if kind == "llama":
        return kit.samples(count, seed=seed)
    texts = kit.texts(count, 3, 9, seed)
    if kind == "classes":
        return [Sample(ids, [0.0] * len(ids), f"text {i}", label=ids[0] % 2) for i, ids in enumerate(texts)]
    return [Sample(ids, [0.0] * len(ids), f"text {i}", target_ids=ids[:2]) for i, ids in enumerate(texts)]


def make(*given: dict[str, Any], kind: str = "llama", only: str | None = None) -> tuple[Adapters, list[Job]]:
    """Jobs with sets of 3 and 5 samples to evaluate on; or, without names, with ``only`` one of them."""
    torch.manual_seed(0)
    sizes = {"vocab_size": kit.VOCABULARY, "d_model": 16, "d_kv": 8, "d_ff": 16, "num_layers": 1, "num_heads": 2}
    t5 = T5Config(**sizes, pad_token_id=0, eos_token_id=1, decoder_start_token_id=0)
    model = T5ForConditionalGeneration(t5).eval() if kind == "t5" else kit.make_model("llama")
    adapters, jobs, held = Adapters(model, describe(model)), [], answered(8, kind, 60)
    for more in given:
        task = {"t5": "seq2seq", "classes": "sequence_classification"}.get(kind, "causal_lm")
        config = JobConfig(**{"method": "lora", "steps": 3, "batch_size": 2, "eval_steps": 2, "task": task,
                              "name": more.get("method", "lora"), **more})  # fmt: skip
        adapter = adapters.add(config.name, config.method_config(), head=CLASSES if kind == "classes" else None)
        mine = {None: held, "domain": held[:3], "general": held[3:]}[only]
        jobs.append(Job(config, adapter, answered(8, kind, 0), mine, eval_sizes={} if only else SIZES))
    return adapters, jobs


def run(adapters: Adapters, jobs: list[Job], **options: Any) -> tuple[Any, list[dict[str, Any]]]:
    """The result of a run, and its evaluations."""
    events: list[Any] = []
    result = Trainer(adapters, jobs, on_event=events.append, verify_packing=False, **options).run()
    return result, [event for event in events if event["event"] == "eval"]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working directory, with data."""
    for begin, (name, count) in enumerate(RECORDS.items()):
        rows = [{"instruction": f"Say {i}.", "output": f"It is {(begin * 20 + i) ** 2}."} for i in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def config(model: object = "none", **more: Any) -> RunConfig:
    trained = {} if "jobs" in more else {"method": "lora"}
    return make_config({"model": str(model), "data": "train.jsonl", "steps": 1, "eval_steps": 2, "output_dir": "run",
                        "threads": 1, **trained, **more})  # fmt: skip


@pytest.mark.parametrize("kind", ["llama", "t5", "classes"])
def test_each_set_has_the_loss_that_it_has_alone(kind: str) -> None:
    """To the bit, and all other figures; what is trained does not feel who evaluates."""
    given: list[dict[str, Any]] = [{}, {"method": "prefix_tuning", "method_settings": {"num_virtual_tokens": 3}}]
    adapters, jobs = make(*given, kind=kind)
    began = {job.name: evaluate_loss(adapters, job.name, job.eval_samples[:3]) for job in jobs}
    base = None if kind == "classes" else evaluate_loss(adapters, None, jobs[0].eval_samples[:3])
    result, named = run(adapters, jobs)
    assert [(event["job"], event["step"]) for event in named] == [(n, s) for s in (0, 2, 3) for n in began]
    for name in SIZES if kind == "llama" else ["general"]:
        others, theirs = make(*given, kind=kind, only=name)
        alone, told = run(others, theirs)
        assert [kit.sha256(job.parameters) for job in theirs] == [kit.sha256(job.parameters) for job in jobs]
        for one, both in zip(told, named, strict=True):
            assert list(one)[:4] == ["event", "job", "step", "eval_loss"]
            mine = {key: value for key, value in both.items() if key.startswith(f"eval_{name}_")}
            assert mine == {f"eval_{name}_{key[5:]}": value for key, value in one.items() if key.startswith("eval_")}
            assert ("eval_accuracy" in one) is (kind == "classes")
        for job in began:
            assert result.jobs[job]["best_eval_loss"][name] == alone.jobs[job]["best_eval_loss"]
            assert (
                alone.jobs[job]["metrics"].items()
                == {
                    key.removeprefix(f"{name}_"): value
                    for key, value in result.jobs[job]["metrics"].items()
                    if key.startswith(name)
                }.items()
            )
    for event in named:
        assert event.get("base_domain_loss") == (base if event["step"] == 0 else None)
        assert event["step"] or event["eval_domain_loss"] == began[event["job"]]
    assert began["prefix_tuning"] != base, "a fresh prefix is not the base, so the forgetting does not begin with it"


def test_sets_are_read_and_travel_with_the_adapter(place: Path, tiny_llama_dir: Path) -> None:
    own = [
        {"method": "lora", "early_stopping_patience": 1, "early_stopping_on": "general"},
        {"method": "ia3", "eval_data": {"mine": "b.jsonl"}, "early_stopping_patience": 1},  # the only one is watched
        {"method": "bitfit", "add_missing": True, "eval_data": "c.jsonl"},
    ]
    sets = {**SETS, "domain": str(place / "domain.jsonl")}
    read: dict[str, list[int]] = {}

    def note(setup: Any) -> None:
        read.update({job.name: [*map(len, job.eval_sets.values())] for job in setup.jobs})

    train(config(tiny_llama_dir, jobs=own, eval_data=sets), on_ready=note)
    assert read == {"lora": [5, 7], "ia3": [3], "bitfit": [4]}
    lines = [json.loads(line) for line in Path("run/metrics.jsonl").read_text().splitlines()]
    told = {line["job"]: [key for key in line if "eval_" in key] for line in lines if line["event"] == "eval"}
    assert told == {
        "lora": ["eval_domain_loss", "eval_general_loss"],
        "ia3": ["eval_mine_loss"],
        "bitfit": ["eval_loss"],
    }
    watched = {line["job"]: line.get("early_stopping_on") for line in lines if line["event"] == "eval"}
    assert watched == {"lora": "general", "ia3": "mine", "bitfit": None}
    data = json.loads(Path("run/adapters/lora/weft.json").read_text())["data"]
    assert data["settings"]["eval_data"] == {"domain": "domain.jsonl", "general": ["b.jsonl", "c.jsonl"]}
    assert data["eval_records"] == 12


# ------------------------------------------------------------------------------------------------------ early stopping


def test_early_stopping_watches_the_named_set() -> None:
    """As the run that evaluates on that set alone: same end, same weights, though the other one goes its own way."""
    wild = {"learning_rate": 0.02, "early_stopping_patience": 2, "steps": 24}
    ends: list[Any] = []
    for only in (None, "domain"):
        adapters, (job,) = make({**wild, "early_stopping_on": None if only else "domain"}, only=only)
        result, _ = run(adapters, [job])
        best = result.jobs["lora"]["best_eval_loss"]
        assert result.jobs["lora"]["ended"] == "early_stop"
        assert evaluate_loss(adapters, "lora", job.eval_samples[:3]) == (best if only else best["domain"])
        ends.append((kit.sha256(job.parameters), result.jobs["lora"]["step"]))
    assert ends[0] == ends[1]
    result, _ = run(*make({**wild, "early_stopping_on": "general"}))
    assert result.jobs["lora"]["step"] < ends[0][1], "the other set would have ended it sooner"


def test_gains_by_hand() -> None:
    _, (job,) = make({"early_stopping_patience": 2, "early_stopping_on": "general", "early_stopping_min_delta": 0.5})
    for domain, general in [(5.0, 5.0), (4.9, 4.6), (math.nan, 4.4)]:
        job.evaluated({"domain": domain, "general": general}, {})
    assert job.progress.best_eval_loss == {"domain": 4.9, "general": 4.4}, "the margin is that of the watched set"
    assert (job.progress.evals_without_gain, job.active) == (0, True)
    for domain in (1.0, 0.5):
        job.evaluated({"domain": domain, "general": 4.4}, {})
    assert (job.progress.ended, job.progress.best_eval_loss) == ("early_stop", {"domain": 0.5, "general": 4.4})


# ------------------------------------------------------------------------------------------------------------- resume


def test_a_stopped_run_goes_on_with_its_best_by_name(tmp_path: Path) -> None:
    """Asked to stop before the first evaluation is whole, and after some."""
    ends = []
    for name, stops in {"whole": [999], "first": [4, 999], "later": [12, 999]}.items():
        for stop in stops:
            settings = {"early_stopping_patience": 2, "early_stopping_on": "general", "steps": 4}
            adapters, jobs = make(settings)
            store, asked = RunStore(tmp_path / name), itertools.count(1)
            store.prepare(overwrite=False, resume=True)
            trainer = Trainer(adapters, jobs, store=store, verify_packing=False)
            trainer.should_stop = functools.partial(lambda asked, stop: next(asked) >= stop, asked, stop)
            trainer.resume()
            assert trainer.run().completed is (stop == 999)
            store.release()
        found = store.latest()
        assert found is not None
        progress = {key: value for key, value in found[0]["jobs"]["lora"]["progress"].items() if key != "seconds"}
        lines = [json.loads(line) for line in (tmp_path / name / "metrics.jsonl").read_text().splitlines()]
        told = [{k: v for k, v in line.items() if k != "time"} for line in lines if line["event"] == "eval"]
        ends.append((progress, told, kit.sha256(found[1]["lora"].values())))
    assert ends[0] == ends[1] == ends[2]
    assert ends[0][0]["best_eval_loss"] == {
        name: min(line[f"eval_{name}_loss"] for line in ends[0][1]) for name in SIZES
    }


def test_what_may_change_of_a_run_that_goes_on(place: Path) -> None:
    stops = {"early_stopping_patience": 1, "early_stopping_on": "domain"}
    begun = config(eval_data=SETS, **stops)
    check_same_run(config(eval_data={**SETS, "domain": "moved.jsonl"}, **stops), begun)
    for more, text in [
        (
            {"eval_data": {"mine": "x", "domain": "y"}, **stops},
            r"eval_data.general: .* -> None\n  eval_data.mine: None",
        ),
        ({"eval_data": SETS, **stops, "early_stopping_on": "general"}, "early_stopping_on: 'domain' -> 'general'"),
    ]:
        with pytest.raises(UserError, match=text):
            check_same_run(config(**more), begun)
    assert rooted(begun).eval_data == {
        "domain": str(place / "domain.jsonl"), "general": [str(place / "b.jsonl"), str(place / "c.jsonl")]
    }  # fmt: skip


def test_a_record_in_another_set_is_other_data() -> None:
    _, (job,) = make({})
    found = set()
    for sizes in (SIZES, {"domain": 4, "general": 4}, {"mine": 3, "general": 5}, {}):
        job.eval_sizes = sizes
        found.add(Job.__dict__["fingerprint"].func(job))
    assert len(found) == 4


# ------------------------------------------------------------------------------------------------------------ progress


def evaluation(step: int, domain: float, general: float, **more: object) -> dict[str, object]:
    told = {"event": "eval", "job": "lora", "step": step, "eval_domain_loss": domain, "eval_general_loss": general}
    return {**told, **more, "early_stopping_on": "domain"}


def test_the_table_tells_the_forgetting_of_the_kept_weights(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By hand: the weights of step 2 are kept, for the watched loss was lowest there."""
    log = [
        evaluation(0, 5.0, 3.0, base_domain_loss=5.25, base_general_loss=2.5),
        evaluation(2, 1.0, 4.0),
        evaluation(4, 1.5, 3.5),
    ]
    Path("run").mkdir()
    Path("run/metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in log))
    best = {"domain": 1.0, "general": 3.0}
    state = {"ended": "early_stop", "reason": None, "step": 4, "total_steps": 9, "best_eval_loss": best, "tokens": 8}
    job = {"name": "lora", "method": "lora", "trainable_parameters": 8, "folder": "run/adapters/lora",
           "eval_sets": ["domain", "general"], "early_stopping_on": "domain"}  # fmt: skip
    result = TrainResult(True, 4, 1.0, {"lora": {**state, "seconds": 1.0}})
    monkeypatch.setattr("weft.files.whole.weights_bytes", lambda folder: 1000)
    summary = _summary(config(eval_data=SETS), result, [job])
    (row,) = summary["jobs"]
    assert row["eval_loss_first"] is row["eval_loss_best"] is None, "no number stands for several sets"
    keys = ("base_loss", "eval_loss_first", "eval_loss_best", "eval_loss_last", "eval_loss_kept", "forgetting")
    found = {name: [figures[key] for key in keys] for name, figures in row["eval_sets"].items()}
    assert found == {"domain": [5.25, 5.0, 1.0, 1.5, 1.0, -4.25], "general": [2.5, 3.0, 3.0, 3.5, 4.0, 1.5]}
    _show(summary)
    told = [" ".join(line.split()) for line in capsys.readouterr().out.splitlines()]
    assert "job evaluated on base first best last kept forgetting" in told
    assert "lora domain (early stopping) 5.2500 5.0000 1.0000 1.5000 1.0000 -4.2500" in told
    assert "lora general 2.5000 3.0000 3.0000 3.5000 4.0000 +1.5000" in told
    narrow = Console(width=60)
    monkeypatch.setattr("weft.cli.common.console", lambda: narrow)
    _show(summary)
    told = capsys.readouterr().out.splitlines()
    assert told[told.index("lora on general:") + 1] == (
        "  base 2.5000  first 3.0000  best 3.0000  last 3.5000  kept 4.0000  forgetting +1.5000"
    )
    # Without early stopping the last weights are kept; a failed job keeps none.
    summary = _summary(config(eval_data=SETS), result, [{**job, "early_stopping_on": None}])
    assert summary["jobs"][0]["eval_sets"]["general"]["forgetting"] == 1.0
    result.jobs["lora"]["ended"] = "failed"
    assert _summary(config(eval_data=SETS), result, [job])["jobs"][0]["eval_sets"]["general"]["forgetting"] is None


def test_progress_names_the_sets() -> None:
    event = evaluation(0, 2.0, 3.0, base_domain_loss=2.5, eval_domain_accuracy=0.5, eval_domain_f1=0.25)
    assert plain_line(event) == (
        "eval job=lora step=0 eval_domain_loss=2.0000 eval_general_loss=3.0000 base_domain_loss=2.5000 "
        "domain_accuracy=0.5000 early_stopping_on=domain"
    )
    for width, heading, *lines in (
        (100, "loss eval domain eval general acc domain tok/s", "0/4 2.0000 3.0000 0.500"),
        (64, "step loss eval acc tok/s ETA mem", "0/4", "domain 2.0000 0.500", "general 3.0000"),  # no room, no cuts
    ):
        screen = io.StringIO()
        console = Console(file=screen, force_terminal=True, width=width, color_system=None, legacy_windows=False)
        reporter = LiveReporter([("lora", 4)], console)
        reporter.event(event)
        reporter.close()
        assert heading in " ".join(screen.getvalue().split())
        assert all(line in " ".join(screen.getvalue().split()) for line in lines)


# ------------------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("more", "text"),
    [
        ({"eval_data": {}}, "eval_data: no set is named"),
        ({"eval_data": {"domain.jsonl": "x"}}, "'domain.jsonl' cannot name a set: use letters"),
        ({"eval_data": {"data/domain": "x"}}, "the path stands behind the name"),
        ({"eval_data": {"": "x"}}, "'' cannot name a set"),
        ({"eval_data": {"path": "x"}}, "'path' cannot name a set: it is a key of a source"),
        ({"eval_data": {1: "x"}}, "1 cannot name a set; a name is text"),
        ({"eval_data": {"domain": None}}, "eval_data: domain: data is None"),
        ({"eval_data": {"domain": {"path": "x"}}}, "eval_data: domain: data is "),
        ({"data": {"domain": "x"}}, "data: data is {'domain': 'x'}; expected a path"),
        ({"eval_data": SETS, "eval_split": 0.1}, "exclude each other"),
        ({"eval_data": SETS, "early_stopping_patience": 1},
         "watches one set of eval_data; name it, early_stopping_on: domain or general"),
        ({"eval_data": SETS, "early_stopping_patience": 1, "early_stopping_on": "generall"},
         "the sets domain, general. Did you mean 'general'"),
        ({"eval_data": "x", "early_stopping_patience": 1, "early_stopping_on": "domain"}, "eval_data has no names"),
        ({"eval_size": 2, "early_stopping_patience": 1, "early_stopping_on": "domain"}, "eval_data has no names"),
        ({"eval_data": SETS, "early_stopping_on": "domain"}, "early_stopping_on needs early_stopping_patience"),
        ({"jobs": [{"method": "lora", "eval_data": {"a b": "x"}}]}, r"jobs\[0\]: eval_data: 'a b' cannot name a set"),
        ({"eval_data": {"a": "x", "a_macro": "y"}, "task": "sequence_classification"},
         "the sets 'a' and 'a_macro' would both have the figure eval_a_macro_f1"),
    ],
)  # fmt: skip
def test_what_cannot_be(more: dict[str, Any], text: str) -> None:
    with pytest.raises(UserError, match=text):
        make_config({"model": "none", "data": "x", "method": "lora", "eval_steps": 2, **more})


def test_places_are_checked_by_name(place: Path) -> None:
    for sets, text in [
        ({"a": "domain.jsonl", "b": "none.jsonl"}, "no data file at none.jsonl"),
        ({"a": ["b.jsonl", "b.jsonl"]}, "stands twice"),
        ({"a": "domain.jsonl", "b": [{"path": "c.jsonl", "format": "alpacca"}]}, "alpacca"),
    ]:
        with pytest.raises(UserError, match=text):
            check_names(config(eval_data=sets))


def test_an_empty_set_is_named(place: Path) -> None:
    Path("long.jsonl").write_text(json.dumps({"prompt": "so " * 90, "completion": "on"}) + "\n")
    for sets, what in [({"domain": "domain.jsonl", "far": "long.jsonl"}, ", the set far"), ("long.jsonl", "")]:
        found = config("tiny-llama", eval_data=sets, truncation="drop", max_length=90)
        why = (
            rf"long.jsonl: every record is longer than max_length 90, so .* nothing to evaluate on \(eval_data{what}\)"
        )
        with pytest.raises(UserError, match=why):
            train(found)
        with pytest.raises(UserError, match=rf"left out for their length, so .* \(eval_data{what}\)"):
            examine(found)


def test_a_set_on_the_command_line() -> None:
    made = build_config({"model": "none", "data": "x", "method": "lora", "eval_data": SETS}, ["eval_data.domain=~/d"])
    assert made.eval_data == {**SETS, "domain": str(Path("~/d").expanduser())}
    assert RunConfig.model_validate(json.loads(made.model_dump_json())) == made
