"""How a job ends: one whose adapter is of no use has failed, says why, and leaves nothing under an adapter's name."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit

from weft.api import Adapters
from weft.files.run_folder import RunStore
from weft.models.facts import sketch
from weft.training import Job, JobConfig, Trainer
from weft.training.config import make_config
from weft.training.run import train


def run(model: Any, *given: dict[str, Any], **options: Any) -> tuple[Trainer, dict[str, Any], list[str]]:
    """A trainer that has run, how its jobs ended, and what it warned of."""
    adapters = Adapters(model, sketch(model))  # what overflows cannot be proved
    jobs = []
    for seed, settings in enumerate(given):
        config = JobConfig(**{"method": "lora", "steps": 5, "batch_size": 2, "seed": seed, **settings})
        adapter = adapters.add(config.name, config.method_config(), seed=seed)
        jobs.append(Job(config, adapter, kit.samples(8, seed=seed), kit.samples(3, seed=60 + seed)))
    warnings: list[str] = []

    def listen(event: Any) -> None:
        if event["event"] == "warning":
            warnings.append(event["message"])

    trainer = Trainer(adapters, jobs, on_event=listen, verify_packing=False, **options)
    return trainer, trainer.run().jobs, warnings


def overflowing(dtype: torch.dtype = torch.float16) -> Any:
    """A float16 model whose forward pass overflows: its output layer gives more than 65504."""
    model = kit.make_model("llama", dtype)
    with torch.no_grad():
        model.get_output_embeddings().weight.fill_(6e4)
    return model


@pytest.mark.parametrize("steps", [1, 5, 12])
def test_float16_that_overflows_in_every_step(steps: int) -> None:
    """The scaler skips them all; the job beside it fails as well, for it is the base that overflows."""
    _, jobs, warnings = run(overflowing(), {"name": "one", "steps": steps}, {"name": "two", "steps": 1})
    for name, count in {"one": steps, "two": 1}.items():
        assert (jobs[name]["ended"], jobs[name]["skipped"], jobs[name]["moved"]) == ("failed", count, 0)
        assert (f"all {count} steps" if count > 1 else "its one step") in jobs[name]["reason"]
        assert "a gradient overflowed in" in jobs[name]["reason"]
        assert "bfloat16 or float32" in jobs[name]["reason"]
    assert sorted(warnings) == sorted(f"{name}: {jobs[name]['reason']}; the job has failed" for name in jobs)


def test_some_steps_that_overflow_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """Half of them or more; one is how the scale is found."""
    import weft.training.loop as loop

    monkeypatch.setattr(loop, "_FIRST_LOSS_SCALE", 2.0**33)
    _, jobs, warnings = run(kit.make_model("llama", torch.float16), {"name": "one", "steps": 24})
    skipped = jobs["one"]["skipped"]
    assert jobs["one"]["ended"] == "finished"
    assert 12 <= skipped < 24
    assert warnings == [
        f"one: {skipped} of 24 steps were skipped, for float16 overflowed; bfloat16 or float32 would not"
    ]
    monkeypatch.setattr(loop, "_FIRST_LOSS_SCALE", 2.0**12)
    assert run(kit.make_model("llama", torch.float16), {"name": "one", "steps": 24})[2] == []


def test_zero_gradients_are_no_training() -> None:
    """Weight decay moves A all the same."""
    model = kit.make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.zero_()
    _, jobs, _ = run(model, {"name": "one", "weight_decay": 0.1})
    assert jobs["one"]["ended"] == "failed"
    assert "every gradient was zero in all 5 steps" in jobs["one"]["reason"]
    assert "float16" not in jobs["one"]["reason"], "the base is in float32"


def test_a_rate_too_low_to_change_anything() -> None:
    """Layer norms begin as the base's; 1e-12 more is nothing in float32."""
    low = {"name": "low", "method": "ln_tuning", "learning_rate": 1e-12}
    _, jobs, _ = run(kit.make_model("llama"), low, {"name": "usual", "method": "ln_tuning"})
    assert jobs["low"]["ended"] == "failed"
    assert "what they began as after all 5 steps; the learning_rate (1e-12) is too low" in jobs["low"]["reason"]
    assert (jobs["usual"]["ended"], jobs["usual"]["reason"]) == ("finished", None)


