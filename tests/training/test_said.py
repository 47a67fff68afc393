"""What is said last wins, in every job; and what a program may give as a value."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import weft
from weft.errors import UserError
from weft.training.config import build_config, config_of, make_config
from weft.training.settings import JobConfig

JOBS: dict[str, Any] = {
    "model": "m",
    "data": "top",
    "jobs": [
        {
            "name": "a",
            "method": "lora",
            "lr": 5e-3,
            "lora": {"lora_rank": 8, "lora_alpha": 3},
            "adam_betas": [0.5, 0.6],
        },
        {"name": "b", "method": "ia3", "data": "own"},
        {"name": "c", "method": "lora+bitfit", "r": 2, "learning_rate": 1.0},
    ],
}


def jobs(said: Any, flags: Mapping[str, object] | None = None) -> list[tuple[JobConfig, ...]]:
    """The jobs of a file, and of a configuration that is there already, as a run's folder has it."""
    return [build_config(JOBS, said, flags=flags).jobs,
            config_of(make_config(JOBS), said, flags=flags or {}, source="run").jobs]  # fmt: skip


def ranks(job: JobConfig) -> list[int]:
    return [part.r for part in job.method_config().methods() if isinstance(part, weft.LoraConfig)]


@pytest.mark.parametrize(
    "said", [["learning_rate=1e-3", "r=4"], {"lr": 1e-3, "lora_r": 4}, {"lr": 1e-3, "lora": {"r": 4}}]
)
def test_what_is_said_last_wins_in_every_job(said: Any) -> None:
    for a, b, c in jobs(said):
        assert [a.learning_rate, b.learning_rate, c.learning_rate] == [1e-3] * 3
        assert ranks(a) == ranks(c) == [4]
        assert a.method_config().lora_alpha == 3, "the rest stays"  # type: ignore[attr-defined]


def test_the_order_of_words_counts_and_that_of_keywords_does_not() -> None:
    for said, found in [(["jobs.0.r=16", "r=4"], 4), (["r=4", "jobs.0.r=16"], 16), (["r=4", "lora.r=5"], 5),
                        ({"jobs.a.r": 16, "r": 4}, 16), ({"r": 4, "jobs.a.lora.r": 16}, 16)]:  # fmt: skip
        assert [ranks(a) for a, *_ in jobs(said)] == [[found]] * 2
    (only,) = build_config(JOBS, {"jobs": [{"method": "lora", "r": 3}], "r": 4, "lr": 1.0}).jobs
    assert (ranks(only), only.learning_rate) == ([3], 1.0), "beside keywords that are jobs, the others are defaults"


def test_paths_betas_and_flags_of_jobs() -> None:
    for a, b, _ in jobs(["adam_beta1=0.8"], {"data": "said"}):
        assert a.adam_betas == (0.8, 0.6)
        assert b.data == "said"
    assert [job.data for job in jobs(["r=4"])[1]] == [None, "own", None]


@pytest.mark.parametrize("said", [["method=bitfit"], {"method": "bitfit"}, {"finetuning_type": "bitfit"}])
def test_a_method_takes_the_place_of_the_jobs(said: Any) -> None:
    assert [[job.method for job in found] for found in jobs(said)] == [["bitfit"]] * 2


@pytest.mark.parametrize(
    ("said", "words"),
    [
        ({"method": "lora", "jobs": [{"method": "ia3"}]}, "give one of the two"),
        ({"method": weft.LoraConfig(), "jobs": [{"method": "ia3"}]}, "give one of the two"),
        (
            {"num_virtual_tokens": 3},
            r"num_virtual_tokens: no job's method takes it, so it would do nothing. These do: p_tuning",
        ),
        ({"method": weft.LoraConfig}, r"no method: expected a name .*LoraConfig.*method=weft\.LoraConfig\(r=4\)"),
        ({"method": {"name": "lora"}}, r"no method: expected a name .*'name': 'lora'"),
        ({"tokenizer": "t"}, "unknown key 'tokenizer'. The base's own"),
        ({"data": [{"path": ["x" * 9999]}]}, "^(?s:.){,800}$"),
        ({"labels": ["x" * 9999, {}]}, "^(?s:.){,800}$"),
    ],
)
def test_refused(said: Any, words: str) -> None:
    with pytest.raises(UserError, match=words):
        build_config(JOBS, said)


