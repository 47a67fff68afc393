"""Jobs that learn from answers of their own: what is rewarded, kept, refused, and goes on after a break."""

from __future__ import annotations

import json
import math
import shutil
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from tests import kit

import weft
from weft.errors import UserError
from weft.files.tensors import read_tensors
from weft.generation.rollouts import writer
from weft.objectives.ppo import PPO, gae, whitened
from weft.rewards import REWARDS, Rewarder, RewardSettings
from weft.rewards.registry import register_reward
from weft.training.config import make_config
from weft.training.run import train

ROWS = [{"instruction": f"How much is {a} + {b}?", "output": str(a + b)} for a in range(1, 5) for b in range(1, 4)]


def config(folder: Path, objective: str, **more: Any) -> Any:
    data = folder / "sums.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    settings = {"rewards": ["length_of_two"], "num_generations": 3, "max_completion_length": 4}
    settings |= more.pop("objective_settings", {})
    values = {
        "model": "tiny-llama", "data": str(data), "output_dir": str(folder / "run"), "method": "lora", "threads": 1,
        "objective": objective, "objective_settings": settings, "steps": 4, "batch_size": 3, "logging_steps": 1,
        "learning_rate": 1e-3, **more,
    }  # fmt: skip
    return make_config(values)


@pytest.fixture(autouse=True)
def _reward() -> Any:
    """A reward that says something about any answer: how near its length is to two tokens."""

    @register_reward("length_of_two")
    def length_of_two(prompts: Sequence[str], completions: Sequence[str], *, completion_ids: Any, **_: Any) -> Any:
        return [-abs(len(ids) - 2) + (ids[0] % 7) / 10 for ids in completion_ids]

    yield
    del REWARDS["length_of_two"]


def tensors(folder: Path) -> dict[str, str]:
    found = sorted((folder / "run" / "adapters").glob("*/adapter_model.safetensors"))
    return {path.parent.name: kit.sha256(list(read_tensors(path).values())) for path in found}


@pytest.mark.parametrize("objective", ["grpo", "rloo", "ppo"])
def test_a_run(objective: str, tmp_path: Path) -> None:
    result = train(config(tmp_path, objective, eval_size=3), writer=writer)
    names = {"lora", *({"lora-value"} if objective == "ppo" else ())}
    assert {name: state["ended"] for name, state in result.jobs.items()} == dict.fromkeys(names, "finished")
    kept = sorted((tmp_path / "run" / "rollouts" / "lora").glob("*.jsonl"))
    assert len(kept) == (1 if objective == "ppo" else 4)  # PPO learns four times from the same answers
    rows = [json.loads(line) for line in kept[0].read_text().splitlines()]
    assert len(rows) == 9
    assert set(rows[0]) >= {"prompt", "completion", "reward", "rewards", "advantage", "kl", "ended", "source"}
    events = [row for row in weft.read_metrics(tmp_path / "run") if row["event"] == "step" and row["job"] == "lora"]
    assert {"reward", "kl", "entropy", "clip_ratio", "frac_reward_zero_std", "truncated"} <= set(events[0])
    # The policy that writes is the one that learns: nothing is clipped, and the engine's numbers are the trainer's.
    assert events[0]["clip_ratio"] == 0.0
    assert abs(events[0]["kl_of_answers"]) < 1e-5