@pytest.mark.parametrize("method", kit.TRAINED)
def test_every_method_is_seen_to_have_learned(method: str) -> None:
    settings = {"method": method, "method_settings": kit.SETTINGS.get(method, {}), "steps": 1}
    _, jobs, warnings = run(kit.make_model("llama"), {"name": "one", **settings})
    assert (jobs["one"]["ended"], jobs["one"]["moved"], warnings) == ("finished", 1, [])


def test_of_a_large_tensor_a_part_is_looked_at(monkeypatch: pytest.MonkeyPatch) -> None:
    import weft.training.job as job

    monkeypatch.setattr(job, "_WITNESSES", 7)
    tensor, own = torch.zeros(40, 40), job.Job.__new__(job.Job)
    before = own._witness(tensor)
    assert own._witness(tensor + 1) != before
    assert own._witness(tensor.clone()) == before
    _, jobs, _ = run(kit.make_model("llama"), {"name": "one", "method": "full"})
    assert jobs["one"]["ended"] == "finished"


def test_a_last_step_into_infinity() -> None:
    """No step comes after it that could see it."""
    huge = {
        "name": "one",
        "steps": 1,
        "learning_rate": 1e38,
        "optimizer": "sgd",
        "max_grad_norm": 0,
        "warmup_ratio": 0,
    }
    model = kit.make_model("llama")
    with torch.no_grad():
        model.get_output_embeddings().weight.mul_(1e4)
    _, jobs, _ = run(model, huge)
    assert jobs["one"]["ended"] == "failed"
    assert "numbers that are not finite" in jobs["one"]["reason"]


def test_early_stopping_that_found_nothing_better() -> None:
    wild = {"name": "wild", "steps": 30, "learning_rate": 3.0, "eval_steps": 2, "early_stopping_patience": 2}
    trainer, jobs, _ = run(kit.make_model("llama"), wild)
    assert jobs["wild"]["ended"] == "failed"
    assert "no evaluation was better than the one before the first step" in jobs["wild"]["reason"]
    assert jobs["wild"]["step"] == 4
    fresh = trainer.adapters.add("fresh", trainer.jobs[0].config.method_config(), seed=0)
    kept = kit.parameters(trainer.jobs[0].adapter)
    assert kit.difference(kept.values(), kit.parameters(fresh).values()) == 0


def settings(model: Path, data: Path, folder: Path, *methods: dict[str, Any], **more: Any) -> Any:
    given = {"model": str(model), "data": str(data), "output_dir": str(folder), "steps": 3, "batch_size": 2, **more}
    return make_config({**given, "jobs": [{"method": "lora", **method} for method in methods]})


def test_the_others_keep_their_results(tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path) -> None:
    """Bit for bit: the failed one is not kept, and neither is what an earlier version had kept of it."""
    from weft.errors import UserError
    from weft.export.folder import merge_folder
    from weft.generation.open import open_target

    good, bad = {"name": "good"}, {"name": "bad", "method": "ln_tuning", "learning_rate": 1e-12}
    train(settings(tiny_llama_dir, tiny_data, tmp_path / "alone", good, exact=True))
    config = settings(tiny_llama_dir, tiny_data, tmp_path / "both", good, bad, exact=True)
    store = RunStore(config.output_dir)
    result = train(config)
    assert {name: job["ended"] for name, job in result.jobs.items()} == {"good": "finished", "bad": "failed"}
    assert [path.name for path in store.adapters.iterdir()] == ["good"]
    file = "adapters/good/adapter_model.safetensors"
    assert (tmp_path / "both" / file).read_bytes() == (tmp_path / "alone" / file).read_bytes()

    (store.adapters / "bad").mkdir()
    again = train(config.model_copy(update={"resume": True}))
    assert (again.jobs["bad"]["ended"], again.jobs["bad"]["reason"]) == ("failed", result.jobs["bad"]["reason"])
    assert [path.name for path in store.adapters.iterdir()] == ["good"]

    opened = open_target(store.folder)
    assert opened.names == ("good",)
    assert "no adapter 'bad', for its job failed: its tensors are what they began as" in opened.notes[-1]
    opened.close()
    with pytest.raises(UserError, match="no adapter 'bad', for its job failed"):
        open_target(store.folder, adapters=["bad"])
    alone = settings(tiny_llama_dir, tiny_data, tmp_path / "bad", bad)
    train(alone)
    for what in (open_target, lambda folder: merge_folder(folder, tmp_path / "merged")):
        with pytest.raises(UserError, match=r"'bad'.* failed: its tensors"):
            what(alone.output_dir)