def test_a_method_that_no_job_takes() -> None:
    with pytest.raises(UserError, match="method and jobs both"):
        make_config({**JOBS, "method": "lora"})
    with pytest.raises(UserError, match="method and jobs both"):
        make_config(JOBS, method="lora", jobs=[{"method": "lora"}])


def test_values_of_other_libraries() -> None:
    config = make_config(
        model=Path("m"), train_dataset="d", method="lora", r=np.int64(4), layers_to_transform=np.arange(2),
        learning_rate=np.float64(0.5), gradient_clipping=np.float32(0.25), target_modules={"b", "a", "c"},
        dtype=torch.float32, device=torch.device("cpu"), exact=np.bool_(True),
    )  # fmt: skip
    assert json.loads(config.model_dump_json())["jobs"][0]["method_settings"] == {
        "r": 4, "layers_to_transform": [0, 1], "target_modules": ["a", "b", "c"]}  # fmt: skip
    assert (config.dtype, config.device, config.exact, config.jobs[0].max_grad_norm) == ("float32", "cpu", True, 0.25)
    names = {f"name{i}" for i in range(20)}
    assert weft.LoraConfig(target_modules=names).target_modules == sorted(names)  # type: ignore[arg-type]


def test_a_run_stays_where_it_began(
    tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "base").symlink_to(tiny_llama_dir)

    def leave(setup: object) -> Any:
        os.chdir(tmp_path / "elsewhere")
        return lambda event: None

    given: dict[str, Any] = {"method": "lora", "steps": 1, "eval_size": 2, "output_dir": "run", "progress": False}
    result = weft.train(model="base", data=tiny_data, callbacks=[leave], **given)
    assert [len(weft.read_metrics(tmp_path / name)) for name in ("run", "run/metrics.jsonl")] == [3, 3]
    assert (tmp_path / "run/adapters/lora").is_dir()
    last = [row["eval_loss"] for row in weft.read_metrics(tmp_path / "run") if row["event"] == "eval"][-1]
    assert result.jobs["lora"]["eval_loss"] == last
    assert not list((tmp_path / "elsewhere").iterdir())


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"callbacks": lambda setup: None}, "expected a list"),
        ({"callbacks": "mine"}, "expected a list"),
        ({"callbacks": [3]}, "callbacks: 3 cannot be called"),
        ({"callbacks": [lambda: None]}, "for events alone take on_event"),
        ({"on_event": 3}, "on_event: expected a function"),
        ({"should_stop": True}, "should_stop: expected a function"),
        ({"should_stop": lambda event: True}, "should_stop: expected a function"),
        ({"progress": "no"}, "progress: expected True or False"),
    ],
)
def test_what_cannot_be_called_is_refused_first(given: dict[str, Any], words: str) -> None:
    with pytest.raises(UserError, match=words):
        weft.train(model="nowhere", data="nothing", method="lora", **given)


@pytest.mark.parametrize("callback", [lambda event: event["loss"], lambda setup: None])
def test_a_callback_that_hears_nothing(tiny_llama_dir: Path, tiny_data: Path, tmp_path: Path, callback: Any) -> None:
    with pytest.raises(UserError, match="for events alone take on_event"):
        weft.train(model=tiny_llama_dir, data=tiny_data, method="lora", steps=1, output_dir=tmp_path / "run",
                   callbacks=[callback], progress=False)  # fmt: skip
    assert not (tmp_path / "run").exists()


def test_what_is_no_path(tiny_llama_dir: Path) -> None:
    with pytest.raises(UserError, match="expected a file, its keys"):
        weft.train(3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=r"It is a base: say model="):
        weft.train(tiny_llama_dir, data="d")
    with pytest.raises(UserError, match="no folder of a run at runs/frist"):
        weft.train("runs/frist", resume=True)
    for call in (weft.read_metrics, weft.load_base):
        with pytest.raises(UserError, match="expected a path, not Linear"):
            call(torch.nn.Linear(2, 2))  # type: ignore[arg-type]
    assert {name for name in dir(weft) if not name.startswith("__")} == set(weft.__all__)