@pytest.mark.parametrize("objective", ["grpo", "ppo"])
@pytest.mark.parametrize("stop", [1, 2, 3])
def test_a_run_that_stops_goes_on_as_if_it_had_not(objective: str, stop: int, tmp_path: Path) -> None:
    """Bit for bit, also in the middle of PPO's four steps over the same answers."""
    whole, broken = tmp_path / "whole", tmp_path / "broken"
    for folder in (whole, broken):
        folder.mkdir()
    more = {"steps": 6, "objective_settings": {"num_iterations": 2 if objective == "grpo" else 4}}
    train(config(whole, objective, **more), writer=writer)
    seen: list[int] = []

    def heard(event: Any) -> None:
        seen.append(1) if event["event"] == "step" and event["job"] == "lora" else None

    train(config(broken, objective, **more), writer=writer, on_event=heard, should_stop=lambda: len(seen) >= stop)
    assert len(seen) == stop
    train(config(broken, objective, **more, resume=True), writer=writer)
    assert tensors(whole) == tensors(broken)
    for one, other in zip(*(sorted((f / "run" / "rollouts").rglob("*.jsonl")) for f in (whole, broken)), strict=True):
        assert one.name == other.name
        assert one.read_text().replace(str(whole), "") == other.read_text().replace(str(broken), "")


def test_beside_sft_it_is_what_it_is_alone(tmp_path: Path) -> None:
    """In exact mode, to the bit: neither the engine's batch nor the pass tells who is beside."""
    found = []
    for number, beside in enumerate((False, True)):
        folder = tmp_path / str(number)
        folder.mkdir()
        own = config(folder, "grpo", exact=True)
        values = own.model_dump(mode="json")
        (job,) = values["jobs"]
        job = {k: v for k, v in job.items() if v is not None}
        job |= job.pop("method_settings")
        sft = {"name": "sft", "method": "bitfit", "steps": 4, "batch_size": 2}
        values["jobs"] = [job, *([sft] if beside else [])]
        train(make_config(values), writer=writer)
        found.append(tensors(folder)["lora"])
    assert found[0] == found[1]


# ---------------------------------------------------------------------------------------------------- rewards that fail


def fails(*_: Any, **__: Any) -> Any:
    raise ZeroDivisionError("no such thing")


WRONG: dict[str, tuple[Any, str]] = {
    "raises": (fails, "raised ZeroDivisionError: no such thing"),
    "hangs": (lambda *_, **__: time.sleep(20), "longer than 0.2 s"),
    "nan": (lambda prompts, completions, **_: [math.nan] * len(completions), "answer 1 is nan"),
    "few": (lambda prompts, completions, **_: [1.0], "1 values for 9 answers"),
    "text": (lambda prompts, completions, **_: ["good"] * len(completions), "answer 1 is 'good'"),
    "number": (lambda prompts, completions, **_: 1.0, "instead of 9 numbers"),
}


@pytest.mark.parametrize("name", list(WRONG))
def test_a_reward_that_fails_is_named_and_nothing_is_learned_from_it(name: str, tmp_path: Path) -> None:
    function, message = WRONG[name]
    register_reward(name)(function)
    told: list[str] = []
    try:
        settings = {"rewards": [{"reward": name, "time_limit": 0.2}]}
        result = train(
            config(tmp_path, "grpo", objective_settings=settings), writer=writer,
            on_event=lambda event: told.append(event.get("message", "")),
        )  # fmt: skip
    finally:
        del REWARDS[name]
    assert any(message in text and name in text for text in told), told
    assert result.jobs["lora"]["ended"] == "failed"
    assert "no reward had a say" in result.jobs["lora"]["reason"]
    assert not (tmp_path / "run" / "adapters" / "lora").exists()


def test_another_reward_beside_it_goes_on(tmp_path: Path) -> None:
    register_reward("raises")(fails)
    try:
        result = train(
            config(tmp_path, "grpo", objective_settings={"rewards": ["raises", "length_of_two"]}), writer=writer
        )
    finally:
        del REWARDS["raises"]
    assert result.jobs["lora"]["ended"] == "finished"
    row = json.loads(next((tmp_path / "run" / "rollouts").rglob("*.jsonl")).read_text().splitlines()[0])
    assert row["rewards"]["raises"] is None
    assert row["reward"] == row["rewards"]["length_of_two"]