def test_float16_through_the_whole_run(
    tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Exit code 3 and no adapter, as for any failed job; ``weft combine`` says why there is none."""
    from transformers import AutoModelForCausalLM

    from weft.cli.main import main

    model = AutoModelForCausalLM.from_pretrained(tiny_llama_dir)
    with torch.no_grad():
        model.model.norm.weight.fill_(6e4)
    model.save_pretrained(tmp_path / "loud")
    for file in tiny_llama_dir.glob("tokenizer*"):
        (tmp_path / "loud" / file.name).write_bytes(file.read_bytes())
    for file in tiny_llama_dir.glob("chat_template*"):
        (tmp_path / "loud" / file.name).write_bytes(file.read_bytes())
    monkeypatch.chdir(tmp_path)
    assert main(["train", "--model", "loud", "--data", str(tiny_data), "--method", "lora", "dtype=float16"]) == 2
    assert not Path("runs").exists()
    # As if only the data's own texts made it overflow, and not those of the proof.
    monkeypatch.setattr("weft.models.load.describe", lambda model, *_: sketch(model))
    monkeypatch.setattr("weft.training.run.prove_attached", lambda adapters, name: None)
    words = ["train", "--model", "loud", "--data", str(tiny_data), "--method", "lora", "steps=4", "dtype=float16"]
    assert main([*words, "--output-dir", "out", "--quiet"]) == 3
    assert list(Path("out/adapters").iterdir()) == []
    progress = json.loads(next(Path("out/checkpoints").glob("*/state.json")).read_text())["jobs"]["lora"]["progress"]
    assert (progress["ended"], progress["skipped"], progress["moved"]) == ("failed", 4, 0)


def test_what_the_command_says(
    weft_words: Callable[..., tuple[int, str, str]], tiny_llama_dir: Path, tiny_data: Path
) -> None:
    words = ["train", "--model", tiny_llama_dir, "--data", tiny_data, "--method", "ln_tuning", "steps=2",
             "learning_rate=1e-12"]  # fmt: skip
    code, out, err = weft_words(*words)
    assert code == 3
    assert "ln_tuning -> failed, and is not kept: its tensors are what they began as after all 2 steps" in out
    assert "weft chat" not in out
    assert "the job has failed" in err
    code, out, err = weft_words("combine", "runs/weft", "--output", "both")
    assert code == 2
    assert "runs/weft has no adapter 'ln_tuning', for its job failed: its tensors are what they began as" in err
    code, out, err = weft_words(*words, "--output-dir", "other", "--json")
    (job,) = json.loads(out)["jobs"]
    assert (job["ended"], job["folder"], job["bytes"]) == ("failed", None, 0)
    assert job["reason"].startswith("its tensors are what they began as")


@pytest.fixture
def weft_words(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> Callable[..., tuple[int, str, str]]:
    """The command line in an empty folder: exit code, stdout, stderr."""
    from weft.cli.main import main

    monkeypatch.chdir(tmp_path)

    def call(*words: object) -> tuple[int, str, str]:
        code = main([str(word) for word in words])
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call