def test_rewards_are_weighed() -> None:
    short, number = {"reward": "length", "max_tokens": 2, "weight": 2.0}, {"reward": "regex", "pattern": "[0-9]+"}
    given = [short, number | {"weight": 0.5}]
    found = Rewarder([RewardSettings.of(one) for one in given], {})(
        ["p"] * 3, ["12", "1 2", "x"], completion_ids=[[1, 2], [1, 2, 3], [1]]
    )
    assert found.totals == [2.5, 0.0, 2.0]
    found = Rewarder([RewardSettings.of({"reward": "json_schema", "schema": {"type": "object", "required": ["a"]}}),
                      RewardSettings.of({"reward": "exact_answer", "pattern": "= (.*)"})], {})(
        ["p"] * 3, ['{"a": 1}', "so = 4 ", '{"b": 1}'], answer=["1", "4", "x"]
    )  # fmt: skip
    assert found.parts == {"json_schema": [1.0, 0.0, 0.0], "exact_answer": [0.0, 1.0, 0.0]}


@pytest.mark.parametrize(
    ("objective", "settings", "message"),
    [
        ("grpo", {"num_generations": 1}, "greater than 1"),
        ("grpo", {"rewards": []}, "rewards"),
        ("grpo", {"rewards": ["exakt_answer"]}, "exact_answer"),
        ("grpo", {"rewards": [{"reward": "regex"}]}, "pattern"),
        ("grpo", {"rewards": [{"weight": 2}]}, "either a reward or an adapter"),
        ("grpo", {"rewards": [{"reward": "length_of_two", "weight": 0}]}, "every weight is 0"),
        ("grpo", {"kl_estimator": "k1"}, "k1 has no place in a loss"),
        ("rloo", {"kl_estimator": "k3"}, "kl_estimator"),
        ("grpo", {"rewards": [{"adapter": "nowhere"}]}, "nowhere"),
    ],
)
def test_what_cannot_work_is_refused(objective: str, settings: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(UserError, match=message):
        train(config(tmp_path, objective, objective_settings=settings), writer=writer)
    assert not (tmp_path / "run").exists()


def test_a_reward_model_rewards(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward adapter that was trained in one run gives the rewards of another; one of another base is refused."""
    pairs = tmp_path / "pairs.jsonl"
    rows = [{"prompt": r["instruction"], "chosen": r["output"], "rejected": "no"} for r in ROWS]
    pairs.write_text("".join(json.dumps(row) + "\n" for row in rows))
    for model in ("tiny-llama", "tiny-bloom"):
        values = {"model": model, "data": str(pairs), "output_dir": str(tmp_path / model), "method": "lora", "steps": 3,
                  "batch_size": 4, "objective": "reward", "threads": 1, "name": "judge"}  # fmt: skip
        assert train(make_config(values)).completed
    folder = tmp_path / "tiny-llama" / "adapters" / "judge"
    result = train(config(tmp_path, "grpo", objective_settings={"rewards": [{"adapter": str(folder)}]}), writer=writer)
    assert result.jobs["lora"]["ended"] == "finished"
    row = json.loads(next((tmp_path / "run" / "rollouts").rglob("*.jsonl")).read_text().splitlines()[0])
    assert row["reward"] == row["rewards"][f"adapter {folder}"] != 0
    # All of it is refused before weights are loaded.
    monkeypatch.setattr("weft.models.load._load", lambda *_: pytest.fail("weights are loaded"))
    sibling = tmp_path / "sibling"
    shutil.copytree(folder, sibling)
    record = json.loads((sibling / "weft.json").read_text())
    record["base"]["sha256_of_small_tensors"] = "0" * 64
    (sibling / "weft.json").write_text(json.dumps(record))
    plain = tmp_path / "run" / "adapters" / "lora"
    for adapter, message in ((tmp_path / "tiny-bloom" / "adapters" / "judge", r"another base .*parameters"),
                             (sibling, r"another base .*sha256"), (plain, "gives no score"),
                             (tmp_path / "none", "no folder of an adapter")):  # fmt: skip
        settings = {"rewards": [{"adapter": str(adapter)}]}
        with pytest.raises(UserError, match=message):
            train(config(tmp_path, "grpo", objective_settings=settings, overwrite_output_dir=True), writer=writer)
    with pytest.raises(UserError, match=r"start_from: .*another base"):
        train(config(tmp_path, "grpo", start_from=str(sibling), overwrite_output_dir=True), writer=writer)


# ------------------------------------------------------------------------------------------------------------------ PPO


def test_advantages_are_those_of_their_definition() -> None:
    generator = torch.Generator().manual_seed(0)
    rewards, values = (torch.randn(7, generator=generator, dtype=torch.float64) for _ in range(2))
    after = torch.cat([values[1:], torch.zeros(1)])
    delta = rewards + 0.9 * after - values
    expected = torch.stack([sum((0.9 * 0.8) ** k * delta[t + k] for k in range(7 - t)) for t in range(7)])  # type: ignore[arg-type]
    assert torch.allclose(gae(rewards, values, 0.9, 0.8), expected, atol=1e-14)


def test_answers_without_a_reward_move_nothing() -> None:
    """Neither the mean nor the scale of the others."""
    kl = [torch.zeros(n, dtype=torch.float64) for n in (2, 3, 1)]
    values = [torch.zeros(n, dtype=torch.float64) for n in (2, 3, 1)]
    objective = PPO(rewards=("regex",))
    some = objective.credit(torch.tensor([[1.0], [math.nan], [-1.0]], dtype=torch.float64), kl, values)
    few = torch.tensor([[1.0], [-1.0]], dtype=torch.float64)
    without = objective.credit(few, [kl[0], kl[2]], [values[0], values[2]])
    assert torch.equal(some.advantages[0], without.advantages[0])
    assert torch.equal(some.advantages[2], without.advantages[1])


def test_the_coefficient_of_the_kl_adapts() -> None:
    objective = PPO(rewards=("regex",), target_kl=2.0, horizon=100)
    assert objective.next_kl_coef(0.1, torch.full((10,), 2.0)) == pytest.approx(0.1)
    assert objective.next_kl_coef(0.1, torch.full((10,), 50.0)) == pytest.approx(0.1 * 1.02)
    assert objective.next_kl_coef(0.1, torch.full((10,), 0.0)) == pytest.approx(0.1 * 0.98)
    assert PPO(rewards=("regex",)).next_kl_coef(0.1, torch.full((10,), 50.0)) == 0.1


def test_whitening_counts_real_tokens_only() -> None:
    found = whitened([torch.tensor([1.0, 2.0]), torch.tensor([6.0])], [True, True])
    whole = torch.cat(found)
    assert float(whole.mean()) == pytest.approx(0.0, abs=1e-6)
    assert float(whole.var()) == pytest.approx(1.0, abs=1e-5)


@pytest.mark.parametrize("objective", ["grpo", "ppo"])
def test_a_step_in_which_no_answer_counts_teaches_nothing(objective: str, tmp_path: Path) -> None:
    """One step without any reward between others; and a run in which no answer has an end."""
    asked: list[int] = []

    @register_reward("sometimes")
    def sometimes(prompts: Any, completions: Any, *, completion_ids: Any, **_: Any) -> Any:
        asked.append(1)
        return [None if len(asked) == 2 else ids[0] % 7 for ids in completion_ids]

    try:
        settings = {"rewards": ["sometimes", {"reward": "length", "max_tokens": 3, "weight": 0}], "num_iterations": 1}
        result = train(config(tmp_path, objective, objective_settings=settings), writer=writer)
    finally:
        del REWARDS["sometimes"]
    assert {state["ended"] for state in result.jobs.values()} == {"finished"}
    kept = sorted((tmp_path / "run" / "rollouts" / "lora").glob("*.jsonl"))
    row = json.loads(kept[1].read_text().splitlines()[0])
    assert row["reward"] is None  # a reward that is only watched says nothing of the sum
    assert row["rewards"]["length"] is not None


def test_epochs_are_passes_over_the_prompts(tmp_path: Path) -> None:
    """However many steps learn from the same answers."""
    given = config(tmp_path, "ppo", steps=None, epochs=1, objective_settings={"num_iterations": 2})
    result = train(given, writer=writer)
    assert {state["step"] for state in result.jobs.values()} == {8}  # 12 prompts by three, twice each
    files = list((tmp_path / "run" / "rollouts" / "lora").glob("*.jsonl"))
    asked = [json.loads(line)["source"] for path in files for line in path.read_text().splitlines()]
    assert len(set(asked)) == 12


def test_a_value_function_ends_with_its_policy(tmp_path: Path) -> None:
    given = config(
        tmp_path, "ppo", steps=12, eval_size=3, eval_steps=1, early_stopping_patience=1, learning_rate=1e-7,
        early_stopping_min_delta=10.0,
    )  # fmt: skip
    result = train(given, writer=writer)
    assert result.jobs["lora"]["step"] == result.jobs["lora-value"]["step"] < 12


def test_fields_of_records_do_not_get_in_the_way(tmp_path: Path) -> None:
    given = config(tmp_path, "grpo")
    rows = [{**row, "completions": "x", "prompts": 1, "self": 2, "completion_ids": 3} for row in ROWS]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert train(given, writer=writer).jobs["lora"]["ended"] == "finished"


def test_other_answers_are_other_data(tmp_path: Path) -> None:
    """The right answers decide about rewards, so a run that goes on must have the same ones."""
    train(config(tmp_path, "grpo", steps=2), writer=writer)
    given = config(tmp_path, "grpo", steps=4, resume=True)
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps({**row, "output": "0"}) + "\n" for row in ROWS))
    with pytest.raises(UserError, match="the data of job 'lora'"):
        train(given, writer=writer)


def test_an_answer_must_have_room(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"sums.jsonl:\d+: the prompt's .* max_completion_length: 1100 exceed"):
        train(config(tmp_path, "grpo", objective_settings={"max_completion_length": 1100}), writer=writer)
    with pytest.raises(UserError, match="truncation: left alone"):
        train(config(tmp_path, "grpo", max_length=6, truncation="right"), writer=writer)
    given = config(tmp_path, "grpo", max_length=6, truncation="left")
    assert train(given, writer=writer).jobs["lora"]["ended"] == "finished"


@pytest.mark.parametrize(
    ("more", "message"),
    [
        ({"objective": "value", "objective_settings": {"of": "nobody"}}, "belongs to a job of objective ppo"),
        ({"objective": "grpo", "neftune_noise_alpha": 5}, "neftune_noise_alpha is for the likelihood"),
        ({"objective": "grpo", "documents": "joined", "max_length": 64}, "cuts plain text"),
        ({"objective": "kto", "objective_settings": {}, "batch_size": 1}, "2 records a step"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(more: dict[str, Any], message: str, tmp_path: Path) -> None:
    values = config(tmp_path, "grpo").model_dump(mode="json")
    job = {k: v for k, v in values.pop("jobs")[0].items() if v is not None} | more
    job |= job.pop("method_settings")
    top = {key: job.pop(key) for key in ("documents", "max_length") if key in job}
    with pytest.raises(UserError, match=message):
        train(make_config({**values, **top, "jobs": [job]}), writer=writer)


# ---------------------------------------------------------------------------------------------------- whether it learns


@pytest.mark.slow
@pytest.mark.parametrize("name", ["grpo", "rloo", "ppo", "ppo, reward model"])
def test_it_learns_sums(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From an adapter that is right about some held-out sums: 15 points more, 10 with a trained reward
    (benchmarks/reinforcement.py)."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "benchmarks"))
    from reinforcement import one_seed

    found = one_seed(0, tmp_path, [name])[name]
    assert 0.3 <= found["before"] <= 0.7
    assert found["after"] - found["before"] >= (0.1 if "reward" in name else 0.15)
